"""A prefix of low rank in float64, from docs/cached-attention.md, section "Selection"."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from attention_feeds import angles
from attention_oracle import Form, rotate

BLOCK = 8


@dataclass(frozen=True)
class Prefix:
    """The inputs behind the cache, as the op takes them."""

    tokens: np.ndarray
    basis: np.ndarray
    values: np.ndarray
    landmarks: np.ndarray
    outliers: np.ndarray
    outlier_keys: np.ndarray

    @staticmethod
    def empty(form: Form, dtype: np.dtype) -> Prefix:
        heads, d, e = form.kv_heads, form.head_size, form.value_size
        shapes = [
            (1, 0, 0),
            (1, heads, d, 0),
            (1, heads, 0, e),
            (1, heads, 0, d),
            (1, heads, 0),
            (1, heads, 0, BLOCK, d),
        ]
        return Prefix(*(np.zeros(shape, np.int32 if i == 4 else dtype) for i, shape in enumerate(shapes)))

    def inputs(self) -> dict[str, np.ndarray]:
        return dict(vars(self))

    def cast(self, dtype: np.dtype) -> Prefix:
        """With matrices of another type."""
        return Prefix(*(one if one.dtype == np.int32 else one.astype(dtype) for one in self.inputs().values()))

    @property
    def count(self) -> int:
        return self.tokens.shape[1]


def rebuilt(form: Form, prefix: Prefix) -> np.ndarray:
    """Keys [K, P, D] as queries meet them, without outliers."""
    plain = np.einsum("pr,kdr->kpd", *(one[0].astype(np.float64) for one in (prefix.tokens, prefix.basis)))
    if form.rotary == "none":
        return plain
    return rotate(plain[None], *angles(form, np.arange(prefix.count)[None]), form)[0]


def keys_of(form: Form, prefix: Prefix) -> np.ndarray:
    """The same with outliers."""
    keys = rebuilt(form, prefix).reshape(form.kv_heads, -1, BLOCK, form.head_size)
    np.put_along_axis(keys, prefix.outliers[0][:, :, None, None].astype(np.int64), prefix.outlier_keys[0], axis=1)
    return keys.reshape(form.kv_heads, -1, form.head_size)


def random_outliers(form: Form, count: int, outliers: int) -> np.ndarray:
    """So many chunks of every key head, ascending."""
    rng = np.random.default_rng(5)
    chosen = [np.sort(rng.permutation(count // BLOCK)[:outliers]) for _ in range(form.kv_heads)]
    return np.array([chosen], np.int32)


def random_prefix(form: Form, count: int, rank: int, outliers: np.ndarray, dtype: np.dtype) -> Prefix:
    """Random matrices, landmarks that are the means of what they make, and other keys of the chunks `outliers`."""
    rng = np.random.default_rng(5)
    heads, d, chunks = form.kv_heads, form.head_size, count // BLOCK
    prefix = Prefix(
        rng.standard_normal((1, count, rank)).astype(dtype),
        (rng.standard_normal((1, heads, d, rank)) / math.sqrt(rank)).astype(dtype),
        rng.standard_normal((1, heads, count, form.value_size)).astype(dtype),
        np.zeros((1, heads, chunks, d), dtype),
        outliers,
        rng.standard_normal((1, heads, outliers.shape[2], BLOCK, d)).astype(dtype),
    )
    landmarks = keys_of(form, prefix).reshape(heads, chunks, BLOCK, d).mean(axis=2)
    return replace(prefix, landmarks=landmarks[None].astype(dtype))


def read_slots(form: Form, prefix: Prefix, head: int, queries: np.ndarray, total: int, wanted: int) -> np.ndarray:
    """Bool [total]: what a key head reads for queries [G, D] of one token; so many chunks and the outliers."""
    slots = np.ones(total, bool)
    chunks = prefix.count // BLOCK
    if wanted >= chunks:
        return slots
    scores = queries @ prefix.landmarks[0, head].astype(np.float64).T * form.scale
    shares = scores - np.log(np.exp(scores - scores.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
    ranks = (shares - scores.max(axis=1, keepdims=True)).max(axis=0)
    outliers = prefix.outliers[0, head]
    ranks[outliers] = np.inf
    best = np.argsort(-ranks, kind="stable")[: min(chunks, wanted + len(outliers))]
    slots[: prefix.count] = np.repeat(np.isin(np.arange(chunks), best), BLOCK)
    return slots
