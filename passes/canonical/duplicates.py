"""Merge what is computed or stored twice: equal nodes, equal small constants, one weight under two names."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, DeduplicateInitializersPass

SCALAR_ELEMENTS = 16


def merge_duplicates(model: ir.Model) -> None:
    """Merge equal nodes and equal constants of at most 16 elements, and initializers that share one tensor."""
    _merge_tied(model.graph)
    _drop_defaults(model.graph)
    DeduplicateInitializersPass(size_limit=SCALAR_ELEMENTS)(model)
    CommonSubexpressionEliminationPass()(model)


def _merge_tied(graph: ir.Graph) -> None:
    """Let initializers that hold the same tensor object be one."""
    first: dict[int, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value.is_graph_output() or value.is_graph_input():
            continue
        kept = first.setdefault(id(tensor), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del graph.initializers[name]


_DEFAULTS = {("Reshape", "allowzero"): 0, ("Shape", "start"): 0, ("LayerNormalization", "axis"): -1}


def _drop_defaults(graph: ir.Graph) -> None:
    """Attributes that say the default are left out, so that equal nodes look equal."""
    for node in graph:
        for (op_type, name), default in _DEFAULTS.items():
            if node.op_type == op_type and name in node.attributes and node.attributes[name].value == default:
                del node.attributes[name]
