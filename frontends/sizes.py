"""Names of symbolic sizes: the exporter's `s10`, `s15 + s70` become `batch`, `total`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import onnx_ir as ir

BATCH, SEQ, PAST, TOTAL = "batch", "seq", "past", "total"
_SYMBOL = re.compile(r"[A-Za-z_]\w*")


def name_sizes(graph: ir.Graph, names: Iterable[Mapping[int, str]]) -> None:
    """Rename every symbolic size in the graph by the names the inputs' axes get.

    Args:
        graph: Edited in place: the shape of every value.
        names: For each graph input, axis -> name.
    """
    renamed: dict[str, str] = {}
    for value, axes in zip(graph.inputs, names, strict=True):
        assert value.shape is not None
        for axis, name in axes.items():
            dim = value.shape[axis]
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                renamed.setdefault(dim.value, name)
    for value, axes in zip(graph.inputs, names, strict=True):
        assert value.shape is not None
        value.shape = ir.Shape([axes.get(axis, _rename(dim, renamed)) for axis, dim in enumerate(value.shape)])
    inputs = set(graph.inputs)
    for node in graph.all_nodes():
        for output in node.outputs:
            if output.shape is not None and output not in inputs:
                output.shape = ir.Shape([_rename(dim, renamed) for dim in output.shape])


def _rename(dim: int | ir.SymbolicDim, renamed: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    if dim.value is None:
        return None
    text = _SYMBOL.sub(lambda match: renamed.get(match.group(), match.group()), dim.value)
    return normalise(text)


def normalise(expression: str) -> str:
    """A size expression in one spelling: `past + seq` and `seq + past` are both `total`."""
    terms = [term.strip() for term in expression.split("+")]
    if sorted(terms) == [PAST, SEQ]:
        return TOTAL
    if PAST in terms and SEQ in terms and all(re.fullmatch(r"\w+", term) for term in terms):
        terms.remove(PAST)
        terms.remove(SEQ)
        terms.insert(0, TOTAL)
        return " + ".join(terms)
    return expression
