"""Runs passes in order over a program, with instruments around each, and records what each one did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effc.errors import ContractError, EffcError
from effc.ir.program import PassRecord, Program
from effc.passes.base import Match, Pass, PassReport
from effc.passes.canonicalize import Canonicalize
from effc.passes.instruments import Instrument, Stopwatch
from effc.passes.pipeline_text import format_pass

REASONS_SHOWN = 8


def expand(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes that will run: `canonicalize` first, and before each pass those it requires.

    Where several passes require the same one, it runs once, with the options of the first that wants any.
    """
    full: list[Pass] = []
    present = {one.name for one in passes}
    if Canonicalize.name not in present:
        full.append(Canonicalize())
    for one in passes:
        for required in one.requires():
            if all(required.name != earlier.name for earlier in full):
                full.append(_most_wanted(required, passes))
        full.append(one)
    return tuple(full)


def _most_wanted(required: Pass, passes: Sequence[Pass]) -> Pass:
    """A required pass as the first of all passes wants it that is not content with its defaults."""
    wanted = [other for one in passes for other in one.requires() if other.name == required.name]
    return next((one for one in wanted if one != type(one)()), required)


def run_pipeline(
    program: Program,
    passes: Sequence[Pass],
    instruments: Sequence[Instrument] = (),
    *,
    allow_noop: bool = False,
) -> Program:
    """Run `expand(passes)` over the program, in place.

    Args:
        program: The program; its graph is edited and `records` grows by one record per pass.
        passes: The passes the user asked for.
        instruments: Called around each pass.
        allow_noop: Accept a requested pass that changed nothing.

    Returns:
        The same program.

    Raises:
        ContractError: A requested pass changed nothing (with the reasons), or an instrument found its
            contract broken.
    """
    for one in expand(passes):
        run_step(program, one, instruments, must_change=one in passes and not allow_noop)
    return program


def run_step(program: Program, one: Pass, instruments: Sequence[Instrument] = (), *, must_change: bool = False) -> None:
    """Run one pass over the program, in place, with the instruments around it, and record it.

    Raises:
        ContractError: It changed nothing although it must, or an instrument found its contract broken.
    """
    for instrument in instruments:
        instrument.before(one, program)
    watch = Stopwatch()
    match = one.match(program)
    report = _apply(program, one, match)
    seconds = watch.seconds()
    left = [*match.left, *report.left]
    if must_change and not report.rewritten and one.name != Canonicalize.name:
        raise ContractError(_nothing_done(one, [(item.site, item.reason) for item in left]))
    measured: dict[str, Any] = {}
    for instrument in instruments:
        measured.update(instrument.after(one, program, report))
    program.records.append(
        PassRecord(
            name=one.name,
            options=format_pass(one),
            contract=str(one.contract),
            rewritten=tuple(report.rewritten),
            left=tuple((item.site, item.reason) for item in left),
            details=dict(report.details),
            measured=measured,
            seconds=seconds,
        )
    )


def _apply(program: Program, one: Pass, match: Match) -> PassReport:
    try:
        return one.apply(program, match.sites)
    except EffcError as error:
        raise type(error)(f"pass {one.name!r}: {error}") from error


def _nothing_done(one: Pass, left: Sequence[tuple[str, str]]) -> str:
    lines = [f"pass {one.name!r} changed nothing."]
    lines += [f"  {site}: {reason}" for site, reason in left[:REASONS_SHOWN]]
    if len(left) > REASONS_SHOWN:
        lines.append(f"  … and {len(left) - REASONS_SHOWN} more sites")
    if not left:
        lines.append("  It found no site of its kind in this model.")
    lines.append("Remove the pass, or allow it with --allow-noop.")
    return "\n".join(lines)
