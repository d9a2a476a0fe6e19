"""Scales of a cache with static quantization: measured on calibration data, or read from a file."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from effc.errors import UsageError
from effc.ir.analysis.cached_attention import CachedAttentionSite
from effc.ir.program import Program
from effc.ir.rewrite.dataflow import attribute_int, is_op

Scales = tuple[np.ndarray, np.ndarray]
"""Of keys `[kv heads, head size]` and values `[kv heads, value size]`, float32, positive."""


def measured_scales(program: Program, sites: Sequence[CachedAttentionSite], bits: int) -> list[Scales]:
    """Largest absolute value of each channel over the calibration data, divided by the largest code.

    Keys are measured as they are stored, rotated. A rotation keeps the length of each pair, so both channels of a pair
    take the largest length: it bounds them at every position, also at those the data do not reach.

    Args:
        program: Has calibration data.
        sites: The attentions.
        bits: 8 or 4.

    Raises:
        UsageError: The program has no calibration data.
    """
    if program.calibration is None:
        raise UsageError(
            "static scales are measured on real inputs. Give text with --calibrate FILE, or scales of your own with "
            "`scales=FILE.npz`."
        )
    operands = [(str(site.node.inputs[1].name), str(site.node.inputs[2].name)) for site in sites]  # type: ignore[union-attr]
    largest: dict[str, np.ndarray] = {}
    for values in program.calibration.observe(program, list(dict.fromkeys(name for pair in operands for name in pair))):
        for site, (key, value) in zip(sites, operands, strict=True):
            for name, seen in ((key, _envelope(site, values[key])), (value, _heads(site, values[value]))):
                most = np.abs(seen).max(axis=0, initial=0.0)
                largest[name] = np.maximum(largest.get(name, np.zeros_like(most)), most)
    top = 2 ** (bits - 1) - 1
    return [(_scale(largest[key], top), _scale(largest[value], top)) for key, value in operands]


def _heads(site: CachedAttentionSite, array: np.ndarray) -> np.ndarray:
    """[batch, tokens, heads * size] as [tokens, heads, size]."""
    return array.reshape(-1, site.form.kv_heads, array.shape[-1] // site.form.kv_heads)


def _envelope(site: CachedAttentionSite, array: np.ndarray) -> np.ndarray:
    """Keys as [tokens, heads, size], each element of a rotated pair replaced by the length of the pair."""
    keys = _heads(site, array).astype(np.float32)
    size, interleaved = _rotation(site)
    if not size:
        return keys
    pairs = np.arange(size).reshape((-1, 2) if interleaved else (2, -1))
    first, second = (pairs[:, 0], pairs[:, 1]) if interleaved else (pairs[0], pairs[1])
    length = np.hypot(keys[..., first], keys[..., second])
    keys[..., first] = length
    keys[..., second] = length
    return keys


def _rotation(site: CachedAttentionSite) -> tuple[int, bool]:
    """How many elements of a key are rotated, and whether neighbours make a pair."""
    if site.form.rotary != "none":
        return site.form.rotary_size, site.form.rotary == "interleaved"
    key = site.node.inputs[1]
    node = key.producer() if key is not None else None
    while node is not None and is_op(node, "Reshape", "Transpose") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or not is_op(node, "RotaryEmbedding"):
        return 0, False
    size = attribute_int(node, "rotary_embedding_dim", 0) or site.form.head_size
    return size, bool(attribute_int(node, "interleaved", 0))


def _scale(most: np.ndarray, top: int) -> np.ndarray:
    """A channel that is always zero gets 1."""
    return np.asarray(np.where(most > 0, most / top, 1), np.float32)


def read_scales(path: Path, sites: Sequence[CachedAttentionSite]) -> list[Scales]:
    """Scales of the user: arrays `key.0`, `value.0`, `key.1`, … of an `.npz` file, a pair for each attention in order.

    Args:
        path: The file.
        sites: All attentions of the model.

    Raises:
        UsageError: The file cannot be read, lacks a layer, has other shapes, or scales that scale nothing.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: cannot be read as scales ({error}). Write it with `numpy.savez`.") from error
    found = [
        (
            _checked(path, arrays, f"key.{index}", (site.form.kv_heads, site.form.head_size)),
            _checked(path, arrays, f"value.{index}", (site.form.kv_heads, site.form.value_size)),
        )
        for index, site in enumerate(sites)
    ]
    if found and all((array == 1).all() for pair in found for array in pair):
        raise UsageError(
            f"{path}: every scale is 1.0, which rounds keys and values to whole numbers. Measure them with --calibrate."
        )
    return found


def _checked(path: Path, arrays: dict[str, np.ndarray], name: str, shape: tuple[int, int]) -> np.ndarray:
    if name not in arrays:
        raise UsageError(f"{path}: has no array {name!r}. Give key.N and value.N for every attention, counted from 0.")
    array = arrays[name]
    if array.shape != shape or array.dtype.kind != "f":
        raise UsageError(f"{path}: {name} is {array.dtype} {list(array.shape)}, it must be float32 {list(shape)}.")
    if not np.isfinite(array).all() or (array <= 0).any():
        raise UsageError(f"{path}: {name} has scales that are not positive numbers.")
    return array.astype(np.float32)


def scale_tensors(graph: ir.Graph, prefix: str, scales: Scales) -> list[ir.Value]:
    """Initializers [1, heads, 1, size] with the scales of one layer."""
    made = []
    for kind, array in zip(("key_scale", "value_scale"), scales, strict=True):
        tensor = ir.Tensor(np.ascontiguousarray(array[None, :, None, :]), name=f"{prefix}.{kind}")
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        graph.register_initializer(value)
        made.append(value)
    return made
