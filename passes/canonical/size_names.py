"""Keep the relation `total = past + seq` while sizes are computed with, and its short name outside."""

from __future__ import annotations

import onnx_ir as ir

from effc.ir.program import Program, Task
from effc.ir.rewrite import sizes

TOTAL, SUM = "total", "past + seq"


def split_sizes(program: Program) -> None:
    """Write `total` as `past + seq` in all shapes of a causal language model with a cache."""
    inputs = {
        size.value for value in program.graph.inputs for size in value.shape or () if isinstance(size, ir.SymbolicDim)
    }
    if program.task is Task.CAUSAL_LM and {TOTAL, "past", "seq"} <= inputs:
        _rename(program.graph, TOTAL, ir.SymbolicDim(SUM))


def join_sizes(program: Program) -> None:
    """Write `past + seq` as `total` again."""
    for value in _values(program.graph):
        if value.shape is not None and any(size == SUM for size in value.shape):
            value.shape = ir.Shape([TOTAL if size == SUM else size for size in value.shape])


def _rename(graph: ir.Graph, symbol: str, replacement: ir.SymbolicDim) -> None:
    for value in _values(graph):
        if value.shape is not None and any(isinstance(size, ir.SymbolicDim) for size in value.shape):
            value.shape = ir.Shape([_renamed(size, symbol, replacement) for size in value.shape])


def _renamed(size: sizes.Size, symbol: str, replacement: ir.SymbolicDim) -> sizes.Size:
    """The size with the symbol replaced; the pages of a cache keep their name, nothing is computed with them."""
    if isinstance(size, ir.SymbolicDim) and "//" in (size.value or ""):
        return size
    return sizes.substitute(sizes.normal(size), symbol, replacement)


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(output for node in graph for output in node.outputs)]
