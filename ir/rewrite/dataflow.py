"""Single steps along the edges of a graph, each with the checks that make it safe to take."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from effc.ir.rewrite.constants import scalar

STANDARD = ("", "ai.onnx")


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether the node is one of these standard ONNX operations."""
    return node is not None and node.domain in STANDARD and node.op_type in op_types


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that computes the value, if it is one of these standard operations and this is its first output."""
    if value is None:
        return None
    node = value.producer()
    return node if is_op(node, *op_types) and value.index() == 0 else None


def consumers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read the value, each once."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """The only node that reads the value, at one input; None when it is read elsewhere or is an output."""
    uses = value.uses()
    return next(iter(uses)).node if len(uses) == 1 and not value.is_graph_output() else None


def attribute_int(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute, or its default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def attribute_float(node: ir.Node, name: str, default: float) -> float:
    """A float attribute, or its default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def permutation(node: ir.Node) -> tuple[int, ...] | None:
    """The permutation of a `Transpose`; None when it is implied and the rank unknown."""
    attribute = node.attributes.get("perm")
    if attribute is not None:
        return tuple(attribute.as_ints())
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return None if shape is None else tuple(reversed(range(len(shape))))


def operands(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Both ways to see a commutative node: (one operand, the other)."""
    first, second = node.inputs[0], node.inputs[1]
    if first is not None and second is not None:
        yield first, second
        yield second, first


def scaled(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """`(x, c)` when the value is `x * c` or `x / c` with a constant number c (returned as a factor)."""
    node = producer(value, "Mul", "Div")
    if node is None:
        return None
    if node.op_type == "Div":
        divisor = scalar(node.inputs[1])
        return None if not divisor or node.inputs[0] is None else (node.inputs[0], 1.0 / divisor)
    for operand, other in operands(node):
        factor = scalar(other)
        if factor is not None and _keeps_rank(operand, other):
            return operand, factor
    return None


def shifted(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """`(x, c)` when the value is `x + c` with a constant number c."""
    node = producer(value, "Add")
    if node is None:
        return None
    for operand, other in operands(node):
        shift = scalar(other)
        if shift is not None and _keeps_rank(operand, other):
            return operand, shift
    return None


def _keeps_rank(operand: ir.Value, number: ir.Value) -> bool:
    rank = len(number.shape) if number.shape is not None else 0
    return rank == 0 or (operand.shape is not None and len(operand.shape) >= rank)


def skip_casts(value: ir.Value | None) -> ir.Value | None:
    """The value before any chain of `Cast`s."""
    while (node := producer(value, "Cast")) is not None:
        value = node.inputs[0]
    return value


def read_values(node: ir.Node) -> list[ir.Value]:
    """The values a node reads, those its subgraphs take from outside included, each once."""
    values = dict.fromkeys(value for value in node.inputs if value is not None)
    for subgraph in subgraphs(node):
        inside: set[ir.Value] = {*subgraph.inputs, *subgraph.initializers.values()}
        for inner in subgraph:
            inside.update(inner.outputs)
            values.update(dict.fromkeys(value for value in read_values(inner) if value not in inside))
        values.update(dict.fromkeys(value for value in subgraph.outputs if value not in inside))
    return list(values)


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs in the attributes of a node (`If`, `Loop`, `Scan`)."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found
