"""Residual blocks, from the dominators of the main output.

From the value the residual stream starts with (the token embedding, the patch embedding) every path to the
output runs through the residual sums: they dominate it (Cooper, Harvey and Kennedy, "A Simple, Fast Dominance
Algorithm", 2001, in networkx).
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
import onnx_ir as ir

from effc.ir.analysis.graph_view import graph_view
from effc.ir.analysis.layer_names import layer_of
from effc.ir.rewrite.dataflow import is_op, producer, sole_consumer
from effc.ir.rewrite.sizes import same_shape, shape_of


@dataclass(frozen=True)
class ResidualBlock:
    """What lies between two sums of the residual stream.

    Attributes:
        name: Its kind and layer, for reports only.
        kind: `attention`, `feed-forward` or `other`.
        entry: The stream before the block.
        exit: The sum after it.
        add: The node of that sum.
        nodes: Nodes between entry and exit that depend on the stream, in graph order, the sum included.
    """

    name: str
    kind: str
    entry: ir.Value
    exit: ir.Value
    add: ir.Node
    nodes: tuple[ir.Node, ...]


def residual_blocks(graph: ir.Graph) -> tuple[ResidualBlock, ...]:
    """The residual blocks of a graph from the input on; empty when it has no residual stream."""
    view = graph_view(graph)
    start, end = _start(graph), graph.outputs[0].producer() if graph.outputs else None
    if start is None or end is None or not nx.has_path(view, start, end):
        return ()
    order = {node: index for index, node in enumerate(graph)}
    chain = _dominators(view, start, end)
    blocks: list[ResidualBlock] = []
    for add in (node for node in chain if is_op(node, "Add")):
        entry = next((value for value in _terms(add) if value.producer() in chain and _is_stream(value, add)), None)
        if entry is not None:
            nodes = _between(view, entry, add, order)
            if len(nodes) == 1:
                continue  # what is added does not depend on the stream: position embeddings
            kind = _kind(nodes)
            name = f"{kind} {layer_of(add) or len(blocks)}"
            blocks.append(ResidualBlock(name, kind, entry, add.outputs[0], add, nodes))
    return tuple(blocks)


def _terms(add: ir.Node) -> list[ir.Value]:
    """What is summed: the operands, those of inner sums included (attention and feed-forward side by side)."""
    terms: list[ir.Value] = []
    for value in add.inputs:
        if value is not None:
            terms.append(value)
            inner = sole_consumer(value) is add and producer(value, "Add")
            terms += _terms(inner) if inner else []
    return terms


def _start(graph: ir.Graph) -> ir.Node | None:
    """The first node from which floating-point activations flow: a lookup of rows, else what reads a float input."""
    inputs = set(graph.inputs)
    for node in graph:
        dtype = node.outputs[0].dtype
        if is_op(node, "Gather") and node.inputs[1] in inputs and dtype is not None and dtype.is_floating_point():
            return node
    for node in graph:
        value = node.inputs[0] if node.inputs else None
        if value in inputs and value is not None and value.dtype is not None and value.dtype.is_floating_point():
            return node
    return None


def _dominators(view: nx.DiGraph, start: ir.Node, end: ir.Node) -> list[ir.Node]:
    """The nodes on every path from start to end, in order."""
    immediate = nx.immediate_dominators(view, start)
    chain = [end]
    while chain[-1] is not start and immediate.get(chain[-1]) not in (None, chain[-1]):
        chain.append(immediate[chain[-1]])
    return list(reversed(chain))


def _is_stream(value: ir.Value, add: ir.Node) -> bool:
    shape, wanted = shape_of(value), shape_of(add.outputs[0])
    return shape is not None and wanted is not None and same_shape(shape, wanted)


def _between(view: nx.DiGraph, entry: ir.Value, add: ir.Node, order: dict[ir.Node, int]) -> tuple[ir.Node, ...]:
    before = entry.producer()
    after = nx.descendants(view, before)
    inside = (nx.ancestors(view, add) & after) | {add}
    return tuple(sorted(inside, key=order.__getitem__))


def _kind(nodes: tuple[ir.Node, ...]) -> str:
    types = {node.op_type for node in nodes}
    if types & {"Attention", "CachedAttention", "GroupQueryAttention", "MultiHeadAttention", "Softmax"}:
        return "attention"
    return "feed-forward" if types & {"MatMul", "Gemm", "CodedMatMul"} else "other"
