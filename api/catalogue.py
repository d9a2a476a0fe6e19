"""What the passes say about themselves: contract, documentation, options with type, default and range."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from typing import Any

from effc.errors import MissingDependencyError
from effc.passes.registry import pass_class, pass_names

_SECTIONS = ("Attributes:", "Options:", "Args:")
_TYPE_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "none"}


def list_passes() -> list[dict[str, Any]]:
    """Every pass: `name`, `contract` (None if it cannot be imported), `summary` (first line of its docs)."""
    return [_listed(name) for name in pass_names()]


def _listed(name: str) -> dict[str, Any]:
    try:
        cls = pass_class(name)
    except MissingDependencyError as error:
        return {"name": name, "contract": None, "summary": f"(cannot be loaded) {error}"}
    doc = inspect.getdoc(cls) or ""
    return {"name": name, "contract": str(cls.contract), "summary": doc.partition("\n")[0]}


def describe_pass(name: str) -> dict[str, Any]:
    """The page of a pass: `name`, `contract`, `doc` and `options`.

    Each option has `name`, `type`, `default`, `range` and `doc`.
    The range is what the field declares as `metadata={"range": …}`, or the choices of its type, else None;
    the meaning of an option is its entry in the docstring's `Attributes:` section.

    Raises:
        UsageError: No such pass.
        MissingDependencyError: It cannot be imported here.
    """
    cls = pass_class(name)
    doc = inspect.getdoc(cls) or ""
    meanings = _section_entries(doc)
    hints = typing.get_type_hints(cls)
    options = [_option(item, hints[item.name], meanings) for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return {"name": cls.name, "contract": str(cls.contract), "doc": doc, "options": options}


def _option(item: dataclasses.Field[Any], kind: Any, meanings: dict[str, str]) -> dict[str, Any]:
    limits = item.metadata.get("range")
    return {
        "name": item.name.replace("_", "-"),
        "type": _type_text(kind),
        "default": _default_text(item),
        "range": _choices_text(kind) if limits is None else _range_text(limits),
        "doc": meanings.get(item.name, ""),
    }


def _range_text(limits: Any) -> str:
    return f"{limits[0]} to {limits[1]}" if isinstance(limits, tuple) and len(limits) == 2 else str(limits)


def _type_text(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return "word"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_text(choice) for choice in typing.get_args(kind))
    if origin is tuple:
        return f"{_type_text(typing.get_args(kind)[0])}, several joined by |"
    return _TYPE_WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _choices_text(kind: Any) -> str | None:
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (typing.Union, types.UnionType, tuple):
        found = [_choices_text(choice) for choice in typing.get_args(kind) if choice is not Ellipsis]
        return "; ".join(text for text in found if text) or None
    return None


def _default_text(item: dataclasses.Field[Any]) -> str:
    if item.default is dataclasses.MISSING:
        return "required" if item.default_factory is dataclasses.MISSING else str(item.default_factory())
    if isinstance(item.default, tuple):
        return "|".join(map(str, item.default)) or "none"
    if item.default is None or isinstance(item.default, bool):
        return str(item.default).lower()
    return str(item.default)


def _section_entries(doc: str) -> dict[str, str]:
    """Entries `name: text` of the docstring's options section, continuation lines joined."""
    entries: dict[str, str] = {}
    inside, last = False, ""
    for line in doc.splitlines():
        if line.strip() in _SECTIONS:
            inside = True
        elif inside and line and not line.startswith(" "):
            inside = False
        elif inside and (start := re.match(r" {2,4}(\w+)(?: \([^)]*\))?: (.*)", line)):
            last = start[1]
            entries[last] = start[2].strip()
        elif inside and last and line.strip():
            entries[last] += " " + line.strip()
    return entries
