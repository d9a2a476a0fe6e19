"""onnxruntime's CPU has no bf16 arithmetic: weights that are only cast to fp32 become fp32 initializers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effc.ir.weights import computed_tensor, is_weight, tensor_shape

HALF_TYPES = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


def widen_cast_weights(model: ir.Model) -> int:
    """Replace `Cast(weight, to=FLOAT)` of a bf16 or fp16 initializer by an fp32 initializer, lazily computed.

    Weights that an `effc` op reads in their stored dtype keep it.

    Returns:
        Number of casts removed.
    """
    graph = model.graph
    wide: dict[ir.Value, ir.Value] = {}
    count = 0
    for node in list(graph.all_nodes()):
        source = node.inputs[0] if node.op_type == "Cast" and node.inputs else None
        if source is None or not is_weight(source) or not _widens(node, source):
            continue
        if source not in wide:
            wide[source] = _widened(graph, source)
        node.outputs[0].replace_all_uses_with(wide[source], replace_graph_outputs=True)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
        count += 1
    for source, value in wide.items():
        _widen_lookups(source, value)
        if not source.uses() and source.name in graph.initializers:
            graph.initializers.pop(str(source.name))
    return count


def _widen_lookups(source: ir.Value, wide: ir.Value) -> None:
    """Let row lookups that are cast afterwards read the wide weight too, so that it is stored once."""
    for node in [use.node for use in list(source.uses()) if use.node.op_type == "Gather" and use.idx == 0]:
        rows = node.outputs[0]
        casts = [use.node for use in rows.uses()]
        if rows.is_graph_output() or not all(cast.op_type == "Cast" and _to_float(cast) for cast in casts):
            continue
        node.replace_input_with(0, wide)
        rows.dtype = ir.DataType.FLOAT
        for cast in casts:
            cast.outputs[0].replace_all_uses_with(rows, replace_graph_outputs=True)
            assert cast.graph is not None
            cast.graph.remove(cast, safe=True)


def _to_float(cast: ir.Node) -> bool:
    return cast.attributes["to"].as_int() == ir.DataType.FLOAT


def _widens(node: ir.Node, source: ir.Value) -> bool:
    return source.dtype in HALF_TYPES and _to_float(node)


def _widened(graph: ir.Graph, source: ir.Value) -> ir.Value:
    tensor = source.const_value
    assert tensor is not None
    shape = tensor_shape(tensor)
    name = f"{source.name}.float32"
    value = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(shape),
        const_value=computed_tensor(lambda: tensor.numpy().astype(np.float32), ir.DataType.FLOAT, shape, name),
    )
    graph.register_initializer(value)
    return value
