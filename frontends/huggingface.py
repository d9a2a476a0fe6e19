"""Hugging Face models: a folder with config.json and safetensors, or a hub id that is in the local cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from effc.errors import InputError
from effc.frontends import assets, binding, checked, conversions, skeleton, twin
from effc.frontends.architecture import choose, load_config
from effc.frontends.environment import offline_and_quiet, require
from effc.frontends.hashing import content_hash, model_hash, start_content_hash
from effc.frontends.lowering import PREFIX, Lowered, lower
from effc.frontends.request import Request
from effc.frontends.safetensors_index import read_checkpoint
from effc.frontends.stored_dtype import keep_or_cast
from effc.frontends.torch_tensors import weights_of
from effc.ir.program import Program, Source

CONFIG_LIMIT = 16 << 20


def import_folder(folder: Path, request: Request) -> Program:
    """Import a Hugging Face folder; links (hub cache) are followed.

    Raises:
        InputError: Anything in the folder is damaged, missing, unsupported, or does not fit.
        ContractError: The graph computes something else than torch.
    """
    with offline_and_quiet():
        request.progress(f"reading {folder / 'config.json'}")
        config_bytes, content = read_config(folder)
        config = load_config(folder, content)
        importer = _import_twin if request.twin else _import_checkpoint
        return importer(folder, config_bytes, content, config, request)


def _import_checkpoint(
    folder: Path, config_bytes: bytes, content: dict[str, Any], config: Any, request: Request
) -> Program:
    checkpoint = read_checkpoint(folder)
    digest = start_content_hash(config_bytes, [(path.name, path) for path in checkpoint.files])
    architecture = choose(config, request.task, str(folder))
    lowered = lower(architecture, request.progress)
    request.progress("binding weights")
    weights, dtype_notes = keep_or_cast(module_weights(lowered, checkpoint.tensors), request.dtype)
    binding.bind(lowered.graph.graph, PREFIX, lowered.part, weights, str(folder))
    files, asset_notes = assets.collect(folder)
    source = Source("huggingface", request.name, content, files, weight_bytes=checkpoint.nbytes)
    program = Program(lowered.graph, architecture.task, source)
    notes = [*lowered.interface.notes, *weights.notes, *dtype_notes, *asset_notes]
    if request.check:
        loader = None if request.dtype else lambda: checked.from_folder(architecture, folder, lowered)
        notes.append(checked.compare(program, lowered, architecture, config, weights, loader, request))
    return replace(program, source=replace(source, content_hash=digest.result(), notes=tuple(notes)))


def _import_twin(
    folder: Path, config_bytes: bytes, content: dict[str, Any], config: Any, request: Request
) -> Program:
    small = twin.cut(config)
    architecture = choose(small, request.task, str(folder))
    lowered = lower(architecture, request.progress)
    dtype = twin.stored_dtype(folder, content)
    weights, dtype_notes = keep_or_cast(twin.random_weights(lowered.part, dtype), request.dtype)
    binding.bind(lowered.graph.graph, PREFIX, lowered.part, weights, str(folder))
    files, asset_notes = assets.collect(folder)
    source = Source("huggingface", request.name, small.to_dict(), files)
    program = Program(lowered.graph, architecture.task, source)
    notes = [f"Twin: {twin.LAYERS} layers, random {dtype.name.lower()} weights.", *lowered.interface.notes]
    notes += [*dtype_notes, *asset_notes]
    if request.check:
        notes.append(checked.compare(program, lowered, architecture, config, weights, None, request))
    digest = content_hash(f"twin\0{dtype.name}\0".encode() + config_bytes, [])
    source = replace(source, content_hash=digest, weight_bytes=program.weight_bytes(), notes=tuple(notes))
    return replace(program, source=source)


def import_pretrained(model: Any, request: Request) -> Program:
    """Import a transformers model in memory; its weights stay there and must not change afterwards.

    Raises:
        InputError: The architecture is unsupported.
        ContractError: The graph computes something else than torch.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    architecture = choose(config, request.task, request.name)
    lowered = lower(architecture, request.progress)
    weights = module_weights(lowered, weights_of(model.state_dict()).tensors)
    weights, dtype_notes = keep_or_cast(weights, request.dtype)
    binding.bind(lowered.graph.graph, PREFIX, lowered.part, weights, request.name)
    source = Source("memory", request.name, model.config.to_dict(), content_hash=model_hash(lowered.graph))
    program = Program(lowered.graph, architecture.task, source)
    notes = [*lowered.interface.notes, *weights.notes, *dtype_notes]
    if request.check:
        notes.append(checked.compare(program, lowered, architecture, config, weights, None, request))
    source = replace(source, weight_bytes=program.weight_bytes(), notes=tuple(notes))
    return replace(program, source=source)


def module_weights(lowered: Lowered, stored: Mapping[str, ir.TensorProtocol]) -> binding.Weights:
    """The checkpoint's tensors under the names of the traced module, ties decided."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    whole = lowered.whole
    tensors = conversions.to_module(whole, stored, get_model_conversion_mapping(whole))
    weights = binding.resolve_ties(tensors, skeleton.tied_parameters(whole))
    prefix = lowered.part_name
    if not prefix:
        return weights
    spread = {name: weights.tensors[source] for name, source in weights.ties.items() if source in weights.tensors}
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in {**weights.tensors, **spread}.items()
        if name.startswith(prefix)
    }
    return binding.Weights(own, skeleton.tied_parameters(lowered.part), weights.notes)


def read_config(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes and the content of config.json.

    Raises:
        InputError: Missing, too large, or not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: has no config.json, so it is not a Hugging Face model folder.")
    if path.stat().st_size > CONFIG_LIMIT:
        raise InputError(f"{path}: is larger than {CONFIG_LIMIT >> 20} MiB, which no configuration needs.")
    data = path.read_bytes()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a JSON object. Download it again.")
    return data, content


def cached_folder(hub_id: str) -> Path | None:
    """The folder of a hub id in the local cache, or None. Never uses the network."""
    huggingface_hub = require("huggingface_hub", "Looking up a hub id")
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        with offline_and_quiet():
            return Path(huggingface_hub.snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
