"""Which clusters a step reads, in float64, from docs/cached-attention.md, section "Selection"."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from attention_oracle import Form


@dataclass(frozen=True)
class Clusters:
    """The inputs behind the cache, as the op takes them."""

    centroids: np.ndarray
    ends: np.ndarray
    radii: np.ndarray
    parents: np.ndarray
    parent_ends: np.ndarray
    parent_radii: np.ndarray
    thresholds: np.ndarray

    @staticmethod
    def empty(form: Form) -> Clusters:
        vectors, numbers = np.zeros((1, form.kv_heads, 0, form.head_size), np.float32), np.zeros((1, form.kv_heads, 0))
        ends, radii = numbers.astype(np.int32), numbers.astype(np.float32)
        return Clusters(vectors, ends, radii, vectors, ends, radii, np.zeros(2, np.float32))

    def inputs(self) -> dict[str, np.ndarray]:
        return dict(vars(self))

    def rounded(self, dtype: np.dtype) -> Clusters:
        """With centroids and parents of another type."""
        return replace(self, centroids=self.centroids.astype(dtype), parents=self.parents.astype(dtype))


def key_weights(
    form: Form, queries: np.ndarray, centroids: np.ndarray, radii: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Mean over queries [G, D] of exp(s_j) / sum of n_i exp(s_i), [clusters]."""
    beyond = np.sqrt((queries**2).sum(axis=1, keepdims=True)) * radii.astype(np.float64)
    scores = (queries @ centroids.astype(np.float64).T + beyond) * form.scale
    if form.softcap:
        scores = form.softcap * np.tanh(scores / form.softcap)
    filled = counts > 0
    if not filled.any():
        return np.zeros(len(counts))
    top = scores[:, filled].max(axis=1, keepdims=True)
    weights = np.where(filled, np.exp(np.minimum(scores - top, 0)), 0)
    return np.asarray((weights / (weights @ counts)[:, None]).mean(axis=0))


def parent_weights(form: Form, clusters: Clusters, head: int, queries: np.ndarray) -> np.ndarray:
    """Of each parent of a head."""
    starts = np.concatenate([[0], clusters.ends[0, head]])
    bounds = starts[np.concatenate([[0], clusters.parent_ends[0, head]])]
    return key_weights(form, queries, clusters.parents[0, head], clusters.parent_radii[0, head], np.diff(bounds))


def cluster_weights(form: Form, clusters: Clusters, head: int, queries: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """Of each cluster of a head whose parent is among `parents`, bool; -1 for the others."""
    counts = np.diff(clusters.ends[0, head], prepend=0)
    of = np.searchsorted(clusters.parent_ends[0, head], np.arange(len(counts)), side="right")
    reached = parents[of]
    centroids, radii = clusters.centroids[0, head], clusters.radii[0, head]
    found = key_weights(form, queries, centroids, radii, np.where(reached, counts, 0))
    return np.where(reached, found, -1)


def read_slots(form: Form, clusters: Clusters, head: int, queries: np.ndarray, total: int) -> np.ndarray:
    """Bool [total]: what a key head reads for queries [G, D] of one token."""
    ends = clusters.ends[0, head]
    slots = np.ones(total, bool)
    if not len(ends):
        return slots
    first, second = clusters.thresholds.astype(np.float64)
    parents = parent_weights(form, clusters, head, queries) > first
    chosen = (cluster_weights(form, clusters, head, queries, parents) > second) & parents[
        np.searchsorted(clusters.parent_ends[0, head], np.arange(len(ends)), side="right")
    ]
    begin = 0
    for end, keep in zip(ends, chosen):
        slots[begin:end] = keep
        begin = end
    return slots
