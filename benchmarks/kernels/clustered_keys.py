"""Synthetic keys in clusters, and the inputs that bring the clusters to `effc.CachedAttention`."""

from __future__ import annotations

import numpy as np

from effc.ir.dialect.selections import ClusterSelection
from effc.runtime.clusters import PARENT_CLUSTERS, PARENT_REACH, REACH, key_weights, passing, radii

OBSERVED = ClusterSelection().observed


def clustered_keys(heads: int, tokens: int, size: int, cluster_tokens: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Keys [1, heads, tokens, size], those of a cluster and of a parent side by side, and clusters without thresholds.

    As many clusters and parents as a prefix of so many tokens has; the last tokens are in none.
    """
    rng = np.random.default_rng(4)
    count = tokens - OBSERVED
    clusters = count // cluster_tokens
    parents = clusters // PARENT_CLUSTERS
    of = np.sort(rng.integers(0, clusters, count))
    above = np.arange(clusters) * parents // clusters
    ends = np.cumsum(np.bincount(of, minlength=clusters))
    parent_ends = np.cumsum(np.bincount(above, minlength=parents))
    spread = rng.standard_normal((heads, parents, size), np.float32)[:, above]
    spread += 0.5 * rng.standard_normal(spread.shape, np.float32)
    keys = 0.3 * rng.standard_normal((heads, tokens, size), np.float32)
    keys[:, :count] += spread[:, of]
    above_ends = ends[parent_ends - 1]
    centroids, means = _means(keys[:, :count], ends), _means(keys[:, :count], above_ends)
    found = {
        "centroids": centroids,
        "ends": np.broadcast_to(ends.astype(np.int32), (heads, clusters)),
        "radii": REACH * _radii(keys[:, :count], centroids, ends),
        "parents": means,
        "parent_ends": np.broadcast_to(parent_ends.astype(np.int32), (heads, parents)),
        "parent_radii": PARENT_REACH * _radii(keys[:, :count], means, above_ends),
    }
    return keys[None], {name: np.ascontiguousarray(array[None]) for name, array in found.items()}


def thresholds(clusters: dict[str, np.ndarray], queries: np.ndarray, scale: float, keep: float) -> np.ndarray:
    """Thresholds [2] that let the share `keep` of the clustered keys pass for queries [heads, group, size]."""
    first = _parent_weights(clusters, queries, scale)
    upper = np.quantile(first, 1 - passing(keep))
    reached, last = _below(clusters, first > upper, queries, scale)
    return np.array([upper, np.quantile(np.where(reached, last, -1), 1 - keep)], np.float32)


def tokens_read(
    clusters: dict[str, np.ndarray], limits: np.ndarray, queries: np.ndarray, scale: float
) -> tuple[int, int]:
    """Clustered tokens that all heads read, and clusters with whose centroids they compare."""
    counts = np.diff(clusters["ends"][0, 0], prepend=0)
    first = _parent_weights(clusters, queries, scale)
    reached, last = _below(clusters, first > limits[0], queries, scale)
    return int((counts * (reached & (last > limits[1]))).sum()), int(reached.sum())


def _parent_weights(clusters: dict[str, np.ndarray], queries: np.ndarray, scale: float) -> np.ndarray:
    counts = np.diff(clusters["ends"][0, 0][clusters["parent_ends"][0, 0] - 1], prepend=0)
    return _weights(queries, clusters["parents"][0], clusters["parent_radii"][0], counts, scale)


def _below(
    clusters: dict[str, np.ndarray], parents: np.ndarray, queries: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Clusters below such parents, and the weights of all then."""
    reached = np.repeat(parents, np.diff(clusters["parent_ends"][0, 0], prepend=0), axis=1)
    counts = np.diff(clusters["ends"][0, 0], prepend=0) * reached
    return reached, _weights(queries, clusters["centroids"][0], clusters["radii"][0], counts, scale)


def _weights(
    queries: np.ndarray, centroids: np.ndarray, beyond: np.ndarray, counts: np.ndarray, scale: float
) -> np.ndarray:
    lengths = np.linalg.norm(queries, axis=2, keepdims=True)
    scores = scale * (queries @ centroids.transpose(0, 2, 1) + lengths * beyond[:, None])
    wide = np.broadcast_to(counts, (len(queries), counts.shape[-1]))
    return key_weights(scores, wide[:, None]).mean(axis=1)


def _radii(keys: np.ndarray, means: np.ndarray, ends: np.ndarray) -> np.ndarray:
    counts = np.diff(ends, prepend=0)
    return np.stack([radii(one, mean, counts) for one, mean in zip(keys, means)])


def _means(keys: np.ndarray, ends: np.ndarray) -> np.ndarray:
    counts = np.diff(ends, prepend=0)
    starts = (ends - counts)[counts > 0]
    means = np.zeros((keys.shape[0], len(ends), keys.shape[2]), np.float32)
    means[:, counts > 0] = np.add.reduceat(keys, starts, axis=1) / counts[counts > 0, None]
    return means
