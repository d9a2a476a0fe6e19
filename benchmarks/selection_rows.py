"""Rows of the table of `selection_quality.py`: passes whose options may be shares of a length, and their engines."""

from __future__ import annotations

import re
from ast import literal_eval
from dataclasses import dataclass
from pathlib import Path

import effc
from effc.runtime.prefix_inputs import prefix_ports
from effc.runtime.session import Engine

ALL = "all tokens"
SHARE = re.compile(r"=(\d+)/(\d+)")
CHANGES_PROMPTS = ("evict", "retain", "stride", "window", "prompt-filter")
"""Rows of these read a prompt in their own way, or keep less of it."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        text: Passes, and behind `@` the options of `effc prefix`: `sparse-attention{scheme=clusters}@keep=0.25`. An
            option `budget=1/4` is a quarter of the tokens of the prompt or text.
    """

    text: str

    @property
    def changes_prompts(self) -> bool:
        """Whether its cache after a prompt is its own."""
        return any(word in self.text for word in CHANGES_PROMPTS)

    @property
    def prefix_options(self) -> dict[str, float]:
        """Arguments of `write_prefix`."""
        pairs = [one.split("=") for one in self.text.partition("@")[2].split(",") if one]
        return {name: literal_eval(value) for name, value in pairs}

    def passes(self, length: int) -> str:
        """Text of its passes for a prompt of so many tokens; empty without any."""
        passes = "" if self.text == ALL else self.text.partition("@")[0]
        return SHARE.sub(lambda found: f"={length * int(found[1]) // int(found[2])}", passes)


class Engines:
    """Engines of one model, each made once and kept in a folder.

    Args:
        model: The model.
        cache_pass: The pass before those of every row.
        folder: Where the engines lie.
    """

    def __init__(self, model: str, cache_pass: str, folder: Path) -> None:
        self._model, self._cache_pass, self._folder = model, cache_pass, folder
        self._open: dict[str, Engine] = {}

    def of(self, row: Row, length: int) -> Engine:
        """The engine of a row for a prompt of so many tokens."""
        passes = row.passes(length)
        if passes not in self._open:
            name = "".join(letter if letter.isalnum() or letter in "=.," else "-" for letter in passes or ALL)
            place = self._folder / name
            if not (place / "effc.json").exists():
                wanted = ",".join(["lossless-weights", self._cache_pass, *([passes] if passes else [])])
                effc.optimize(self._model, place, passes=wanted, check=False)
            self._open[passes] = effc.load(place)
        return self._open[passes]


def reads_prefix(engine: Engine) -> bool:
    """Whether it reads less of a prefix only, and of that what `effc prefix` made of it."""
    return bool(prefix_ports(engine.cache_layout()))


def cache_form(engine: Engine) -> tuple[object, ...]:
    """Engines with the same one can start from each other's caches, where prompts fill them alike."""
    return tuple((port.input, port.dtype, tuple(port.shape)) for port in engine.cache_layout().ports)
