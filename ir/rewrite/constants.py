"""Small constants of a graph: read them, make them. Weights are never read here."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

SMALL_BYTES = 1 << 16
"""Constants up to this size may be read and computed with; anything larger is a weight."""


def constant_array(value: ir.Value | None) -> np.ndarray | None:
    """The content of a small constant, None for anything else."""
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy()


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a small initializer or `Constant` node, None for anything else."""
    if value is None:
        return None
    tensor = value.const_value if value.is_initializer() and not value.is_graph_input() else _constant_node(value)
    return tensor if tensor is not None and tensor.nbytes <= SMALL_BYTES else None


def _constant_node(value: ir.Value) -> ir.TensorProtocol | None:
    node = value.producer()
    return ir.convenience.get_const_tensor(value) if node is not None and node.op_type == "Constant" else None


def scalar(value: ir.Value | None) -> float | None:
    """The number a constant of one element holds, of any rank."""
    array = constant_array(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def integers(value: ir.Value | None) -> tuple[int, ...] | None:
    """The whole numbers in a small integer constant, flattened."""
    array = constant_array(value)
    if array is None or array.dtype.kind not in "iu":
        return None
    return tuple(int(item) for item in array.reshape(-1))


def new_constant(graph: ir.Graph, array: np.ndarray, hint: str = "constant") -> ir.Value:
    """A new initializer with this content and a free name that starts with `hint`."""
    number = len(graph.initializers)
    name = f"{hint}_{number}" if hint == "constant" else hint
    while name in graph.initializers:
        number += 1
        name = f"{hint}_{number}"
    return named_constant(graph, ir.tensor(np.ascontiguousarray(array).reshape(array.shape)), name)


def named_constant(graph: ir.Graph, tensor: ir.TensorProtocol, name: str) -> ir.Value:
    """A new initializer with this tensor and name."""
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def new_integers(graph: ir.Graph, *items: int) -> ir.Value:
    """A new int64 vector."""
    return new_constant(graph, np.array(items, dtype=np.int64))


def new_scalar(graph: ir.Graph, number: float, dtype: ir.DataType) -> ir.Value:
    """A new scalar of this type."""
    return new_constant(graph, np.array(number, dtype=dtype.numpy()))
