"""Compute at compile time what depends on constants only, as long as the file does not grow by it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from effc.ir.rewrite.constants import constant_tensor, new_constant
from effc.ir.rewrite.dataflow import STANDARD
from effc.ir.rewrite.edit import replace
from effc.ir.rewrite.inference import known_integers

TINY_BYTES = 1 << 10
VECTOR_BYTES = 1 << 16
FOLDED = ".folded"
NEVER = {
    "RandomUniform",
    "RandomNormal",
    "RandomUniformLike",
    "RandomNormalLike",
    "Multinomial",
    "Bernoulli",
    "Identity",
}


def fold_constants(graph: ir.Graph) -> int:
    """Replace nodes whose outputs are constant by initializers. Returns how many nodes were folded.

    A result is kept when it is at most 1 KiB, not larger than the constants it came from, or a single vector of at
    most 64 KiB (the `1 + w` of a normalization). A `Cast` or `Transpose` of a matrix is never folded: it is a weight.
    """
    count = 0
    for node in graph:
        if node.domain in STANDARD and node.op_type not in NEVER and _fold(graph, node):
            count += 1
    return count


def _fold(graph: ir.Graph, node: ir.Node) -> bool:
    arrays = _integer_result(node) or _evaluated(node)
    if arrays is None:
        return False
    for output, array in zip(node.outputs, arrays):
        if output.uses() or output.is_graph_output():
            constant = new_constant(graph, array, _name(node))
            constant.type = output.type or constant.type
            replace(output, constant, before=node)
    if any(output.is_graph_output() for output in node.outputs):
        return False
    graph.remove(node, safe=True)
    return True


def _name(node: ir.Node) -> str:
    """Named after the one vector or matrix the result is made of, so that reports still name its layer."""
    named = [value.name for value in node.inputs if value is not None and value.shape is not None and len(value.shape)]
    if len(named) != 1 or not named[0] or named[0].startswith("constant"):
        return "constant"
    return f"{named[0].removesuffix(FOLDED)}{FOLDED}"


def _integer_result(node: ir.Node) -> list[np.ndarray] | None:
    """The result of shape arithmetic whose sizes are all plain numbers."""
    output = node.outputs[0]
    numbers = known_integers(output) if len(node.outputs) == 1 else None
    if (
        numbers is None
        or output.shape is None
        or output.dtype is None
        or not all(isinstance(s, int) for s in output.shape)
    ):
        return None
    array = np.array(numbers, dtype=output.dtype.numpy())
    shape = tuple(int(size) for size in output.shape if isinstance(size, int))
    return [array.reshape(shape)] if array.size == int(np.prod(shape, dtype=np.int64)) else None


def _evaluated(node: ir.Node) -> list[np.ndarray] | None:
    if any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    ):
        return None
    if node.op_type in ("Cast", "Transpose") and len(node.inputs[0].shape or ()) > 1:  # type: ignore[union-attr]
        return None
    tensors = [constant_tensor(value) for value in node.inputs if value is not None]
    if any(tensor is None for tensor in tensors) or not _result_is_small(node):
        return None
    arrays = evaluate(node)
    read = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    written = sum(array.nbytes for array in arrays)
    vector = all(array.ndim <= 1 for array in arrays) and written <= VECTOR_BYTES
    return arrays if written <= max(read, TINY_BYTES) or vector else None


def _result_is_small(node: ir.Node) -> bool:
    """Whether the inferred result is worth computing: known and at most 64 KiB."""
    for output in node.outputs:
        if output.shape is None or output.dtype is None or not all(isinstance(size, int) for size in output.shape):
            return False
        if int(np.prod(output.shape.numpy(), dtype=np.int64)) * output.dtype.bitwidth // 8 > VECTOR_BYTES:
            return False
    return True


def evaluate(node: ir.Node, known: Mapping[ir.Value, np.ndarray] = MappingProxyType({})) -> list[np.ndarray]:
    """Outputs of a node of standard ops whose inputs are all known, or small constants."""
    names: dict[ir.Value, str] = {
        value: f"v{i}" for i, value in enumerate(dict.fromkeys(v for v in node.inputs if v is not None))
    }
    outputs = [f"o{index}" for index in range(len(node.outputs))]
    inputs = [names[value] if value is not None else "" for value in node.inputs]
    proto = onnx.helper.make_node(node.op_type, inputs, outputs, domain=node.domain)
    proto.attribute.extend(ir.serde.serialize_attribute(attribute) for attribute in node.attributes.values())
    anything = onnx.TypeProto()
    graph = onnx.helper.make_graph(
        [proto],
        "fold",
        [onnx.helper.make_value_info(name, anything) for name in names.values()],
        [onnx.helper.make_value_info(name, anything) for name in outputs],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
    feeds = {name: known[value] for value, name in names.items() if value in known}
    for value, name in names.items():
        if name not in feeds and (tensor := constant_tensor(value)) is not None:
            feeds[name] = tensor.numpy()
    with np.errstate(all="ignore"):  # overflow to infinity is what the graph says
        return [np.asarray(array) for array in ReferenceEvaluator(model).run(None, feeds)]
