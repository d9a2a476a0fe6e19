"""The picture of pass key retrieval: length across, depth down, one shaded cell with its figures for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CELL_WIDTH, CELL_HEIGHT = 92, 46
LEFT, TOP = 64, 26
STRONGEST = 0.5
"""Opacity of the strongest shade: text on it stays readable in both colour schemes."""


@dataclass(frozen=True)
class Cell:
    """One length and depth.

    Attributes:
        x: Left edge.
        y: Top edge.
        shade: `good` or `bad`, a colour of the page.
        opacity: Of the shade, 0 to `STRONGEST`.
        share: Share of exact answers, or the points it differs by.
        log_probability: Mean ln p of the right tokens, or how far it differs.
    """

    x: int
    y: int
    shade: str
    opacity: float
    share: str
    log_probability: str


@dataclass(frozen=True)
class HeatMap:
    """A picture, ready to be drawn.

    Attributes:
        title: What it shows.
        description: The same figures in words, for those who do not see it.
        width: Of the picture.
        height: Of the picture.
        columns: `(centre, text)` of each length.
        rows: `(centre, text)` of each depth.
        cells: All cells.
    """

    title: str
    description: str
    width: int
    height: int
    columns: Sequence[tuple[int, str]]
    rows: Sequence[tuple[int, str]]
    cells: Sequence[Cell]


Grid = Sequence[Sequence[float | None]]
"""One list per length, in it one figure per depth."""


def passkey_maps(found: Mapping[str, Any]) -> list[HeatMap]:
    """The engine, the source and their difference, from what `measure_passkey` returned."""
    lengths, depths, logs = found["lengths"], found["depths"], found["log_probability"]
    maps = [
        _draw(f"{side}: {100 * found['score'][side]:.0f} % found", lengths, depths, found[side], logs[side])
        for side in ("engine", "source")
    ]
    gaps = _difference(found["engine"], found["source"]), _difference(logs["engine"], logs["source"])
    return [*maps, _draw("difference: engine less source", lengths, depths, *gaps, signed=True)]


def _difference(engine: Grid, source: Grid) -> list[list[float | None]]:
    return [
        [None if one is None or other is None else one - other for one, other in zip(ours, theirs, strict=True)]
        for ours, theirs in zip(engine, source, strict=True)
    ]


def _draw(
    title: str, lengths: Sequence[int], depths: Sequence[int], shares: Grid, logs: Grid, *, signed: bool = False
) -> HeatMap:
    cells, words = [], []
    for column, length in enumerate(lengths):
        for row, depth in enumerate(depths):
            share = shares[column][row]
            figures = _share(share, signed), _log(logs[column][row], signed)
            shade = "bad" if share is not None and share < 0 else "good"
            opacity = STRONGEST * min(1.0, abs(share or 0.0))
            cells.append(Cell(LEFT + column * CELL_WIDTH, TOP + row * CELL_HEIGHT, shade, opacity, *figures))
            words.append(f"{length} tokens, {depth} % deep: {figures[0]}, ln p {figures[1]}")
    return HeatMap(
        title,
        "; ".join(words),
        LEFT + CELL_WIDTH * len(lengths),
        TOP + CELL_HEIGHT * len(depths),
        [(LEFT + CELL_WIDTH * place + CELL_WIDTH // 2, str(length)) for place, length in enumerate(lengths)],
        [(TOP + CELL_HEIGHT * place + CELL_HEIGHT // 2, f"{depth} %") for place, depth in enumerate(depths)],
        cells,
    )


def _share(share: float | None, signed: bool) -> str:
    if share is None:
        return "–"
    return _minus(f"{100 * share:+.0f} points" if signed and round(100 * share) else f"{abs(100 * share):.0f} %")


def _log(log: float | None, signed: bool) -> str:
    if log is None:
        return "–"
    return _minus(f"{log:+.3f}" if signed and round(log, 3) else f"{abs(log) if signed else log:.3f}")


def _minus(text: str) -> str:
    return text.replace("-", "−")
