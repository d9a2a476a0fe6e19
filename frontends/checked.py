"""Which comparison an import gets: with its own weights when they fit in memory, else on a small twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from effc.errors import InputError
from effc.frontends import binding, check, twin
from effc.frontends.architecture import Architecture, choose
from effc.frontends.conversions import to_torch
from effc.frontends.environment import require
from effc.frontends.lowering import PREFIX, Lowered, lower, traced_part
from effc.frontends.request import Request
from effc.ir.program import Program


def compare(
    program: Program,
    lowered: Lowered,
    architecture: Architecture,
    config: Any,
    weights: binding.Weights,
    loader: Callable[[], Any] | None,
    request: Request,
) -> str:
    """Compare an imported program with torch, within the memory limit.

    Args:
        program: The program, weights bound.
        lowered: What it was traced from.
        architecture: Its architecture.
        config: The configuration of the whole source.
        weights: The weights that were bound.
        loader: Loads the torch module independently of our binding; None to fill the traced module with `weights`.
        request: The import's options.

    Returns:
        The note for the report.

    Raises:
        ContractError: They differ.
    """
    if check.fits(program):
        module = loader() if loader is not None else filled(lowered.part, weights)
        return check.check(program, lowered.interface, module, request.progress)
    request.progress("too large to compare with its own weights: comparing a small twin")
    small = choose(twin.cut(config, small=True), request.task, request.name)
    shadow = lower(small, lambda _: None)
    random = twin.random_weights(shadow.part, ir.DataType.FLOAT)
    binding.bind(shadow.graph.graph, PREFIX, shadow.part, random, request.name)
    stand_in = Program(shadow.graph, small.task, replace(program.source))
    size = check.float32_bytes(program) >> 20
    if not check.fits(stand_in):
        return f"Not compared with torch: {size} MiB of float32 weights, and a two-layer twin is too large as well."
    note = check.check(stand_in, shadow.interface, filled(shadow.part, random), request.progress)
    limit = check.MEMORY_LIMIT >> 20
    reason = f"the model has {size} MiB, the limit is {limit}"
    return f"{note} On a twin of {twin.LAYERS} layers with random weights: {reason}."


def from_folder(architecture: Architecture, folder: Path, lowered: Lowered) -> Any:
    """The torch module with the checkpoint's weights, loaded by transformers, float32.

    Raises:
        InputError: transformers does not load it.
    """
    torch: Any = require("torch", "Comparing with torch")
    try:
        model = architecture.model_class.from_pretrained(
            str(folder),
            config=architecture.config,
            dtype=torch.float32,
            attn_implementation=lowered.whole.config._attn_implementation,
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:
        raise InputError(
            f"{folder}: transformers cannot load the checkpoint to compare with "
            f"({type(error).__name__}: {str(error)[:200]})."
        ) from error
    return traced_part(model.eval(), architecture)


def filled(module: Any, weights: binding.Weights) -> Any:
    """The traced module with the given weights in float32."""
    torch: Any = require("torch", "Comparing with torch")
    tensors = dict(weights.tensors)
    tensors.update({name: tensors[source] for name, source in weights.ties.items() if source in tensors})
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in own:
                own[name].copy_(to_torch(tensor))
    return module
