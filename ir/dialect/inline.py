"""Puts the reference bodies of dialect ops in their place, for targets without our kernels."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.tape import Tape

from effc.ir.dialect import dialect_op, is_dialect_node
from effc.ir.dialect.base import DOMAIN
from effc.ir.weights import tensor_shape


def inline_dialect(model: ir.Model, wanted: Callable[[ir.Node], bool] = is_dialect_node) -> int:
    """Replace dialect nodes by their reference bodies; equal constants become one initializer.

    Args:
        model: Its main graph and subgraphs are edited.
        wanted: Which of its nodes; all of the dialect.

    Returns:
        Number of nodes replaced.

    Raises:
        InputError: A node has a form without a body.
    """
    shared: dict[tuple[str, bytes, tuple[int, ...]], ir.Value] = {}
    count = 0
    for node in list(model.graph.all_nodes()):
        if not is_dialect_node(node) or not wanted(node):
            continue
        tape = Tape()
        results = dialect_op(node.op_type).body(node, tape)
        assert node.graph is not None
        ir.convenience.replace_nodes_and_values(
            node.graph, node, [node], list(tape.nodes), list(node.outputs), list(results)
        )
        for new in tape.nodes:
            if new.op_type == "Constant":
                _share_constant(model.graph, new, shared)
        count += 1
    if not any(is_dialect_node(node) for node in model.graph.all_nodes()):
        model.opset_imports.pop(DOMAIN, None)
    return count


def _share_constant(graph: ir.Graph, node: ir.Node, shared: dict[tuple[str, bytes, tuple[int, ...]], ir.Value]) -> None:
    tensor = node.attributes["value"].as_tensor()
    key = (tensor.dtype.name, tensor.tobytes(), tensor_shape(tensor))
    if key not in shared:
        value = ir.Value(
            name=f"effc.constant.{len(shared)}",
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(key[2]),
            const_value=tensor,
        )
        graph.register_initializer(value)
        shared[key] = value
    node.outputs[0].replace_all_uses_with(shared[key])
    assert node.graph is not None
    node.graph.remove(node, safe=True)
