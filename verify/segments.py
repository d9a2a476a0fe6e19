"""Cuts a graph into segments whose weights fit a byte limit, for evaluation with bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common

from effc.errors import InputError
from effc.ir.rewrite.dataflow import read_values

NULLARY_RANDOM = frozenset({"RandomNormal", "RandomUniform"})
"""Ops without inputs that still are not constant."""


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes that are run together.

    Attributes:
        nodes: In topological order, with the constant producers they need (casts and transposes of weights),
            which are repeated in every segment that uses them instead of being kept between segments.
        weights: Initializers they read.
        inputs: Names of the values they take from earlier segments or from the feeds.
        outputs: Names of the values that later segments, the graph outputs or an observer need.
        dead: Names of the values no later segment reads.
    """

    nodes: tuple[ir.Node, ...]
    weights: tuple[ir.Value, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dead: tuple[str, ...]


def prepare(model: ir.Model) -> ir.Model:
    """Make a model ready to be cut, in place: every value has a name of its own, gathers read stored weights.

    A Gather of a cast weight becomes a cast of the gathered rows: the same bits, and the whole table is never
    held in two dtypes.
    """
    onnx_ir.passes.common.NameFixPass()(model)
    for node in list(model.graph):
        if node.domain == "" and node.op_type == "Gather":
            _gather_before_cast(model.graph, node)
    return model


def _gather_before_cast(graph: ir.Graph, gather: ir.Node) -> None:
    data, indices = gather.inputs
    cast = data.producer() if data is not None else None
    if cast is None or cast.op_type != "Cast" or cast.domain != "" or cast.graph is not graph:
        return
    stored = cast.inputs[0]
    output = gather.outputs[0]
    if stored is None or not stored.is_initializer() or output.is_graph_output():
        return
    rows = ir.node("Gather", [stored, indices], attributes=gather.attributes)
    rows.outputs[0].name = f"{output.name}.stored"
    widened = ir.node("Cast", [rows.outputs[0]], attributes=cast.attributes)
    graph.insert_before(gather, [rows, widened])
    output.replace_all_uses_with(widened.outputs[0])
    name, output.name = output.name, f"{output.name}.unused"
    widened.outputs[0].name = name
    graph.remove(gather, safe=True)


def plan(graph: ir.Graph, limit: int, *, observe: bool = False) -> list[Segment]:
    """Cut a prepared graph.

    Args:
        graph: A graph made by `prepare`, in topological order.
        limit: Bytes of weights, and of the constants computed from them, a segment may hold. One node with a
            larger weight is a segment of its own.
        observe: Make every value that is not constant an output of its segment.

    Raises:
        InputError: A node reads a value that no earlier node produces.
    """
    planner = _Planner(graph, limit)
    groups = planner.groups()
    return list(_segments(graph, groups, planner.constants, observe))


@dataclass
class _Group:
    """A segment in the making; dicts serve as ordered sets."""

    nodes: dict[ir.Node, None]
    weights: dict[ir.Value, None]
    cost: int = 0


class _Planner:
    """Splits the nodes of a graph by the bytes of constants they need."""

    def __init__(self, graph: ir.Graph, limit: int) -> None:
        self.graph = graph
        self.limit = limit
        self.position = {node: index for index, node in enumerate(graph)}
        self.sizes: dict[ir.Value, int] = {}
        self.constants = self._find_constants()

    def _find_constants(self) -> dict[ir.Value, ir.Node]:
        """Values computed from weights alone, with their producers; checks the order on the way."""
        constants: dict[ir.Value, ir.Node] = {}
        known = {*self.graph.inputs, *self.graph.initializers.values()}
        for node in self.graph:
            used = read_values(node)
            missing = next((value for value in used if value not in known), None)
            if missing is not None:
                raise InputError(
                    f"node {node.name!r} ({node.op_type}) reads {missing.name!r} before it is computed. "
                    "The graph is not in topological order: export the model again."
                )
            known.update(node.outputs)
            fixed = all(value in constants or value.is_initializer() for value in used)
            if fixed and node.op_type not in NULLARY_RANDOM:
                constants.update(dict.fromkeys(node.outputs, node))
        return constants

    def groups(self) -> list[_Group]:
        """Nodes in order, cut before the limit is passed."""
        groups = [_Group({}, {})]
        constant_nodes = set(self.constants.values())
        for node in [*(n for n in self.graph if n not in constant_nodes), *self._constant_outputs()]:
            nodes, weights = self._closure(node)
            added = self._added(groups[-1], nodes, weights)
            if groups[-1].nodes and added and groups[-1].cost + added > self.limit:
                groups.append(_Group({}, {}))
                added = self._added(groups[-1], nodes, weights)
            groups[-1].cost += added
            groups[-1].nodes.update(nodes)
            groups[-1].weights.update(weights)
        return [group for group in groups if group.nodes]

    def _constant_outputs(self) -> Iterable[ir.Node]:
        """Nodes of graph outputs that are constants."""
        return dict.fromkeys(self.constants[v] for v in self.graph.outputs if v in self.constants)

    def _closure(self, node: ir.Node) -> tuple[dict[ir.Node, None], dict[ir.Value, None]]:
        """A node, the constant producers it needs in topological order, and all their weights."""
        nodes: dict[ir.Node, None] = {node: None}
        weights: dict[ir.Value, None] = {}
        waiting = [node]
        while waiting:
            for value in read_values(waiting.pop()):
                producer = self.constants.get(value)
                if value.is_initializer():
                    weights[value] = None
                elif producer is not None and producer not in nodes:
                    nodes[producer] = None
                    waiting.append(producer)
        return dict.fromkeys(sorted(nodes, key=self.position.__getitem__)), weights

    def _added(self, group: _Group, nodes: Iterable[ir.Node], weights: Iterable[ir.Value]) -> int:
        stored = [value for value in weights if value not in group.weights]
        derived = [value for node in nodes if node not in group.nodes for value in node.outputs]
        return sum(self._bytes(value) for value in [*stored, *derived] if value in self.constants or value in weights)

    def _bytes(self, value: ir.Value) -> int:
        """Bytes of a constant, estimated where its type is not known before it is computed."""
        if value.const_value is not None:
            return value.const_value.nbytes
        bits = value.dtype.bitwidth if value.dtype is not None else 32
        return (self._elements(value) * bits + 7) // 8

    def _elements(self, value: ir.Value) -> int:
        """Elements of a constant; those of its producer's largest input where the shape is not known."""
        if value.const_value is not None:
            return value.const_value.size
        if value.shape is not None and value.shape.is_static():
            return math.prod(value.shape.numpy())
        if value not in self.sizes:
            producer = self.constants.get(value)
            used = read_values(producer) if producer is not None else ()
            self.sizes[value] = max((self._elements(item) for item in used), default=0)
        return self.sizes[value]


def _segments(
    graph: ir.Graph, groups: list[_Group], constants: dict[ir.Value, ir.Node], observe: bool
) -> Iterator[Segment]:
    """Decide what passes between the groups."""
    results = {value.name for value in graph.outputs}
    order = {node: index for index, node in enumerate(graph)}
    last: dict[str, int] = {}
    for index, group in enumerate(groups):
        for value in _entering(group):
            last[str(value.name)] = index
    available = {str(value.name) for value in graph.inputs}
    for index, group in enumerate(groups):
        nodes = tuple(sorted(group.nodes, key=order.__getitem__))
        inputs = tuple(dict.fromkeys(str(value.name) for value in _entering(group)))
        outputs = tuple(
            str(value.name)
            for node in nodes
            for value in node.outputs
            if value.name
            and (value.name in results or (value not in constants and (observe or last.get(value.name, -1) > index)))
        )
        available.update(outputs)
        dead = tuple(name for name in available if name not in results and last.get(name, -1) <= index)
        available.difference_update(dead)
        yield Segment(nodes, tuple(group.weights), inputs, outputs, dead)


def _entering(group: _Group) -> Iterator[ir.Value]:
    inner = {value for node in group.nodes for value in node.outputs}
    for node in group.nodes:
        for value in read_values(node):
            if value not in inner and value not in group.weights:
                yield value
