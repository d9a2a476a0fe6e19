"""Type and symbolic shape inference that keeps relations between sizes, and never reads a weight.

Each value gets its element type and shape; small integer values also get their *content* as sizes
(`Shape(x)` of `x[batch, seq]` has content `(batch, seq)`), from which the shapes made by `Reshape`, `Expand`,
`Slice` and `Range` follow. Operations without a rule here are inferred one node at a time by the `onnx`
package; what neither knows keeps the type and shape it had.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir

from effc.ir.rewrite import sizes
from effc.ir.rewrite.constants import constant_array, integers
from effc.ir.rewrite.sizes import Size

CONTENT = "effc.content"
CONTENT_LIMIT = 32
"""Integer values up to this many elements have their content tracked."""


def infer_graph(graph: ir.Graph) -> None:
    """Infer every node of the graph, in order."""
    for value in graph.initializers.values():
        if value.const_value is not None:
            value.shape = value.shape or ir.Shape(value.const_value.shape.numpy())
            value.type = value.type or ir.TensorType(value.const_value.dtype)
    for node in graph:
        infer_node(node)


def infer_node(node: ir.Node) -> None:
    """Set types, shapes and contents of the outputs of one node from those of its inputs."""
    from effc.ir.rewrite.content_rules import CONTENT_RULES
    from effc.ir.rewrite.shape_rules import SHAPE_RULES

    standard = node.domain in ("", "ai.onnx")
    rule = SHAPE_RULES.get(node.op_type) if standard else None
    if rule is None or not rule(node):
        _infer_with_onnx(node)
    content_rule = CONTENT_RULES.get(node.op_type) if standard else None
    if content_rule is not None:
        content = content_rule(node)
        if content is not None and len(content) <= CONTENT_LIMIT:
            node.outputs[0].meta[CONTENT] = tuple(sizes.normal(size) for size in content)


def content_of(value: ir.Value | None) -> tuple[Size, ...] | None:
    """The elements of a small integer value as sizes, flattened; None when they are not tracked."""
    if value is None:
        return None
    known = value.meta.get(CONTENT)
    if known is not None:
        return known
    if value.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    count = sizes.product(value.shape) if value.shape is not None else sizes.UNKNOWN
    return integers(value) if isinstance(count, int) and count <= CONTENT_LIMIT else None


def known_integers(value: ir.Value | None) -> tuple[int, ...] | None:
    """The elements of a small integer value when all are plain numbers."""
    content = content_of(value)
    if content is None or not all(isinstance(size, int) for size in content):
        return None
    return tuple(size for size in content if isinstance(size, int))


def set_type(value: ir.Value, dtype: ir.DataType | None, shape: Sequence[Size] | None) -> bool:
    """Set element type and shape of a value; a known size is never replaced by an unknown one. Always True."""
    if dtype is not None:
        value.type = ir.TensorType(dtype)
    if shape is not None:
        old = value.shape
        if old is not None and len(old) == len(shape):
            shape = [new if sizes.is_known(new) else before for new, before in zip(shape, old)]
        value.shape = ir.Shape(shape)
    return True


def _infer_with_onnx(node: ir.Node) -> None:
    if not onnx.defs.has(node.op_type, node.domain) or any(v is not None and v.type is None for v in node.inputs):
        return
    names = {value: f"v{index}" for index, value in enumerate(dict.fromkeys(v for v in node.inputs if v is not None))}
    proto = onnx.helper.make_node(
        node.op_type,
        [names[value] if value is not None else "" for value in node.inputs],
        [f"o{index}" for index in range(len(node.outputs))],
        domain=node.domain,
    )
    for attribute in node.attributes.values():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) or attribute.is_ref():
            return
        proto.attribute.append(ir.serde.serialize_attribute(attribute))
    types = {name: _type_proto(value) for value, name in names.items()}
    data = {
        name: onnx.numpy_helper.from_array(array, name)
        for value, name in names.items()
        if (array := constant_array(value)) is not None
    }
    schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=24, domain=node.domain)
    try:
        inferred = onnx.shape_inference.infer_node_outputs(
            schema, proto, types, data, opset_imports=[onnx.helper.make_opsetid(node.domain, 24)]
        )
    except onnx.shape_inference.InferenceError:
        return  # types stay as annotated; the checker reports a graph that is truly ill-typed
    for index, output in enumerate(node.outputs):
        if f"o{index}" in inferred:
            _take_inferred(output, inferred[f"o{index}"])


def _type_proto(value: ir.Value) -> onnx.TypeProto:
    proto = onnx.TypeProto()
    assert value.type is not None
    ir.serde.serialize_type_into(proto, value.type)
    if value.shape is not None:
        ir.serde.serialize_shape_into(proto, value.shape)
    return proto


def _take_inferred(output: ir.Value, proto: onnx.TypeProto) -> None:
    inferred_type = ir.serde.deserialize_type_proto_for_type(proto)
    if not isinstance(inferred_type, ir.TensorType):
        output.type = inferred_type or output.type
        return
    shape = ir.serde.deserialize_type_proto_for_shape(proto)
    set_type(output, inferred_type.dtype, None if shape is None else tuple(sizes.normal(size) for size in shape))
