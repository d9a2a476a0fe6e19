"""Simplification to a fixed point: the part of `canonicalize` that changes no operation, only how it is spelled."""

from __future__ import annotations

import onnx_ir as ir

from effc.ir.program import Program
from effc.ir.rewrite.edit import remove_dead
from effc.ir.rewrite.inference import infer_graph
from effc.passes.canonical.constant_folding import fold_constants
from effc.passes.canonical.duplicates import merge_duplicates
from effc.passes.canonical.redundant_nodes import remove_redundant
from effc.passes.canonical.shape_arithmetic import simplify_shapes
from effc.passes.canonical.size_names import join_sizes, split_sizes

ROUNDS = 12


def simplify_program(program: Program) -> None:
    """Simplify a program whose sizes have their outside names (`total` for `past + seq`)."""
    split_sizes(program)
    simplify(program.model)
    join_sizes(program)


def simplify(model: ir.Model) -> None:
    """Infer types and shapes, fold constants, shorten shape arithmetic, remove what is redundant, equal or dead.

    Runs until nothing changes any more, at most 12 rounds.
    """
    graph = model.graph
    for _ in range(ROUNDS):
        before = len(graph)
        infer_graph(graph)
        merge_duplicates(model)
        changed = fold_constants(graph)
        changed += remove_redundant(graph)
        changed += simplify_shapes(graph)
        remove_dead(graph)
        if not changed and len(graph) == before:
            break
