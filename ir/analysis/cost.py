"""Floating-point operations and bytes of each node, for given sizes, and the critical path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import networkx as nx
import onnx_ir as ir

from effc.errors import UsageError
from effc.ir.analysis.graph_view import graph_view
from effc.ir.rewrite.dataflow import attribute_int
from effc.ir.rewrite.sizes import Size, is_known, normal


@dataclass(frozen=True)
class Cost:
    """What one node costs.

    Attributes:
        flops: Floating-point operations; a fused multiply-add counts two. 0 for data movement.
        read: Bytes of its inputs; a lookup reads only the rows it takes.
        written: Bytes of its outputs; a view (`Reshape`, `Squeeze`, …) writes none.
    """

    flops: int
    read: int
    written: int

    @property
    def bytes(self) -> int:
        """Bytes moved."""
        return self.read + self.written


VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Shape", "Size")
MOVES = (
    *VIEWS,
    "Transpose",
    "Concat",
    "Split",
    "Slice",
    "Gather",
    "Expand",
    "Cast",
    "CodedGather",
    "Constant",
    "Range",
    "Tile",
)
_PER_ELEMENT = {"Gelu": 10, "Softmax": 5, "Sigmoid": 4, "Tanh": 6, "Erf": 8, "Exp": 2, "Sin": 8, "Cos": 8, "Pow": 4}
_NORMS = {"RMSNormalization": 4, "LayerNormalization": 7, "RotaryEmbedding": 3}


def node_costs(graph: ir.Graph, sizes: Mapping[str, int]) -> dict[ir.Node, Cost]:
    """The cost of every node of a graph.

    Args:
        graph: A graph with shapes (canonical graphs have them).
        sizes: Numbers for the symbolic sizes, such as `{"batch": 1, "seq": 1, "past": 512}`; `total` follows
            from past and seq.

    Raises:
        UsageError: A size of the graph has no number.
    """
    bound = dict(sizes)
    if "past" in bound and "seq" in bound:
        bound.setdefault("total", bound["past"] + bound["seq"])
    return {node: node_cost(node, bound) for node in graph}


def node_cost(node: ir.Node, sizes: Mapping[str, int]) -> Cost:
    """The cost of one node; values of unknown shape count nothing."""
    outputs = [_count(value, sizes) for value in node.outputs]
    written = 0 if node.op_type in VIEWS else sum(_bytes(value, count) for value, count in zip(node.outputs, outputs))
    read = 0 if node.op_type in VIEWS else sum(_bytes(v, _count(v, sizes)) for v in node.inputs if v is not None)
    if node.op_type in ("Gather", "CodedGather") and node.inputs:
        read = written
    special = _FLOPS.get(node.op_type)
    if special is not None:
        flops = special(node, sizes)
    elif node.op_type in MOVES or node.outputs[0].dtype is None or not node.outputs[0].dtype.is_floating_point():
        flops = 0
    else:
        flops = outputs[0] * (_PER_ELEMENT.get(node.op_type) or _NORMS.get(node.op_type) or 1)
    return Cost(flops, read, written)


def total_cost(costs: Mapping[ir.Node, Cost]) -> Cost:
    """The sum of all."""
    return Cost(*(sum(getattr(cost, name) for cost in costs.values()) for name in ("flops", "read", "written")))


def critical_path(graph: ir.Graph, weight: Mapping[ir.Node, float]) -> list[ir.Node]:
    """The chain of dependent nodes with the largest sum of weights (seconds, operations or bytes)."""
    view = graph_view(graph)
    for node in view:
        for _, after, edge in view.out_edges(node, data=True):
            edge["weight"] = weight[after]
    source: object = object()
    view.add_edges_from((source, node, {"weight": weight[node]}) for node in list(view) if view.in_degree(node) == 0)
    return [node for node in nx.dag_longest_path(view, weight="weight") if node is not source]


def _count(value: ir.Value, sizes: Mapping[str, int]) -> int:
    if value.shape is None:
        return 0
    count = 1
    for size in value.shape:
        count *= evaluate(normal(size), sizes)
    return count


def evaluate(size: Size, sizes: Mapping[str, int]) -> int:
    """The number a size stands for; 0 when it is unknown.

    Raises:
        UsageError: It has a symbol without a number.
    """
    if isinstance(size, int):
        return size
    if not is_known(size):
        return 0
    if size.value is not None and size.value in sizes:
        return sizes[size.value]
    number = size.evaluate(sizes)
    if not isinstance(number, int):
        missing = ", ".join(sorted(size.free_symbols() - set(sizes)))
        raise UsageError(f"size {size.value!r} has no number: give one for {missing}.")
    return number


def _bytes(value: ir.Value, count: int) -> int:
    return count * value.dtype.bitwidth // 8 if value.dtype is not None else 0


def _matmul(node: ir.Node, sizes: Mapping[str, int]) -> int:
    left = node.inputs[0]
    if left is None or left.shape is None:
        return 0
    inner = left.shape[0] if attribute_int(node, "transA", 0) else left.shape[-1]
    return 2 * _count(node.outputs[0], sizes) * evaluate(normal(inner), sizes)


def _attention(node: ir.Node, sizes: Mapping[str, int]) -> int:
    q, k, v = node.inputs[:3]
    past = node.inputs[4] if len(node.inputs) > 4 else None
    if (
        q is None
        or k is None
        or v is None
        or q.shape is None
        or k.shape is None
        or v.shape is None
        or len(q.shape) != 4
    ):
        return 0
    batch, heads, queries, size = (evaluate(normal(one), sizes) for one in q.shape)
    keys = evaluate(normal(k.shape[2]), sizes)
    if past is not None and past.shape is not None:
        keys += evaluate(normal(past.shape[2]), sizes)
    value_size = evaluate(normal(v.shape[3]), sizes)
    return batch * heads * queries * keys * (2 * size + 5 + 2 * value_size)


def _cached_attention(node: ir.Node, sizes: Mapping[str, int]) -> int:
    query, valid = node.inputs[0], node.inputs[3]
    if query is None or valid is None or query.shape is None or valid.shape is None:
        return 0
    batch, queries = (evaluate(normal(one), sizes) for one in list(query.shape)[:2])
    keys = evaluate(normal(valid.shape[1]), sizes)
    window = attribute_int(node, "window", 0)
    heads, size, value_size = (attribute_int(node, name, 0) for name in ("heads", "head_size", "value_size"))
    return batch * heads * queries * min(keys, window or keys) * (2 * size + 5 + 2 * value_size)


_FLOPS: dict[str, Callable[[ir.Node, Mapping[str, int]], int]] = {
    "MatMul": _matmul,
    "Gemm": _matmul,
    "CodedMatMul": _matmul,
    "Attention": _attention,
    "CachedAttention": _cached_attention,
}
