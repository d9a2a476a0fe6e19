"""Pages in numpy, written from `docs/cached-attention.md` alone: layout, encoder, decoder."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from effc.kernels.kv_page import PageSpec

F32 = np.float32
F16 = np.float16
BF16 = ml_dtypes.bfloat16
Array = NDArray[Any]


def f16_below(x: Array) -> Array:
    """The largest float16 not above x; 0 is positive."""
    x = np.asarray(x, F32) + F32(0)
    near = x.astype(F16)
    return np.where(near.astype(F32) > x, np.nextafter(near, F16(-np.inf)), near).astype(F16) + F16(0)


def f16_above(x: Array) -> Array:
    """The smallest float16 not below x; 0 is positive."""
    near = np.asarray(x, F32).astype(F16)
    return np.where(near.astype(F32) < x, np.nextafter(near, F16(np.inf)), near).astype(F16) + F16(0)


def bf16_above(x: Array) -> Array:
    """The smallest bfloat16 not below x, as float32."""
    near = np.asarray(x, F32).astype(BF16)
    return np.where(near.astype(F32) < x, np.nextafter(near, BF16(np.inf)), near).astype(F32)


def bf16_near(x: Array) -> Array:
    """The nearest finite bfloat16, as float32."""
    largest = F32(ml_dtypes.finfo(BF16).max)
    return np.clip(np.asarray(x, F32).astype(BF16).astype(F32), -largest, largest)


def unit_of(x: Array) -> np.float32:
    """The power of two that scales the parameters of a panel with valid elements x."""
    largest = float(np.abs(x).max(initial=0))
    if largest == 0:
        return F32(2.0**-15)
    return F32(2.0 ** max(math.frexp(largest)[1] - 15, -126))


def parameters(low: Array, high: Array, bits: int) -> tuple[Array, Array]:
    """Scale and minimum in units, as float16."""
    minimum = f16_below(low)
    scale = f16_above((high.astype(F32) - minimum.astype(F32)) / F32(2**bits - 1))
    return scale, minimum


def codes_of(x: Array, scale: Array, minimum: Array, bits: int) -> Array:
    """Codes of x in units; parameters broadcast."""
    scale = np.broadcast_to(scale.astype(F32), x.shape)
    steps = (x - minimum.astype(F32)) / np.where(scale == 0, F32(1), scale)
    return np.where(scale == 0, 0, np.clip(np.rint(steps), 0, 2**bits - 1)).astype(np.uint8)


def pack(codes: Array, bits: int) -> bytes:
    """Rows of codes in words of 16 bytes, padded to 16 bytes."""
    rows, lanes = codes.shape
    fields = 8 // bits
    words = -(-lanes // (16 * fields))
    padded = np.zeros((rows, words * 16 * fields), np.uint8)
    padded[:, :lanes] = codes
    parts = padded.reshape(rows, words, fields, 16)
    shifts = (bits * np.arange(fields)).astype(np.uint8)[:, None]
    return np.bitwise_or.reduce(parts << shifts, axis=2).astype(np.uint8).tobytes()


def unpack(data: Array, rows: int, lanes: int, bits: int) -> Array:
    """The inverse of `pack`."""
    fields = 8 // bits
    words = -(-lanes // (16 * fields))
    parts = data[: rows * words * 16].reshape(rows, words, 1, 16)
    shifts = (bits * np.arange(fields)).astype(np.uint8)[:, None]
    return ((parts >> shifts) & (2**bits - 1)).reshape(rows, -1)[:, :lanes]


def pad16(data: bytes) -> bytes:
    """Zeros up to a multiple of 16 bytes."""
    return data + bytes(-len(data) % 16)


def group_slices(lanes: int, group: int) -> list[slice]:
    """Lanes of each group."""
    step = group or lanes
    return [slice(i, min(i + step, lanes)) for i in range(0, lanes, step)]


def encode_plain(panel: Array, valid: Array) -> bytes:
    """Codes of 16 bits; invalid elements are 0."""
    rows, lanes = panel.shape
    words = np.zeros((rows, -(-lanes // 16) * 16), BF16)
    words[:, :lanes] = bf16_near(np.where(valid, panel, 0))
    return pad16(words.tobytes())


def parameter_part(unit: np.float32, scale: Array, minimum: Array) -> bytes:
    """The bytes of the parameters of a panel."""
    return pad16(unit.tobytes() + scale.astype(F16).tobytes() + minimum.astype(F16).tobytes())


def encode_panel(panel: Array, valid: Array, bits: int, group: int, by_lane: bool) -> bytes:
    """Parameters and codes of a panel already divided by its factors.

    Args:
        panel: `[rows, lanes]`.
        valid: The same shape.
        bits: Of a code.
        group: Lanes that share parameters, 0: all.
        by_lane: Parameters belong to the lanes (balanced keys).
    """
    if bits == 16:
        return encode_plain(panel, valid)
    panel = np.where(valid, panel, 0).astype(F32)
    unit = unit_of(panel)
    x = (panel / unit).astype(F32)
    low, high = np.where(valid, x, np.inf), np.where(valid, x, -np.inf)
    if by_lane:
        ranges = [(low.min(0), high.max(0))]
    else:
        ranges = [(low[:, s].min(1), high[:, s].max(1)) for s in group_slices(x.shape[1], group)]
    codes = np.zeros(x.shape, np.uint8)
    scales, minima = [], []
    for s, (lowest, highest) in zip(group_slices(x.shape[1], group), ranges, strict=True):
        seen = lowest <= highest
        scale, minimum = parameters(np.where(seen, lowest, 0), np.where(seen, highest, 0), bits)
        scales.append(scale)
        minima.append(minimum)
        shape = (1, -1) if by_lane else (-1, 1)
        codes[:, s] = codes_of(x[:, s], scale.reshape(shape), minimum.reshape(shape), bits)
    codes[~valid] = 0
    scale, minimum = np.stack(scales, -1), np.stack(minima, -1)
    return parameter_part(unit, scale, minimum) + pad16(pack(codes, bits))


def stored_order(spec: PageSpec, valid: Array, importance: Array | None) -> Array:
    """Places of the tokens in stored order."""
    if not spec.two_classes:
        return np.arange(spec.page)
    assert importance is not None
    ranked = sorted(range(spec.page), key=lambda i: (not valid[i], -importance[i] if valid[i] else 0, i))
    return np.array(sorted(ranked[: spec.salient]) + sorted(ranked[spec.salient :]))


def class_marks(spec: PageSpec, order: Array) -> bytes:
    """A bit for each token, set for class 0, the first token in the lowest bit."""
    marks = np.zeros(spec.page, np.uint8)
    marks[order[: spec.salient]] = 1
    return np.packbits(marks, bitorder="little").tobytes()


def value_factors(values: Array, valid: Array) -> Array:
    """Factors of the channels of separable values."""
    largest = np.abs(values[valid]).max(0, initial=0).astype(F32)
    return np.where(largest == 0, F32(1), bf16_above(np.sqrt(largest))).astype(F32)


def key_factors(keys: Array, valid: Array, query_max: Array) -> Array:
    """Factors of the channels of balanced keys."""
    largest = np.abs(keys[valid]).max(0, initial=0).astype(F32)
    known = (largest != 0) & (query_max != 0)
    with np.errstate(all="ignore"):
        balance = np.clip(np.sqrt(query_max.astype(F32) / largest), F32(2.0**-6), F32(2.0**6))
    return bf16_near(F32(1) / np.where(known, balance, F32(1)).astype(F32))


def classes(spec: PageSpec) -> list[tuple[int, slice]]:
    """Class and stored places of the classes with tokens."""
    both = [(0, slice(0, spec.salient)), (1, slice(spec.salient, spec.page))]
    return [(c, s) for c, s in both if s.stop > s.start]


def encode(
    spec: PageSpec, keys: Array, values: Array, valid: Array, importance: Array | None, query_max: Array | None
) -> bytes:
    """The bytes of a page of `keys [page, D]` and `values [page, E]`."""
    order = stored_order(spec, valid, importance)
    out = pad16(class_marks(spec, order)) if spec.two_classes else b""
    value_factor = np.ones(spec.value_size, F32)
    key_factor = np.ones(spec.head_size, F32)
    if spec.value_scheme == "separable":
        value_factor = value_factors(values, valid)
        out += pad16(value_factor.astype(BF16).tobytes())
    if spec.key_scheme == "balanced":
        assert query_max is not None
        key_factor = key_factors(keys, valid, query_max)
        out += pad16(key_factor.astype(BF16).tobytes())
    keys, values, valid = keys[order].astype(F32), values[order].astype(F32), valid[order]
    for c, s in classes(spec):
        divided = keys[s] if spec.key_bits[c] == 16 else keys[s] / key_factor
        seen = np.broadcast_to(valid[s, None], divided.shape)
        by_lane = spec.key_scheme == "balanced"
        out += encode_panel(divided.T, seen.T, spec.key_bits[c], spec.key_group, by_lane)
        divided = values[s] if spec.value_bits[c] == 16 else values[s] / value_factor
        seen = np.broadcast_to(valid[s, None], divided.shape)
        out += encode_panel(divided, seen, spec.value_bits[c], spec.value_group, by_lane=False)
    return out


class Reader:
    """Takes parts from the bytes of a page, one after the other."""

    def __init__(self, page: Array) -> None:
        self.page = page
        self.at = 0

    def take(self, size: int) -> Array:
        """The next part, its padding skipped."""
        part = self.page[self.at : self.at + size]
        assert part.size == size
        self.at += -(-size // 16) * 16
        return part


def decode_panel(reader: Reader, shape: tuple[int, int], bits: int, group: int, by_lane: bool) -> Array:
    """The elements of a panel before its factors are applied."""
    rows, lanes = shape
    if bits == 16:
        padded = -(-lanes // 16) * 16
        return reader.take(2 * rows * padded).view(BF16).reshape(rows, padded)[:, :lanes].astype(F32)
    slices = group_slices(lanes, group)
    count = lanes if by_lane else rows * len(slices)
    part = reader.take(4 + 4 * count)
    unit = part[:4].view(F32)[0]
    both = part[4:].copy().view(F16).astype(F32) * unit
    scale, minimum = both[:count], both[count:]
    padded = -(-lanes // (128 // bits)) * (128 // bits)
    codes = unpack(reader.take(rows * padded * bits // 8), rows, lanes, bits).astype(F32)
    if by_lane:
        return codes * scale + minimum
    widths = [s.stop - s.start for s in slices]
    scale = np.repeat(scale.reshape(rows, -1), widths, axis=1)
    minimum = np.repeat(minimum.reshape(rows, -1), widths, axis=1)
    return codes * scale + minimum


def decode(spec: PageSpec, page: Array) -> tuple[Array, Array]:
    """Keys `[page, D]` and values `[page, E]` in stored order."""
    reader = Reader(page)
    if spec.two_classes:
        reader.take(-(-spec.page // 8))
    value_factor, key_factor = np.ones(spec.value_size, F32), np.ones(spec.head_size, F32)
    if spec.value_scheme == "separable":
        value_factor = reader.take(2 * spec.value_size).view(BF16).astype(F32)
    if spec.key_scheme == "balanced":
        key_factor = reader.take(2 * spec.head_size).view(BF16).astype(F32)
    keys, values = [], []
    for c, s in classes(spec):
        tokens = s.stop - s.start
        by_lane = spec.key_scheme == "balanced"
        k = decode_panel(reader, (spec.head_size, tokens), spec.key_bits[c], spec.key_group, by_lane).T
        keys.append(k if spec.key_bits[c] == 16 else k * key_factor)
        v = decode_panel(reader, (tokens, spec.value_size), spec.value_bits[c], spec.value_group, by_lane=False)
        values.append(v if spec.value_bits[c] == 16 else v * value_factor)
    assert reader.at == page.size
    return np.concatenate(keys), np.concatenate(values)
