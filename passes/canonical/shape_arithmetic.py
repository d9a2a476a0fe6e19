"""Rewrite computed shapes in their shortest form, from one source per symbolic size."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effc.ir.dialect import is_dialect_node
from effc.ir.rewrite import sizes
from effc.ir.rewrite.constants import new_constant, new_integers
from effc.ir.rewrite.dataflow import attribute_int, consumers, is_op
from effc.ir.rewrite.edit import insert_value, replace
from effc.ir.rewrite.inference import content_of, infer_node
from effc.ir.rewrite.sizes import Size, shape_of


def simplify_shapes(graph: ir.Graph) -> int:
    """Make `Reshape` targets constant where they can be, and take all other sizes from one source each."""
    sources = SizeSources(graph)
    count = sum(_constant_target(graph, node) for node in graph if is_op(node, "Reshape"))
    return count + sum(_from_source(sources, node) for node in list(graph))


def _constant_target(graph: ir.Graph, node: ir.Node) -> bool:
    """`Reshape(x, computed)` -> `Reshape(x, constant)`, with 0 for a copied size and -1 for one other symbol."""
    source, target = node.inputs[0], node.inputs[1]
    shape, wanted = shape_of(source), shape_of(node.outputs[0])
    if shape is None or wanted is None or target is None or target.is_initializer():
        return False
    numbers = reshape_target(shape, wanted)
    if numbers is None:
        return False
    node.replace_input_with(1, new_integers(graph, *numbers))
    node.attributes.pop("allowzero", None)
    infer_node(node)
    return True


def reshape_target(shape: tuple[Size, ...], wanted: tuple[Size, ...]) -> tuple[int, ...] | None:
    """Constant second input of the `Reshape` (without `allowzero`) from one shape to another; None if there is none."""
    numbers: list[int] = []
    for index, size in enumerate(wanted):
        if isinstance(size, int) and size > 0:
            numbers.append(size)
        elif index < len(shape) and sizes.same(size, shape[index]):
            numbers.append(0)
        else:
            numbers.append(-1)
    return tuple(numbers) if numbers.count(-1) <= 1 and 0 not in wanted else None


class SizeSources:
    """Where each symbolic size of a graph is read: one `Shape` node per size, at the top of the graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.dims: dict[str, tuple[ir.Value, int]] = {}
        self.vectors: dict[str, ir.Value] = {}
        self.scalars: dict[str, ir.Value] = {}
        # The axes of a cache that an op of ours reads are capacities: they say nothing about a step.
        for value in (value for value in graph.inputs if not any(is_dialect_node(use.node) for use in value.uses())):
            for axis, size in enumerate(shape_of(value) or ()):
                if isinstance(size, ir.SymbolicDim) and size.value is not None:
                    self.dims.setdefault(size.value, (value, axis))
        for node in [node for node in graph if is_op(node, "Shape", "Squeeze")]:
            self._adopt(node)

    def _adopt(self, node: ir.Node) -> None:
        """Use a node that already is the source of a size; it moves to the top."""
        output = node.outputs[0]
        content = content_of(output)
        size = content[0] if content is not None and len(content) == 1 else None
        if not isinstance(size, ir.SymbolicDim) or size.value is None or size.value not in self.dims:
            return
        known = self.vectors if is_op(node, "Shape") else self.scalars
        value, axis = self.dims[size.value]
        if is_op(node, "Shape"):
            fits = node.inputs[0] is value and attribute_int(node, "start", 0) == axis
        else:
            fits = node.inputs[0] is self.vectors.get(size.value) and len(node.inputs) == 2
        if not fits or size.value in known or output.is_graph_output():
            return
        known[size.value] = output
        self.graph.remove(node)
        vector = self.vectors[size.value].producer()
        if node is vector or vector is None:
            self._put_first(node)
        else:
            self.graph.insert_after(vector, node)

    def knows(self, size: Size) -> bool:
        """Whether some graph input has an axis of this size."""
        return isinstance(size, ir.SymbolicDim) and size.value in self.dims

    def vector(self, size: Size) -> ir.Value:
        """The size as int64[1]."""
        if isinstance(size, int):
            return new_integers(self.graph, size)
        assert size.value is not None
        if size.value not in self.vectors:
            value, axis = self.dims[size.value]
            node = ir.node("Shape", [value], {"start": axis, "end": axis + 1})
            self._put_first(node)
            self.vectors[size.value] = node.outputs[0]
        return self.vectors[size.value]

    def scalar(self, size: Size) -> ir.Value:
        """The size as an int64 scalar."""
        if isinstance(size, int):
            return new_constant(self.graph, np.array(size, dtype=np.int64))
        assert size.value is not None
        if size.value not in self.scalars:
            vector = self.vector(size)
            node = ir.node("Squeeze", [vector, new_integers(self.graph, 0)])
            producer = vector.producer()
            assert producer is not None
            self.graph.insert_after(producer, node)
            infer_node(node)
            self.scalars[size.value] = node.outputs[0]
        return self.scalars[size.value]

    def _put_first(self, node: ir.Node) -> None:
        first = next(iter(self.graph), None)
        if first is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(first, node)
        infer_node(node)


def _from_source(sources: SizeSources, node: ir.Node) -> bool:
    """Replace a computed size (or vector of sizes) by its source."""
    if len(node.outputs) != 1 or not node.outputs[0].uses() or node.outputs[0].is_graph_output():
        return False
    output = node.outputs[0]
    content, shape = content_of(output), shape_of(output)
    if content is None or shape is None or len(shape) > 1 or output.dtype != ir.DataType.INT64:
        return False
    if not any(sources.knows(size) for size in content) or not all(
        isinstance(s, int) or sources.knows(s) for s in content
    ):
        return False
    if output in sources.vectors.values() or output in sources.scalars.values():
        return False
    if len(content) > 1 and (is_op(node, "Concat") and _is_short_concat(node, sources)):
        return False
    new = _rebuilt(sources, node, content, len(shape))
    if new is output:
        return False
    replace(output, new)
    return True


def _is_short_concat(node: ir.Node, sources: SizeSources) -> bool:
    return all(v is not None and (v.is_initializer() or v in sources.vectors.values()) for v in node.inputs)


def _rebuilt(sources: SizeSources, node: ir.Node, content: tuple[Size, ...], rank: int) -> ir.Value:
    if rank == 0:
        return sources.scalar(content[0])
    if len(content) == 1:
        return sources.vector(content[0])
    if (
        is_op(node, "Shape")
        and not attribute_int(node, "start", 0)
        and "end" not in node.attributes
        and _is_input(node)
    ):
        return node.outputs[0]
    parts: list[ir.Value] = []
    numbers: list[int] = []
    for size in (*content, None):
        if isinstance(size, int):
            numbers.append(size)
            continue
        if numbers:
            parts.append(new_integers(sources.graph, *numbers))
            numbers = []
        if size is not None:
            parts.append(sources.vector(size))
    return insert_value(node, "Concat", parts, {"axis": 0})


def _is_input(node: ir.Node) -> bool:
    return node.inputs[0] is not None and node.inputs[0].is_graph_input() and bool(consumers(node.outputs[0]))
