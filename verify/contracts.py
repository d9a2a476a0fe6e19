"""Measures after each pass what it promised, on inputs that break models, and refuses a broken promise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from effc.errors import ContractError, EffcError
from effc.ir.program import Program
from effc.passes.base import Contract, Pass, PassReport
from effc.passes.instruments import Instrument
from effc.runtime.bundle import Port
from effc.verify.budget import Budget
from effc.verify.compare import OutputDifferences, compare_outputs
from effc.verify.inputs import FeedShape, Interface, cache_shapes, hard_shapes, quick_shapes, within_step
from effc.verify.locate import first_difference
from effc.verify.snapshot import Snapshot
from effc.verify.streaming import DEFAULT_LIMIT
from effc.verify.tolerance import equivalence_tolerance


class ContractCheck(Instrument):
    """Instrument that enforces the contract of every pass.

    `exact`: every output has the same bits. `equivalent`: `max_rel` (see `Difference`) within
    `equivalence_tolerance` of the graph, at the positions that are not padding. `approximate`: within the
    budget, against the program as it was before the first approximate pass, so budgets do not add up over
    passes. A NaN or infinity that the reference does not have breaks every contract.

    Both programs run through `effc.verify.streaming`, so memory stays bounded for any model. The outputs after
    one pass serve as those before the next. Where a pass changes the form of the cache, each program runs on the tokens
    before and then on its own cache, also at lengths past a ring or a page.

    Args:
        shapes: `hard` (several, see `hard_shapes`), `quick` (one small shape, for huge models), or the shapes.
        budget: Limits of approximate passes; without one they are measured and only non-finite values fail.
        seed: Of random inputs.
        limit: Bytes of weights held at once.
    """

    def __init__(
        self,
        shapes: Literal["hard", "quick"] | Sequence[FeedShape] = "hard",
        *,
        budget: Budget | None = None,
        seed: int = 0,
        limit: int = DEFAULT_LIMIT,
    ) -> None:
        self.shapes = shapes
        self.budget = budget or Budget()
        self.seed = seed
        self.limit = limit
        self._latest: tuple[Program, Snapshot] | None = None
        self._reference: Snapshot | None = None
        self._before: Snapshot | None = None

    def before(self, one: Pass, program: Program) -> None:
        """Keep the outputs of the program the pass is about to change."""
        if self._latest is not None and self._latest[0] is program:
            self._before = self._latest[1]
        else:
            self._reference = None
            self._before = Snapshot(program, seed=self.seed, limit=self.limit)
        self._before.require(self._choose(self._before.interface))
        if one.contract == Contract.APPROXIMATE and self._reference is None:
            self._reference = self._before

    def after(self, one: Pass, program: Program, report: PassReport) -> Mapping[str, Any]:
        """Measure and enforce.

        Returns:
            `bitwise`, `max_abs`, `max_rel`, `top1` (and `kl` for approximate passes) over all shapes and outputs;
            `against`: `before` or `first approximate pass`; `shapes`: those that were run; `not_compared`: cache
            outputs whose form the pass changed; `allowed`: the bounds that were enforced.

        Raises:
            ContractError: Names the pass, the shape, the output, and the first inner value that is off.
        """
        before, self._before = self._before, None
        if before is None:
            raise ContractError(f"pass {one.name!r}: its contract cannot be checked, it was not seen before it ran.")
        try:
            after = Snapshot(program, seed=self.seed, limit=self.limit)
        except EffcError as error:
            raise ContractError(f"pass {one.name!r} left a graph that cannot be run: {error}") from error
        self._latest = (program, after)
        approximate = one.contract == Contract.APPROXIMATE
        reference = (self._reference or before) if approximate else before
        verdict = self._measure(one, reference, after)
        if one.contract == Contract.EXACT:
            return _enforce_exact(one, verdict)
        if approximate:
            return _enforce_budget(one, verdict, self.budget)
        return _enforce_equivalent(one, verdict)

    def _measure(self, one: Pass, reference: Snapshot, after: Snapshot) -> _Verdict:
        shapes = self._choose(reference.interface)
        if _another_cache(reference.interface, after.interface):
            # No past fits both: each program makes its own, of the same tokens.
            wider = (*shapes, *cache_shapes(after.interface)) if isinstance(self.shapes, str) else shapes
            shapes = _with_own_pasts(wider)
        shapes = within_step(shapes, after.interface)
        reference.require(shapes)
        try:
            after.require(shapes)
        except EffcError as error:
            raise ContractError(f"pass {one.name!r} left a graph that cannot be run: {error}") from error
        kl = one.contract == Contract.APPROXIMATE
        differences = {shape: _compare(one, reference, after, shape, kl) for shape in shapes}
        return _Verdict(reference, after, differences)

    def _choose(self, interface: Interface) -> tuple[FeedShape, ...]:
        if isinstance(self.shapes, str):
            shapes = hard_shapes(interface) if self.shapes == "hard" else quick_shapes(interface)
        else:
            shapes = tuple(self.shapes)
        shapes = within_step(shapes, interface)
        return _with_own_pasts(shapes) if interface.numbers_tokens else shapes


@dataclass(frozen=True)
class _Verdict:
    """Two programs and how far they are apart at each shape."""

    reference: Snapshot
    after: Snapshot
    differences: Mapping[FeedShape, OutputDifferences]

    def figures(self) -> dict[str, Any]:
        """What goes into the pass record."""
        merged = OutputDifferences.merge(self.differences.values())
        figures = {**merged.to_json(), "shapes": [str(shape) for shape in self.differences]}
        if merged.not_compared:
            figures["not_compared"] = list(merged.not_compared)
        return figures

    def worst(self, tolerance: float) -> tuple[FeedShape, str]:
        """Shape and output to show: one that breaks the tolerance, without padding if possible, the worst of those."""

        def rank(item: tuple[FeedShape, str]) -> tuple[bool, bool, float]:
            difference = self.differences[item[0]].by_output[item[1]]
            broken = difference.max_rel > tolerance or (tolerance == 0 and not difference.bitwise)
            return not broken, item[0].padded, -difference.max_rel

        pairs = [(shape, name) for shape, found in self.differences.items() for name in found.by_output]
        return min(pairs, key=rank)

    def story(self, one: Pass, problem: str, tolerance: float) -> str:
        """The message of a broken contract."""
        shape, name = self.worst(tolerance)
        difference = self.differences[shape].by_output[name]
        lines = [
            f"pass {one.name!r} breaks its contract ({one.contract}): {problem}.",
            f"  Worst: output {name!r} at {shape}: max_abs {difference.max_abs:.3g}, max_rel {difference.max_rel:.3g}"
            + (f", {difference.mismatched} elements NaN or infinite on one side only" if difference.mismatched else ""),
        ]
        place = first_difference(self.reference, self.after, shape, tolerance)
        lines.append(f"  First value that is off: {place}." if place else "  No inner value with a common name is off.")
        lines.append("  Leave this pass out, or report it with the model's configuration.")
        return "\n".join(lines)


def _with_own_pasts(shapes: Sequence[FeedShape]) -> tuple[FeedShape, ...]:
    return tuple(dict.fromkeys(replace(shape, own_past=shape.past > 0) for shape in shapes))


def _another_cache(before: Interface, after: Interface) -> bool:
    """Whether the cache inputs differ; one that is only not carried on any more is the same."""
    names = before.cache | after.cache
    return replace(before, cache=names).cache_form() != replace(after, cache=names).cache_form()


def _compare(one: Pass, reference: Snapshot, after: Snapshot, shape: FeedShape, kl: bool) -> OutputDifferences:
    found = compare_outputs(reference.at(shape), after.at(shape), shape, reference.mask(shape), kl=kl)
    missing = [*found.missing, *(name for name in found.not_compared if _is_lost(name, reference, after))]
    if missing:
        raise ContractError(
            f"pass {one.name!r} breaks its contract ({one.contract}) at {shape}: the outputs {', '.join(missing)} are "
            "gone or have another shape or dtype."
        )
    return found


def _is_lost(output: str, reference: Snapshot, after: Snapshot) -> bool:
    """Whether a cache output differs although its input is what it was: then it is an error, not another form."""
    inputs = {"past_key_values." + output.removeprefix("present."), "past." + output.removeprefix("present.")}

    def form(snapshot: Snapshot) -> list[Port]:
        return [port for port in snapshot.interface.inputs if port.name in inputs]

    return bool(form(after)) and form(reference) == form(after)


def _enforce_exact(one: Pass, verdict: _Verdict) -> dict[str, Any]:
    figures = verdict.figures()
    if not figures["bitwise"]:
        raise ContractError(verdict.story(one, "the bits of the outputs changed", 0.0))
    return {**figures, "against": "before", "allowed": {"bitwise": True}}


def _enforce_equivalent(one: Pass, verdict: _Verdict) -> dict[str, Any]:
    figures = verdict.figures()
    allowed = max(equivalence_tolerance(side.model.graph).max_rel for side in (verdict.reference, verdict.after))
    if figures["max_rel"] is None or figures["max_rel"] > allowed:
        raise ContractError(verdict.story(one, f"outputs differ by more than rounding, max_rel {allowed:.3g}", allowed))
    return {**figures, "against": "before", "allowed": {"max_rel": allowed}}


def _enforce_budget(one: Pass, verdict: _Verdict, budget: Budget) -> dict[str, Any]:
    figures = verdict.figures()
    problems = budget.broken(figures)
    if figures.get("mismatched"):
        problems.insert(0, "outputs are NaN or infinite where the reference is not")
    if problems:
        raise ContractError(verdict.story(one, "; ".join(problems), budget.max_rel or 0.1))
    return {**figures, "against": "first approximate pass", "allowed": budget.to_json()}
