"""Twins: the same architecture with two layers and random weights, for trying things out and for checks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from effc.frontends.binding import Weights
from effc.frontends.environment import require
from effc.frontends.safetensors_index import read_checkpoint
from effc.frontends.skeleton import tied_parameters
from effc.frontends.stored_dtype import FLOATS
from effc.ir.weights import computed_tensor

LAYERS = 2
LAYER_KEYS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
)
SMALL = {"vocab_size": 1024, "intermediate_size": 256, "moe_intermediate_size": 128, "ffn_dim": 256}
TOKEN_KEYS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


def cut(config: Any, small: bool = False) -> Any:
    """The configuration with two layers; every list with one entry a layer is cut to the same two layers.

    The layers kept are the first of each kind (`layer_types`), so that a model of sliding and full layers keeps
    one of both. With `small`, vocabulary and hidden products shrink too, for checks in little memory.
    """
    return type(config).from_dict(_cut(config.to_dict(), small))


def _cut(content: Mapping[str, Any], small: bool) -> dict[str, Any]:
    result = dict(content)
    layers = max((result[key] for key in LAYER_KEYS if type(result.get(key)) is int), default=0)
    kept = _kept_layers(result, layers)
    for key, value in result.items():
        if isinstance(value, Mapping):
            result[key] = _cut(value, small)
        elif key in LAYER_KEYS and type(value) is int:
            result[key] = min(value, LAYERS)
        elif isinstance(value, list) and len(value) == layers > LAYERS:
            result[key] = [value[index] for index in kept]
    for key, limit in (("first_k_dense_replace", 1), ("num_kv_shared_layers", 0)):
        if type(result.get(key)) is int:
            result[key] = min(result[key], limit)
    return _shrink(result) if small else result


def _kept_layers(content: Mapping[str, Any], layers: int) -> list[int]:
    kinds = content.get("layer_types")
    first: list[int] = []
    if isinstance(kinds, list) and len(kinds) == layers:
        first = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())[:LAYERS]
    rest = [index for index in range(layers) if index not in first]
    return sorted(first + rest[: LAYERS - len(first)])


def _shrink(content: dict[str, Any]) -> dict[str, Any]:
    for key, limit in SMALL.items():
        if type(content.get(key)) is int:
            content[key] = min(content[key], limit)
    vocabulary = content.get("vocab_size")
    if type(vocabulary) is int:
        for key in TOKEN_KEYS:
            if type(content.get(key)) is int and content[key] >= vocabulary:
                content[key] = 0
    return content


def random_weights(model: Any, dtype: ir.DataType) -> Weights:
    """Random weights for every parameter of a model: the same for the same name, shape and dtype.

    Matrices are drawn when asked for, from a normal distribution of the configuration's `initializer_range`;
    vectors start as the model initialises them, plus a little noise. Ties are those of the configuration.
    """
    deviation = float(getattr(model.config, "initializer_range", None) or 0.02)
    ties = tied_parameters(model)
    vectors = _initial_vectors(model)
    tensors: dict[str, ir.TensorProtocol] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in ties:
            tensors[name] = _random(name, tuple(parameter.shape), dtype, deviation, vectors.get(name))
    return Weights(tensors, ties)


def _random(
    name: str, shape: tuple[int, ...], dtype: ir.DataType, deviation: float, start: np.ndarray | None
) -> ir.LazyTensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")

    def draw() -> np.ndarray:
        values = np.random.Generator(np.random.Philox(seed)).standard_normal(shape, dtype=np.float32)
        values *= np.float32(deviation)
        if start is not None:
            values += start
        return values.astype(dtype.numpy())

    return computed_tensor(draw, dtype, shape, name)


def _initial_vectors(model: Any) -> dict[str, np.ndarray]:
    """What the model initialises its vectors with (ones or zeros for norms); only modules without matrices."""
    torch: Any = require("torch", "Making a twin")
    start = {}
    with torch.no_grad():
        for prefix, module in model.named_modules():
            own = list(module.named_parameters(recurse=False))
            if own and all(parameter.ndim < 2 for _, parameter in own):
                model._init_weights(module)
                for name, parameter in own:
                    start[f"{prefix}.{name}".lstrip(".")] = parameter.detach().numpy().copy()
    return start


def stored_dtype(folder: Path, content: Mapping[str, Any]) -> ir.DataType:
    """The float type most of the checkpoint's values have; without weights, the configuration's `dtype`."""
    if any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        counts: Counter[ir.DataType] = Counter()
        for tensor in read_checkpoint(folder).tensors.values():
            if tensor.dtype in FLOATS.values():
                counts[tensor.dtype] += tensor.size
        if counts:
            return counts.most_common(1)[0][0]
    named = content.get("dtype") or content.get("torch_dtype")
    return FLOATS.get(named, ir.DataType.FLOAT) if isinstance(named, str) else ir.DataType.FLOAT
