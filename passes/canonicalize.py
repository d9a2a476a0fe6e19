"""`canonicalize`: one spelling for everything the other passes look for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from onnx_ir.passes.common import (
    InlinePass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    RemoveInitializersFromInputsPass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedOpsetsPass,
)

from effc.ir.program import OPSET, Program
from effc.passes.base import Contract, LeftAlone, Match, Pass, PassReport, Site
from effc.passes.canonical.raising import NOT_ASKED_FOR, Raised, raise_operations
from effc.passes.canonical.simplify import simplify
from effc.passes.canonical.size_names import join_sizes, split_sizes


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Bring the graph into canonical form: simplified, and one operation for each thing that has many spellings.

    Constants are folded (never growing the file), shape arithmetic is shortened, dead, redundant and equal nodes go.
    Then attention, RMS and layer normalization, rotary embedding and GELU are raised by dataflow:

        %s = MatMul(%q, Transpose(%k))                     %y, %pk, %pv = Attention(%q, %k, %v, %mask, past_k, past_v)
        %p = Softmax(Add(Div(%s, 8.0), %mask))      ->       {scale=0.125}
        %y = MatMul(%p, Expand(%v, …))

    Rows that a mask hides completely give 0, as the standard `Attention` has it; spelled with the lowest float
    instead of -inf they gave the mean of all values before, and with -inf NaN.
    """

    name: ClassVar[str] = "canonicalize"
    contract: ClassVar[Contract] = Contract.EQUIVALENT

    def match(self, program: Program) -> Match:
        """List what would be raised, found on a copy of the graph."""
        raised = _canonical(program.clone())
        return Match(sites=[Site(name) for name in raised.rewritten], left=raised.left)

    def apply(self, program: Program, sites: Sequence[Site]) -> PassReport:
        """Simplify the graph, and raise the given sites."""
        before = len(program.graph)
        raised = _canonical(program, {site.name for site in sites})
        left = [item for item in raised.left if item.reason == NOT_ASKED_FOR]
        return PassReport(raised.rewritten, left, {"nodes_before": before, "nodes_after": len(program.graph)})


OLDEST_OPSET = 18
"""Opset from which shapes, reductions and splits are spelled as the simplifications read and write them."""


def _canonical(program: Program, names: set[str] | None = None) -> Raised:
    model = program.model
    opset = model.graph.opset_imports.get("", OPSET)
    if opset < OLDEST_OPSET:
        reason = f"the model is at opset {opset}, and is read from {OLDEST_OPSET} on: convert or export it again"
        return Raised(left=[LeftAlone("graph", reason)])
    for step in (
        InlinePass(),
        RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        RemoveInitializersFromInputsPass(),
    ):
        step(model)
    split_sizes(program)
    simplify(model)
    raised = raise_operations(model, names)
    simplify(model)
    join_sizes(program)
    NameFixPass()(model)
    RemoveUnusedOpsetsPass()(model)
    return raised
