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
    renamed = _new_names(graph, names := list(names))
    for value, axes in zip(graph.inputs, names, strict=True):
        if value.shape is None:
            continue
        value.shape = ir.Shape([axes.get(axis, _rename(dim, renamed)) for axis, dim in enumerate(value.shape)])
    for node in graph.all_nodes():
        for output in node.outputs:
            if output.shape is not None:
                output.shape = ir.Shape([_rename(dim, renamed) for dim in output.shape])


def _new_names(graph: ir.Graph, names: list[Mapping[int, str]]) -> dict[str, str | None]:
    """Old symbol -> name; None for a symbol that stands for two different sizes, which then become unknown."""
    renamed: dict[str, str | None] = {}
    for value, axes in zip(graph.inputs, names, strict=True):
        for axis, name in axes.items():
            dim = value.shape[axis] if value.shape is not None else 0
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                renamed[dim.value] = name if renamed.get(dim.value, name) == name else None
    return renamed


def _rename(dim: int | ir.SymbolicDim, renamed: Mapping[str, str | None]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    if dim.value is None or any(renamed.get(symbol, symbol) is None for symbol in _SYMBOL.findall(dim.value)):
        return None
    text = _SYMBOL.sub(lambda match: str(renamed.get(match.group(), match.group())), dim.value)
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
