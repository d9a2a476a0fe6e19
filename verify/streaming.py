"""Evaluates a graph of any size with bounded memory: segment by segment, each in a session of its own."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from effc.errors import InputError, MissingDependencyError
from effc.ir.dialect import is_dialect_node
from effc.ir.dialect.cached_attention import has_no_kernel
from effc.ir.dialect.inline import inline_dialect
from effc.ir.rewrite.dataflow import read_values
from effc.verify.segments import Segment, plan, prepare
from effc.verify.split_products import split_large_products

DEFAULT_LIMIT = 256 << 20
INLINE_BYTES = 1 << 12
"""Weights up to this size travel inside the graph, where shape inference can read them."""

Observer = Callable[[int, str, np.ndarray], None]
"""Called with the index of the feed, the name of a value and its content."""


def evaluate(
    model: ir.Model,
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    limit: int = DEFAULT_LIMIT,
    observe: Observer | None = None,
) -> list[dict[str, np.ndarray]]:
    """Run a graph on several feeds, reading every weight once per segment that uses it.

    Each node runs with onnxruntime's plain kernel for it (graph optimisation, prepacking and the memory arena
    are off), so a result does not depend on where the graph is cut, and two graphs that compute the same
    thing node by node give the same bits.

    Memory: the weights of one segment with their casts and transposes (`limit`; when one weight is larger: that
    weight as stored, and what is computed from it unless it is the weight of a plain product, which is then split by
    rows), and the values that live between segments. The split depends on the limit: compare runs of one limit.

    Args:
        model: The graph; it is not changed. Weights keep their stored dtype.
        feeds: One mapping of input name -> array per evaluation; shapes may differ.
        limit: Bytes of constants in one segment.
        observe: Called with every value that is not a constant, as it is computed.

    Returns:
        Output name -> array for each feed, in order. bfloat16 comes as `ml_dtypes.bfloat16`.

    Raises:
        InputError: The graph cannot be run on a feed; names the nodes and the shapes. Or it has an op of ours
            without a reference body and the custom-op library is not there.
    """
    prepared, library = _executable(model)
    split_large_products(prepared.graph, limit)
    segments = plan(prepared.graph, limit, observe=observe is not None)
    live: list[dict[str, Any]] = [{name: _ort_value(array) for name, array in feed.items()} for feed in feeds]
    for segment in segments:
        _run_segment(prepared, segment, live, library, observe)
    return [_outputs(prepared.graph, values) for values in live]


def custom_op_library() -> Path | None:
    """The custom-op library, None where it was not built."""
    try:
        from effc.kernels import library_path

        return Path(library_path())
    except (ImportError, MissingDependencyError):
        return None


def _executable(model: ir.Model) -> tuple[ir.Model, Path | None]:
    """A copy that onnxruntime can run: with our kernels where they are built, else with the ops' bodies."""
    copy = model.clone()
    if not any(is_dialect_node(node) for node in copy.graph.all_nodes()):
        return prepare(copy), None
    library = custom_op_library()
    inline_dialect(copy, has_no_kernel if library is not None else is_dialect_node)
    return prepare(copy), library


def _run_segment(
    model: ir.Model,
    segment: Segment,
    live: list[dict[str, Any]],
    library: Path | None,
    observe: Observer | None,
) -> None:
    if not live or not segment.outputs:
        return
    weights = {str(weight.name): _tensor(weight) for weight in segment.weights}
    fixed = _fixed_weights(segment)
    session = _open(model, segment, live[0], weights, fixed, library)
    fed = {name: _ort_value(tensor.numpy()) for name, tensor in weights.items() if name not in fixed}
    del weights
    for index, values in enumerate(live):
        inputs = {**{name: values[name] for name in segment.inputs}, **fed}
        try:
            results = session.run_with_ort_values(list(segment.outputs), inputs)
        except Exception as error:
            raise InputError(_run_message(segment, inputs, error)) from error
        values.update(zip(segment.outputs, results))
        if observe is not None:
            for name in segment.outputs:
                if values[name].is_tensor():
                    observe(index, name, to_numpy(values[name]))
        for name in segment.dead:
            values.pop(name, None)


def _tensor(weight: ir.Value) -> ir.TensorProtocol:
    if weight.const_value is None:
        raise InputError(f"weight {weight.name!r} has no content. Export the model again with its weights.")
    return weight.const_value


def _fixed_weights(segment: Segment) -> set[str]:
    """Weights that must be constants of the graph; the others are fed, which saves the copies onnxruntime makes.

    Kernels outside the standard domain may insist on constants, shape inference wants the small ones, and a few types
    cannot be fed.
    """
    custom = {value for node in segment.nodes if node.domain not in ("", "ai.onnx") for value in read_values(node)}
    fixed = set()
    for weight in segment.weights:
        tensor = _tensor(weight)
        if weight in custom or _is_inline(tensor):
            fixed.add(str(weight.name))
    return fixed


def _is_inline(tensor: ir.TensorProtocol) -> bool:
    return tensor.nbytes <= INLINE_BYTES or tensor.dtype.bitwidth < 8 or tensor.dtype == ir.DataType.STRING


