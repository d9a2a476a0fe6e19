"""Exported torch programs: `.pt2` files and `ExportedProgram`s in memory."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from effc.errors import InputError, UsageError
from effc.frontends import binding, check, port_names, sizes
from effc.frontends.conversions import to_numpy
from effc.frontends.environment import offline_and_quiet, require
from effc.frontends.hashing import content_hash, model_hash
from effc.frontends.request import Request
from effc.frontends.stored_dtype import keep_or_cast
from effc.frontends.torch_tensors import weights_of
from effc.frontends.trace import name_ports, to_onnx
from effc.ir.program import Program, Source

CODE_IN_ARCHIVE = ("/aotinductor/", "/constants/custom_obj_", "/constants/opaque_obj_")
"""Parts of an archive that hold compiled code or pickled objects."""
TENSORS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def import_pt2(path: Path, request: Request) -> Program:
    """Import an exported program saved with `torch.export.save`.

    Raises:
        InputError: The file is damaged, of another version, or carries code or pickled objects.
        ContractError: The graph computes something else than torch.
    """
    torch: Any = require("torch", "Reading a .pt2 file")
    request.progress(f"reading {path}")
    _check_archive(path)
    with offline_and_quiet(), _tensors_only():
        try:
            exported = torch.export.load(str(path))
        except Exception as error:
            brief = " ".join(str(error).split())[:200]
            raise InputError(
                f"{path}: cannot be loaded by torch {torch.__version__} ({type(error).__name__}: {brief}). "
                "Export it again with this torch."
            ) from error
        program = import_exported(exported, request)
    digest = content_hash(b"", [("model.pt2", path)])
    return replace(program, source=replace(program.source, content_hash=digest))


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{path}: is not a .pt2 archive ({error}). Export it again.") from error
    for name in names:
        if any(part in f"/{name}" for part in CODE_IN_ARCHIVE):
            raise InputError(
                f"{path}: carries {name}, compiled code or a pickled object, which effc does not load. "
                "Save it with `torch.export.save` from a module of tensors alone."
            )


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """`torch.load` unpickles tensors and nothing else in this block, whatever its caller asks for."""
    saved = os.environ.get(TENSORS_ONLY)
    os.environ[TENSORS_ONLY] = "1"
    try:
        yield
    finally:
        if saved is None:
            del os.environ[TENSORS_ONLY]
        else:
            os.environ[TENSORS_ONLY] = saved


def import_torch(model: Any, example_inputs: Any, request: Request) -> Program:
    """Import an `ExportedProgram`, or a module; weights stay in memory.

    A transformers model needs no example inputs: it is imported like its folder.

    Raises:
        UsageError: Neither of them, or a module without example inputs.
        InputError: It cannot be exported.
        ContractError: The graph computes something else than torch.
    """
    torch: Any = require("torch", "Importing a torch model")
    with offline_and_quiet():
        if isinstance(model, torch.export.ExportedProgram):
            return import_exported(model, request)
        if not isinstance(model, torch.nn.Module):
            raise UsageError(
                f"{request.name}: is no model effc knows. Pass a path, a torch module, an ExportedProgram, "
                "or an ONNX model."
            )
        if example_inputs is not None:
            from effc.frontends.torch_module import import_module

            return import_module(model, example_inputs, request)
        if hasattr(model, "config") and hasattr(model, "base_model_prefix"):
            from effc.frontends.huggingface import import_pretrained

            return import_pretrained(model, request)
    raise UsageError(f"{request.name}: a torch module needs example_inputs, a tuple or a dict of tensors.")


def import_exported(exported: Any, request: Request) -> Program:
    """Import an `ExportedProgram`: its dynamic sizes stay, its computing dtype too.

    Raises:
        InputError: An operator has no ONNX form.
        ContractError: The graph computes something else than torch on the example inputs.
    """
    request.progress("converting to ONNX")
    model = to_onnx(exported, request.name)
    graph = model.graph
    count = len(graph.outputs)
    outputs = ("output",) if count == 1 else tuple(f"output_{index}" for index in range(count))
    name_ports(graph, tuple(value.name or "" for value in graph.inputs), outputs)
    notes = list(port_names.normalise_cache(graph))
    task = request.task or port_names.infer_task(graph)
    sizes.name_sizes(graph, port_names.size_names(graph, task))
    weights, dtype_notes = keep_or_cast(weights_of(exported.state_dict), request.dtype)
    binding.merge_tied(graph, "", weights.ties)
    for name, tensor in weights.tensors.items():
        if name in graph.initializers:
            binding.replace_weight(graph, graph.initializers[name], name, tensor)
    source = Source("torch-export", request.name, content_hash=model_hash(model))
    program = Program(model, task, source)
    notes += dtype_notes
    if request.check:
        notes.append(_check(program, exported, request))
    source = replace(source, weight_bytes=program.weight_bytes(), notes=tuple(notes))
    return replace(program, source=source)


def _check(program: Program, exported: Any, request: Request) -> str:
    torch: Any = require("torch", "Comparing with torch")
    if exported.example_inputs is None:
        return "Not compared with torch: the exported program has no example inputs."
    if not check.fits(program):
        return f"Not compared with torch: more than {check.MEMORY_LIMIT >> 20} MiB of float32 weights."
    args, kwargs = exported.example_inputs
    with torch.no_grad():
        result = exported.module()(*args, **kwargs)
    given, expected = (torch.utils._pytree.tree_leaves(tree) for tree in ((args, kwargs), result))
    if not all(isinstance(leaf, torch.Tensor) for leaf in (*given, *expected)):
        return "Not compared with torch: inputs or outputs are not all tensors."
    inputs, outputs = program.graph.inputs, program.graph.outputs
    case = check.Case(
        "the example inputs",
        {value.name or "": to_numpy(leaf) for value, leaf in zip(inputs, given, strict=True)},
        {value.name or "": to_numpy(leaf) for value, leaf in zip(outputs, expected, strict=True)},
    )
    with check.Runner(program.model) as runner:
        return check.run_cases(program, runner, [case], request.progress)
