"""ONNX models: a file with or without external data, or a model in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from effc.errors import InputError, UsageError
from effc.frontends import onnx_check, port_names, sizes
from effc.frontends.hashing import model_hash, start_content_hash
from effc.frontends.onnx_external import ExternalFolder, open_external
from effc.frontends.opset import convert
from effc.frontends.request import Request
from effc.frontends.stored_dtype import cast
from effc.ir.program import Program, Source, Task

PROTOBUF_LIMIT = (1 << 31) - 1
CONSTANT_LIMIT = 1024
"""Bytes from which a `Constant` node's value is a weight."""
STANDARD = {"", "ai.onnx", "ai.onnx.ml"}


def import_onnx_file(path: Path, request: Request) -> Program:
    """Import an `.onnx` file; external data is read when a weight is asked for.

    Raises:
        InputError: The file is damaged or invalid, or its external data is missing, misplaced or unsafe.
        ContractError: The imported graph computes something else than the file.
    """
    request.progress(f"reading {path}")
    if path.stat().st_size > PROTOBUF_LIMIT:
        raise InputError(f"{path}: is larger than 2 GiB, which protobuf cannot read. Save it with external data.")
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise InputError(f"{path}: is not an ONNX model ({type(error).__name__}: {str(error)[:200]}).") from error
    model = _deserialise(proto, str(path))
    files = open_external(model, ExternalFolder.of_file(path))
    digest = start_content_hash(b"", [("model.onnx", path.resolve()), *((file.name, file) for file in files)])
    program = _import(model, Source("onnx", request.name), request)
    return replace(program, source=replace(program.source, content_hash=digest.result()))


def import_onnx_model(given: onnx.ModelProto | ir.Model, request: Request) -> Program:
    """Import an ONNX model in memory; it is not changed.

    Raises:
        InputError: The model is invalid, or a ModelProto has external data, whose folder is unknown.
        ContractError: The imported graph computes something else.
    """
    if isinstance(given, onnx.ModelProto):
        model = _deserialise(given, "the ModelProto")
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                raise InputError("the ModelProto: has external data in an unknown folder. Pass the path of its file.")
    else:
        model = given.clone()
        folders = {
            str(value.const_value.base_dir)
            for value in model.graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        if len(folders) > 1:
            raise InputError("the onnx_ir model: has external data in several folders. Save it, and pass the file.")
        if folders:
            open_external(model, ExternalFolder("the onnx_ir model", Path(folders.pop() or ".")))
    digest = model_hash(model)
    return _import(model, Source("memory", request.name, content_hash=digest), request)


def _deserialise(proto: onnx.ModelProto, where: str) -> ir.Model:
    if not proto.HasField("graph") or not proto.opset_import:
        raise InputError(f"{where}: has no graph or no opset, so it is not an ONNX model.")
    names = Counter(tensor.name for tensor in proto.graph.initializer)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise InputError(f"{where}: has more than one weight named {twice[0]!r}. Export it again.")
    try:
        return ir.serde.deserialize_model(proto)
    except Exception as error:
        raise InputError(f"{where}: is not a valid ONNX model ({_brief(_root(error))}). Export it again.") from error


def _import(model: ir.Model, source: Source, request: Request) -> Program:
    notes = list(_validate(model, source.name))
    original = model.clone() if request.check else None
    notes += _tidy(model, source.name)
    notes += convert(model)
    notes += port_names.normalise_cache(model.graph)
    task = _task(model.graph, request)
    _infer_shapes(model)
    sizes.name_sizes(model.graph, port_names.size_names(model.graph, task))
    if request.dtype is not None:
        notes.append(_store_as(model, request.dtype))
    program = Program(model, task, source)
    if original is not None:
        notes.append(onnx_check.compare(program, original, request.progress))
    return replace(program, source=replace(source, weight_bytes=program.weight_bytes(), notes=tuple(notes)))


def _validate(model: ir.Model, where: str) -> Iterator[str]:
    names = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    if not model.graph.outputs or None in names or "" in names:
        raise InputError(f"{where}: has no outputs, or a nameless port. Export it again.")
    try:
        passes.CheckerPass()(model)
    except Exception as error:
        raise InputError(f"{where}: the ONNX checker refuses it: {_brief(error.__cause__ or error)}.") from error
    foreign = Counter(
        f"{node.domain}::{node.op_type}"
        for node in model.graph.all_nodes()
        if node.domain not in STANDARD and (node.domain, node.op_type, node.overload) not in model.functions
    )
    if foreign:
        listed = ", ".join(f"{count} {name}" for name, count in foreign.most_common(8))
        yield f"Operators outside standard ONNX are kept as they are, and must be known to onnxruntime: {listed}."


def _tidy(model: ir.Model, where: str) -> Iterator[str]:
    """Inline functions, make large constants weights, take weights off the list of inputs."""
    try:
        if model.functions:
            passes.InlinePass()(model)
            yield "Model-local functions were inlined."
        raised = _raise_constants(model)
        passes.LiftSubgraphInitializersToMainGraphPass()(model)
        passes.RemoveInitializersFromInputsPass()(model)
        passes.RemoveUnusedNodesPass()(model)
    except Exception as error:
        raise InputError(f"{where}: cannot be tidied up ({_brief(error)}). Export it again.") from error
    if raised:
        yield f"{raised} Constant nodes over {CONSTANT_LIMIT} bytes became weights."


def _raise_constants(model: ir.Model) -> int:
    count = 0
    for node in list(model.graph.all_nodes()):
        attribute = node.attributes.get("value")
        if node.op_type != "Constant" or node.domain not in STANDARD or attribute is None:
            continue
        tensor, output = attribute.as_tensor(), node.outputs[0]
        if tensor.nbytes <= CONSTANT_LIMIT or output.is_graph_output():
            continue
        name = output.name or f"constant_{count}"
        while name in model.graph.initializers:
            name += "_"
        shape = ir.Shape(tensor.shape)  # type: ignore[arg-type]
        weight = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        output.name = f"{name}.constant"
        ir.convenience.replace_all_uses_with(output, weight)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
        model.graph.register_initializer(weight)
        count += 1
    return count


def _task(graph: ir.Graph, request: Request) -> Task:
    found = port_names.infer_task(graph)
    if request.task is None or request.task == found or request.task is Task.GENERIC:
        return request.task or found
    if request.task is Task.CAUSAL_LM:
        raise UsageError(
            f"{request.name}: is no causal-lm: it lacks logits, or cache inputs past_key_values.N.key / .value."
        )
    return request.task


def _infer_shapes(model: ir.Model) -> None:
    passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)


def _store_as(model: ir.Model, dtype: ir.DataType) -> str:
    count = 0
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or len(tensor.shape) < 2 or tensor.dtype is not ir.DataType.FLOAT or dtype == tensor.dtype:
            continue
        stored = ir.Value(name=f"{value.name}.stored", type=ir.TensorType(dtype), shape=value.shape)
        stored.const_value = cast(tensor, dtype)
        node = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, name=f"{value.name}.cast")
        name = value.name
        model.graph.initializers.pop(name or "")
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
        ir.convenience.replace_all_uses_with(value, node.outputs[0], replace_graph_outputs=True)
        node.outputs[0].name = f"{name}.float"
        stored.name = name
        model.graph.register_initializer(stored)
        model.graph.insert_before(model.graph[0], node)
        count += 1
    return f"{count} float32 matrices are stored as {dtype.name.lower()} as asked (rounded to nearest even)."


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
