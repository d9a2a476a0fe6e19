"""Frontends: models of every supported kind become a `Program`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from effc.errors import InputError, UsageError
from effc.frontends.request import Request
from effc.frontends.stored_dtype import parse
from effc.ir.program import Program, Task

if TYPE_CHECKING:
    import torch

__all__ = ["import_model"]


def import_model(
    model: str | Path | torch.nn.Module | torch.export.ExportedProgram | ir.Model | onnx.ModelProto,
    *,
    example_inputs: Any = None,
    task: Task | str | None = None,
    dtype: str | None = None,
    twin: bool = False,
    check: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Program:
    """Import a model of any supported kind; weights stay in their files until they are asked for.

    Args:
        model: A Hugging Face folder (config.json and safetensors) or a hub id in the local cache; a `.gguf`, `.onnx`
            or `.pt2` file; a torch module with `example_inputs`, an `ExportedProgram`, or an ONNX model in memory.
        example_inputs: For a torch module: a tuple of positional or a dict of keyword tensors.
        task: What the model is for; None finds out. A pair of towers (CLIP) gives its image tower unless
            `encoder` is asked for.
        dtype: Store float weights as `float32`, `bfloat16` or `float16`; None keeps the source's dtype
            (quantised GGUF blocks become bfloat16).
        twin: The same architecture with two layers and random weights; needs no weights.
        check: Compare the graph with its source at four shapes, on a small twin where the weights are too large.
        progress: Called with a sentence at every step.

    Raises:
        InputError: The model is damaged, unsafe or unsupported.
        UsageError: The options do not fit the model.
        MissingDependencyError: torch or transformers is needed and missing.
        ContractError: The imported graph computes something else than the source.
    """
    request = Request(_name(model), _task(task), parse(dtype), twin, check, progress or (lambda _: None))
    if example_inputs is not None and isinstance(model, (str, Path, onnx.ModelProto, ir.Model)):
        raise UsageError("example_inputs belong to a torch module; files and ONNX models state their inputs.")
    if isinstance(model, (str, Path)):
        return _import_path(model, request)
    if twin:
        raise UsageError("twin=True needs a Hugging Face folder or a GGUF file: only they have a configuration.")
    if isinstance(model, (onnx.ModelProto, ir.Model)):
        from effc.frontends.onnx_file import import_onnx_model

        return import_onnx_model(model, request)
    from effc.frontends.torch_export import import_torch

    return import_torch(model, example_inputs, request)


def _import_path(model: str | Path, request: Request) -> Program:
    path = Path(model).expanduser()
    if not str(model):
        raise UsageError("the path of the model is empty. Name a file or a folder.")
    if path.is_dir():
        from effc.frontends.huggingface import import_folder

        return import_folder(path, request)
    if path.is_file():
        return _import_file(path, request)
    from effc.frontends.huggingface import cached_folder, import_folder

    folder = cached_folder(str(model)) if isinstance(model, str) else None
    if folder is None:
        raise InputError(
            f"{model}: is no file, no folder, and no model in the local Hugging Face cache. "
            "effc downloads nothing: fetch the model first (`hf download …`), then pass its folder."
        )
    return import_folder(folder, request)


def _import_file(path: Path, request: Request) -> Program:
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        from effc.frontends.gguf import import_gguf

        return import_gguf(path, request)
    if request.twin:
        raise UsageError(f"{path}: twin=True needs a Hugging Face folder or a GGUF file.")
    if suffix == ".onnx":
        from effc.frontends.onnx_file import import_onnx_file

        return import_onnx_file(path, request)
    if suffix == ".pt2":
        from effc.frontends.torch_export import import_pt2

        return import_pt2(path, request)
    hint = " Pass the folder that holds it." if suffix == ".safetensors" else ""
    raise InputError(f"{path}: effc reads .gguf, .onnx and .pt2 files and Hugging Face folders.{hint}")


def _name(model: Any) -> str:
    return str(model) if isinstance(model, (str, Path)) else type(model).__name__


def _task(task: Task | str | None) -> Task | None:
    if task is None:
        return None
    try:
        return Task(task)
    except ValueError as error:
        raise UsageError(f"task {task!r} is unknown; choose {', '.join(Task)}.") from error
