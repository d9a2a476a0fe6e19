"""What commands print: results on stdout, notes and progress on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

PIPED_WIDTH = 240
"""Columns of tables when stdout is not a terminal; nothing is cut there."""


def print_json(result: Mapping[str, Any]) -> None:
    """Print the one JSON object of a command; numbers JSON has no form for (NaN, infinities) become null."""
    click.echo(json.dumps(_plain(result), indent=1, ensure_ascii=False, allow_nan=False))


def print_json_line(result: Mapping[str, Any]) -> None:
    """Print one of many JSON objects, on a line of its own."""
    click.echo(json.dumps(_plain(result), ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str | int | float | None):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table; a column whose name starts with `>` is aligned to the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.removeprefix(">"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        table.add_row(*(_escaped(cell) for cell in row))
    console = stdout_console()
    with console.capture() as text:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in text.get().splitlines()))


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def stdout_console() -> Console:
    """A console on stdout; colour only on a terminal and without NO_COLOR."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)


def note(text: str) -> None:
    """Print one line on stderr."""
    click.echo(text, err=True)


class Reporter:
    """Tells the user on stderr what is going on: notes, and one progress line per stage.

    Its methods are the callbacks `announce` and `progress` of the compiler. Quiet, it says nothing; on a
    stderr that is not a terminal it prints each stage once, as a line.
    """

    def __init__(self, bar: Progress | None, *, quiet: bool) -> None:
        self._bar = bar
        self._quiet = quiet
        self._stage: str | None = None
        self._task: TaskID | None = None

    def announce(self, text: str) -> None:
        """Show a note."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            note(text)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is, in bytes; a total of 0 means unknown."""
        if self._quiet:
            return
        if self._bar is None:
            if stage != self._stage:
                note(f"… {stage}")
        elif stage == self._stage and self._task is not None:
            self._bar.update(self._task, completed=done, total=total or None, size=_size(done, total))
        else:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(stage, completed=done, total=total or None, size=_size(done, total))
        self._stage = stage


def _size(done: int, total: int) -> str:
    return f"{megabytes(done)} of {megabytes(total)}" if total else ""


@contextmanager
def reporting(*, quiet: bool) -> Iterator[Reporter]:
    """A reporter for the duration of a command; its bar disappears at the end."""
    if quiet or not sys.stderr.isatty():
        yield Reporter(None, quiet=quiet)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    stage, size = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[size]}", markup=False)
    columns = (SpinnerColumn(), stage, BarColumn(), size, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield Reporter(bar, quiet=False)


def megabytes(count: int | float | None) -> str:
    """Bytes as MB, for people."""
    return "–" if count is None else f"{count / 1e6:,.1f} MB"


def number(value: float | None, digits: int = 3) -> str:
    """A figure with significant digits, or a dash when there is none."""
    return "–" if value is None else f"{value:.{digits}g}" if abs(value) < 1 else f"{value:,.{digits - 1}f}"
