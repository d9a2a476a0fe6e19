"""Recipes: TOML files that name a pipeline; the presets are recipes that come with the package."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from effc.errors import UsageError

PRESETS = Path(__file__).parent / "presets"
SIZE_LIMIT = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """The content of a recipe file, all of it under `[pipeline]`.

    Attributes:
        passes: Pipeline text.
        target: Backend name, or None to leave it to the caller.
        budget: Budget text, or None.
        description: One line about what it is for.
    """

    passes: str
    target: str | None = None
    budget: str | None = None
    description: str = ""


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file. The passes it names are not looked up here.

    Raises:
        UsageError: Not TOML, an unknown key or table (with the nearest known one), a value that is not text,
            or no passes.
    """
    pipeline = _only_table(path, _load(path))
    known = [item.name for item in fields(Recipe)]
    for key, value in pipeline.items():
        if key not in known:
            raise UsageError(f"{path}: unknown key {key!r} in [pipeline].{_near(key, known)} Keys: {', '.join(known)}.")
        if not isinstance(value, str):
            raise UsageError(f"{path}: `{key}` in [pipeline] must be text in quotes, it is {value!r}.")
    if "passes" not in pipeline:
        raise UsageError(f'{path}: [pipeline] names no passes. Add `passes = "…"`, for example "lossless-weights".')
    return Recipe(**pipeline)


def _load(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > SIZE_LIMIT:
            raise UsageError(f"{path}: is larger than {SIZE_LIMIT >> 10} KiB, which no recipe is. Check the path.")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not a TOML file ({error}).") from error
    except (OSError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as a recipe ({error}).") from error


def _only_table(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    for key in content:
        if key != "pipeline":
            raise UsageError(
                f"{path}: unknown table or key {key!r}.{_near(key, ['pipeline'])} A recipe has [pipeline]."
            )
    table = content.get("pipeline")
    if not isinstance(table, dict):
        raise UsageError(f"{path}: has no [pipeline] table, so it is not a recipe.")
    return table


def _near(word: str, known: list[str]) -> str:
    near = get_close_matches(word, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def preset_names() -> list[str]:
    """Names of the presets, sorted: the recipe files of the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def preset(name: str) -> Recipe:
    """A preset by name.

    Raises:
        UsageError: No such preset; the message lists them.
    """
    names = preset_names()
    if name not in names:
        raise UsageError(f"unknown preset {name!r}.{_near(name, names)} Presets: {', '.join(names)}.")
    return read_recipe(PRESETS / f"{name}.toml")
