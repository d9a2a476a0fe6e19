"""Topological edits: insert nodes before another, replace values, drop what is dead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from effc.ir.rewrite.inference import infer_node


def insert(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
    outputs: int = 1,
) -> ir.Node:
    """A new node in front of `before`, with the types and shapes of its outputs inferred."""
    node = ir.node(op_type, inputs, attributes or {}, domain=domain, num_outputs=outputs)
    graph = before.graph
    assert graph is not None
    graph.insert_before(before, node)
    infer_node(node)
    return node


def insert_value(
    before: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any] | None = None
) -> ir.Value:
    """The only output of a new node in front of `before`."""
    return insert(before, op_type, inputs, attributes).outputs[0]


def replace(old: ir.Value, new: ir.Value, before: ir.Node | None = None) -> None:
    """Let `new` stand wherever `old` is used, graph outputs included; outputs keep their names.

    Args:
        old: The value to be replaced.
        new: Its replacement; it must be defined before every use of `old`.
        before: Where an `Identity` may go when the graph needs one (an input or another output as an output).
    """
    graph = old.graph
    if old.is_graph_output():
        assert graph is not None
        _replace_output(graph, old, new, before)
    old.replace_all_uses_with(new)


def _replace_output(graph: ir.Graph, old: ir.Value, new: ir.Value, before: ir.Node | None) -> None:
    name, anchor = old.name, before or old.producer()
    if new.is_graph_output() or new.is_graph_input() or new.is_initializer():
        assert anchor is not None
        copy = ir.node("Identity", [new])
        graph.insert_before(anchor, copy)
        copy.outputs[0].type, copy.outputs[0].shape = new.type, new.shape
        new = copy.outputs[0]
    old.name = f"{name}.replaced"
    new.name = name
    new.type, new.shape = new.type or old.type, new.shape or old.shape
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new


def remove_dead(graph: ir.Graph) -> int:
    """Remove nodes and initializers that nothing reads. Returns how many nodes went."""
    count = 0
    for node in reversed(graph):
        if all(not output.uses() and not output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
            count += 1
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]
    return count
