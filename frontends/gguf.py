"""GGUF files: header checked here, configuration, names and tokenizer by transformers, values by `gguf`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from effc.frontends import binding, checked, skeleton, twin
from effc.frontends.architecture import choose
from effc.frontends.assets import saved_tokenizer
from effc.frontends.environment import offline_and_quiet, require
from effc.frontends.gguf_config import load_config, stub
from effc.frontends.gguf_header import GgufHeader, read_gguf_header
from effc.frontends.gguf_tensors import PLAIN, module_tensors
from effc.frontends.hashing import start_content_hash
from effc.frontends.lowering import PREFIX, lower
from effc.frontends.request import Request
from effc.frontends.stored_dtype import keep_or_cast
from effc.ir.program import Program, Source

BLOCKS = ir.DataType.BFLOAT16
"""What quantised blocks are stored as unless the user asks for another dtype."""


def import_gguf(path: Path, request: Request) -> Program:
    """Import a GGUF file.

    Raises:
        InputError: The file is damaged, or its architecture is unsupported.
        ContractError: The graph computes something else than torch.
    """
    request.progress(f"reading the header of {path}")
    header = read_gguf_header(path)
    with offline_and_quiet():
        config = load_config(header)
        content = config.to_dict()
        # A twin's weights follow from its configuration, which follows from the header.
        hashed = (b"twin\0" + stub(header), []) if request.twin else (b"", [("model.gguf", path)])
        digest = start_content_hash(*hashed)
        architecture = choose(twin.cut(config) if request.twin else config, request.task, str(path))
        lowered = lower(architecture, request.progress)
        request.progress("binding weights")
        dtype = request.dtype or BLOCKS
        if request.twin:
            weights, notes = twin.random_weights(lowered.part, dtype), [f"Twin: {twin.LAYERS} layers, random weights."]
        else:
            weights, notes = file_weights(header, lowered.whole, config, dtype)
        weights, dtype_notes = keep_or_cast(weights, request.dtype)
        binding.bind(lowered.graph.graph, PREFIX, lowered.part, weights, str(path))
        files, asset_notes = tokenizer_assets(path, config)
        weight_bytes = sum(tensor.nbytes for tensor in header.tensors)
        source = Source("gguf", request.name, content, files, weight_bytes=weight_bytes)
        program = Program(lowered.graph, architecture.task, source)
        notes += [*lowered.interface.notes, *weights.notes, *dtype_notes, *asset_notes]
        if request.check:
            notes.append(checked.compare(program, lowered, architecture, config, weights, None, request))
        return replace(program, source=replace(source, content_hash=digest.result(), notes=tuple(notes)))


def file_weights(
    header: GgufHeader, model: Any, config: Any, dtype: ir.DataType
) -> tuple[binding.Weights, list[str]]:
    """The file's tensors bound to the module's names, and what was decided about their dtype."""
    tensors = module_tensors(header, model, config, dtype)
    weights = binding.resolve_ties(tensors, skeleton.tied_parameters(model))
    kinds = Counter(_kind_name(tensor.kind) for tensor in header.tensors if tensor.kind not in PLAIN)
    if not kinds:
        return weights, []
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    rounding = "exactly" if dtype is ir.DataType.FLOAT else "rounded to nearest even"
    return weights, [f"Quantised tensors ({listed}) are dequantised to {dtype.name.lower()}, {rounding}."]


def _kind_name(kind: int) -> str:
    return str(require("gguf", "Reading GGUF").GGMLQuantizationType(kind).name)


def tokenizer_assets(path: Path, config: Any) -> tuple[dict[str, Path | bytes], list[str]]:
    """Tokenizer and generation settings made from the file's metadata."""
    from transformers import AutoTokenizer, GenerationConfig
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    generation = GenerationConfig.from_model_config(config).to_diff_dict()
    assets: dict[str, Path | bytes] = {"generation_config.json": json.dumps(generation, indent=2).encode()}
    try:
        # Naming the type keeps transformers from reading the configuration out of the file once more.
        known = {"tokenizer_type": config.model_type} if config.model_type in TOKENIZER_MAPPING_NAMES else {}
        tokenizer = AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name, trust_remote_code=False, local_files_only=True, **known
        )
    except Exception as error:
        return assets, [f"The file gives no tokenizer ({type(error).__name__}: {str(error)[:150]})."]
    return {**saved_tokenizer(tokenizer), **assets}, []
