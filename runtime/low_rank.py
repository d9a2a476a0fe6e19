"""A prefix of low rank: its keys as a product of two small matrices, landmarks of its chunks, and what is unlike them.

ShadowKV (Sun et al. 2024, arXiv 2410.21465, algorithm 1). `docs/prefix.md` says what a prefix holds of it.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

import numpy as np

from effc.errors import UsageError
from effc.runtime.bundle import CacheLayout, LowRankPorts
from effc.runtime.shared_weights import weight_array
from effc.runtime.tensors import to_floats, to_stored

LOCAL_CHUNKS = 4
"""Chunks at the end of a prefix that stay in the cache."""
RANK_SHARE = 5 / 32
"""Rank, unless given, as a share of the elements of a token's keys: 160 of 1024, as in the paper."""
RANK_STEP, LEAST_RANK = 16, 64
CHUNKS_OF_AN_OUTLIER, MOST_OUTLIERS = 64, 48
"""Of so many chunks one is an outlier unless told otherwise, and so many at most."""
ROWS = 4096
"""Tokens whose products are summed at once."""


def low_rank_cache(
    layout: CacheLayout,
    folder: Path,
    cache: MutableMapping[str, np.ndarray],
    tokens: int,
    *,
    rank: int | None = None,
    outliers: int | None = None,
) -> dict[str, np.ndarray]:
    """What stands for the first tokens of a cache of one row, which are taken out of it.

    Args:
        layout: Of the engine.
        folder: The engine folder.
        cache: Cache input name -> tensor; keys and values lose the tokens that inputs stand for.
        tokens: Tokens of the cache.
        rank: Columns of the matrices; None: 5 of 32 elements of a token's keys, a multiple of 16, and at least 64.
        outliers: Chunks of every key head that keep their keys; None: one in 64, at most 48.

    Returns:
        Input name -> tensor; none for an attention of which the last tokens are all there are.

    Raises:
        UsageError: The engine has angles of fewer positions.
    """
    found: dict[str, np.ndarray] = {}
    for ports in layout.low_rank:
        chunks = tokens // ports.chunk - LOCAL_CHUNKS
        if chunks < 1:
            continue
        count = chunks * ports.chunk
        keys = to_floats(cache[ports.key][0, :, :count], ports.dtype)
        plain = unrotated(keys, *_angles(ports, folder, count))
        coefficients, basis = factors(plain, _default_rank(keys) if rank is None else rank)
        grouped = keys.reshape(len(keys), chunks, ports.chunk, -1)
        landmarks = grouped.mean(axis=2)
        fallback = min(MOST_OUTLIERS, chunks // CHUNKS_OF_AN_OUTLIER)
        chosen = unlike(grouped, landmarks, fallback if outliers is None else min(outliers, chunks))
        kept = np.take_along_axis(grouped, chosen[:, :, None, None], axis=1)
        values = cache[ports.value][:, :, :count]
        stored = [to_stored(array[None], ports.dtype) for array in (coefficients, basis, landmarks, kept)]
        tensors = (stored[0], stored[1], np.ascontiguousarray(values), stored[2], chosen[None], stored[3])
        found.update(zip((port.name for port in ports.inputs), tensors, strict=True))
        for name in (ports.key, ports.value):
            cache[name] = np.ascontiguousarray(cache[name][:, :, count:])
    return found


def factors(keys: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest product of this rank to the keys of all heads together: a truncated singular value decomposition.

    The right vectors are eigenvectors of the products of all elements, in float64, so that no matrix is larger than
    the elements of a token squared.

    Args:
        keys: float32 [heads, tokens, D].
        rank: Columns, at least 1; no more are taken than there are elements or tokens.

    Returns:
        Coefficients float32 [tokens, rank] and basis float32 [heads, D, rank]; key t of head h is nearly
        `basis[h] @ coefficients[t]`.
    """
    heads, tokens, size = keys.shape
    together = keys.transpose(1, 0, 2).reshape(tokens, heads * size)
    products = np.zeros((heads * size, heads * size))
    for begin in range(0, tokens, ROWS):
        rows = together[begin : begin + ROWS].astype(np.float64)
        products += rows.T @ rows
    _, vectors = np.linalg.eigh(products)
    best = vectors[:, ::-1][:, : min(rank, tokens)].astype(np.float32)
    return together @ best, best.reshape(heads, size, -1)


def unlike(keys: np.ndarray, landmarks: np.ndarray, count: int) -> np.ndarray:
    """Chunks with a key whose direction is farthest from the landmark's, int32 [heads, count], ascending.

    Args:
        keys: [heads, chunks, tokens of a chunk, D].
        landmarks: Means of the chunks, [heads, chunks, D].
        count: How many; of equal ones the earlier.
    """
    lengths = np.linalg.norm(keys, axis=3) * np.linalg.norm(landmarks, axis=2)[:, :, None]
    products = np.einsum("hctd,hcd->hct", keys, landmarks)
    least = np.where(lengths > 0, products / np.where(lengths > 0, lengths, 1), 0).min(axis=2)
    order = np.argsort(least, axis=1, kind="stable")[:, :count]
    return np.sort(order, axis=1).astype(np.int32)


def unrotated(keys: np.ndarray, rotary: str, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
    """Keys as they were before they were rotated, and scaled where cosines and sines are.

    Args:
        keys: [heads, tokens, D].
        rotary: `none`, `half` or `interleaved`.
        cosines: [tokens, elements / 2].
        sines: As cosines.
    """
    if rotary == "none":
        return keys
    half = cosines.shape[1]
    places = (slice(0, half), slice(half, 2 * half))
    if rotary == "interleaved":
        places = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    first, second = (keys[:, :, place] for place in places)
    scale = 1 / (cosines**2 + sines**2)
    plain = keys.copy()
    plain[:, :, places[0]] = (first * cosines + second * sines) * scale
    plain[:, :, places[1]] = (second * cosines - first * sines) * scale
    return plain


def _default_rank(keys: np.ndarray) -> int:
    elements = keys.shape[0] * keys.shape[2]
    return min(elements, max(LEAST_RANK, -(-int(elements * RANK_SHARE) // RANK_STEP) * RANK_STEP))


def _angles(ports: LowRankPorts, folder: Path, count: int) -> tuple[str, np.ndarray, np.ndarray]:
    """How keys are rotated, and the cosines and sines of the first positions."""
    if ports.rotary == "none":
        return ports.rotary, np.zeros((0, 0)), np.zeros((0, 0))
    cosines, sines = (weight_array(folder, angles)[0] for angles in ports.angles)
    if count > len(cosines):
        raise UsageError(
            f"{folder}: takes {len(cosines)} tokens of a prefix of low rank, {count} were given. "
            f"Build it with sparse-attention{{scheme=lowrank,longest={count}}}."
        )
    return ports.rotary, cosines[:count], sines[:count]
