"""Text form of a program for goldens and dumps: ONNX-like, stable, weights by shape and never by content."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from effc.ir.program import Program

LITERAL_ELEMENTS = 16
"""Constants up to this many elements are part of the text."""


def program_text(program: Program) -> str:
    """The main graph and its functions as text.

    Values are renamed in order of definition (`%0`, `%1`, …) and constants of at most 16 elements are written
    where they are used, so two graphs that differ in names only have the same text; inputs, outputs and weights keep
    their names, which are part of the interface.
    """
    lines = [f"task {program.task}", *_graph_lines(program.graph)]
    return "\n".join(lines) + "\n"


def _graph_lines(graph: ir.Graph, indent: str = "") -> list[str]:
    names = _Names(graph)
    lines = [f"{indent}input {value.name} {_type(value)}" for value in graph.inputs]
    weights = [value for value in graph.initializers.values() if not _is_literal(value)]
    lines += [f"{indent}weight {value.name} {_type(value)}" for value in weights]
    for node in graph:
        lines += _node_lines(node, names, indent)
    lines += [f"{indent}output {value.name} = {names.of(value)} {_type(value)}" for value in graph.outputs]
    return lines


class _Names:
    """Short stable names of inner values."""

    def __init__(self, graph: ir.Graph) -> None:
        self.fixed = {*graph.inputs, *graph.initializers.values()}
        self.given: dict[ir.Value, str] = {}

    def of(self, value: ir.Value | None) -> str:
        if value is None:
            return "_"
        if value in self.fixed:
            return _literal(value) if _is_literal(value) else str(value.name)
        return self.given.setdefault(value, f"%{len(self.given)}")


def _is_literal(value: ir.Value) -> bool:
    """Whether a constant is written where it is used: it has at most 16 elements."""
    tensor = value.const_value
    return tensor is not None and not value.is_graph_input() and tensor.size <= LITERAL_ELEMENTS


def _literal(value: ir.Value) -> str:
    """`[0, -1]` for whole numbers and truth values, `FLOAT 0.5` for the rest."""
    tensor = value.const_value
    assert tensor is not None
    array = tensor.numpy()
    if tensor.dtype not in (ir.DataType.INT64, ir.DataType.BOOL):
        array = array.astype("float32")
    content = repr(array.tolist())
    return content if tensor.dtype in (ir.DataType.INT64, ir.DataType.BOOL) else f"{tensor.dtype.name} {content}"


def _node_lines(node: ir.Node, names: _Names, indent: str) -> list[str]:
    op = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
    inputs = ", ".join(names.of(value) for value in node.inputs)
    outputs = ", ".join(names.of(value) for value in node.outputs)
    simple = [a for a in node.attributes.values() if a.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)]
    attributes = ", ".join(f"{a.name}={_attribute(a)}" for a in sorted(simple, key=lambda a: a.name))
    lines = [f"{indent}{outputs} = {op}({inputs})" + (f" {{{attributes}}}" if attributes else "")]
    for name, subgraph in _subgraphs(node):
        lines += [f"{indent}  {name}:", *_graph_lines(subgraph, indent + "    ")]
    return lines


def _subgraphs(node: ir.Node) -> Iterable[tuple[str, ir.Graph]]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from ((attribute.name, graph) for graph in attribute.as_graphs())


def _attribute(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        if tensor.size <= 16:
            return f"{tensor.dtype.name}{list(tensor.shape)}{tensor.numpy().ravel().tolist()}"
        return f"{tensor.dtype.name}{list(tensor.shape)}"
    value = attribute.value
    return repr(list(value)) if isinstance(value, tuple | list) else repr(value)


def _type(value: ir.Value) -> str:
    dtype = value.dtype.name if value.dtype is not None else "?"
    if value.shape is None:
        return dtype
    return f"{dtype}[{', '.join(str(dim) if isinstance(dim, int) else str(dim.value or '?') for dim in value.shape)}]"