def _open(
    model: ir.Model,
    segment: Segment,
    values: Mapping[str, Any],
    weights: Mapping[str, ir.TensorProtocol],
    fixed: set[str],
    library: Path | None,
) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    if library is not None:
        options.register_custom_ops_library(str(library))
    proto = _segment_proto(model, segment, values)
    external = _add_weights(proto.graph, weights, fixed)
    options.add_external_initializers(list(external), list(external.values()))
    try:
        return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(_run_message(segment, {name: values[name] for name in segment.inputs}, error)) from error


def _segment_proto(model: ir.Model, segment: Segment, values: Mapping[str, Any]) -> onnx.ModelProto:
    """The segment as a model without its weights."""
    proto = onnx.ModelProto(ir_version=model.ir_version)
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    proto.functions.extend(ir.serde.serialize_function(function) for function in model.functions.values())
    graph = proto.graph
    graph.name = "segment"
    graph.node.extend(ir.serde.serialize_node(node) for node in segment.nodes)
    graph.input.extend(_input_info(name, values[name]) for name in segment.inputs)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in segment.outputs)
    return proto


def _add_weights(graph: onnx.GraphProto, weights: Mapping[str, ir.TensorProtocol], fixed: set[str]) -> dict[str, Any]:
    """Declare the weights: fed ones as inputs, small ones with their content, others as external.

    Returns:
        The content of the external ones.
    """
    external: dict[str, Any] = {}
    for name, tensor in weights.items():
        dims = tensor.shape.numpy()
        if name not in fixed:
            graph.input.append(onnx.helper.make_tensor_value_info(name, int(tensor.dtype), dims))
        elif tensor.dtype == ir.DataType.STRING:
            graph.initializer.append(ir.serde.serialize_tensor(tensor))
            graph.initializer[-1].name = name
        elif _is_inline(tensor):
            # Not `serialize_tensor`: it would keep a reference to a file.
            graph.initializer.add(name=name, data_type=int(tensor.dtype), dims=dims, raw_data=tensor.tobytes())
        else:
            external[name] = _ort_value(tensor.numpy())
            entry = graph.initializer.add(
                name=name, data_type=int(tensor.dtype), dims=dims, data_location=onnx.TensorProto.EXTERNAL
            )
            entry.external_data.add(key="location", value="memory")
    return external


def _input_info(name: str, value: Any) -> onnx.ValueInfoProto:
    """Declare an input by the type of the value at hand; sizes stay open."""
    kind = re.fullmatch(r"(seq\()?tensor\((\w+)\)\)?", value.data_type())
    if kind is None:
        raise InputError(f"value {name!r} has the type {value.data_type()}, which cannot pass between segments.")
    element = onnx.TensorProto.DataType.Value(kind.group(2).upper())
    if kind.group(1):
        return onnx.helper.make_tensor_sequence_value_info(name, element, None)
    return onnx.helper.make_tensor_value_info(name, element, [None] * len(value.shape()))


def _ort_value(array: np.ndarray) -> Any:
    """Hand an array over without a copy where onnxruntime allows it."""
    element = ir.DataType.from_numpy(array.dtype)
    if array.dtype.kind in "biufOSU" and array.dtype.isbuiltin == 1:
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    bits = np.ascontiguousarray(array).reshape(array.shape).view(f"uint{8 * array.dtype.itemsize}")
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, int(element))


def to_numpy(value: Any) -> np.ndarray:
    """Content of an OrtValue as an array of its own, ml_dtypes for the types numpy lacks."""
    name = value.data_type().removeprefix("tensor(").removesuffix(")")
    if name in _NUMPY_NAMES:
        return np.array(value.numpy())
    dtype = ir.DataType(value.element_type())
    if dtype.bitwidth < 8:
        raise InputError(f"a value of type {name} cannot be read out. Cast it in the graph.")
    content = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes()) if all(value.shape()) else b""
    return np.frombuffer(content, dtype=dtype.numpy()).reshape(value.shape())


_INTEGERS = (f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_NUMPY_NAMES = frozenset({"float", "double", "float16", "bool", "string", *_INTEGERS})


def _outputs(graph: ir.Graph, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    outputs = {}
    for value in graph.outputs:
        name = str(value.name)
        if value.is_initializer() and value.const_value is not None:
            outputs[name] = value.const_value.numpy()
        else:
            outputs[name] = to_numpy(values[name])
    return outputs


def _run_message(segment: Segment, inputs: Mapping[str, Any], error: Exception) -> str:
    first, final = segment.nodes[0], segment.nodes[-1]
    shapes = ", ".join(f"{name}{list(value.shape())}" for name, value in list(inputs.items())[:6])
    reason = str(error).strip().splitlines()[0].rpartition("Status Message: ")[2][-400:]
    return (
        f"onnxruntime cannot run the nodes {first.name!r} ({first.op_type}) to {final.name!r} ({final.op_type}) "
        f"with {shapes or 'no inputs'}: {reason}"
    )
