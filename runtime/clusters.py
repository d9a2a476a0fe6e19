"""Clusters of the keys of a prefix: how they are made, and which thresholds let a step read a share of the keys.

Squeezed Attention (Hooper et al. 2024, arXiv 2411.09688). `docs/prefix.md` says what a prefix holds of it.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from effc.runtime.bundle import CacheLayout, ClusterPorts
from effc.runtime.kmeans import kmeans, sums_by_label, unit_rows
from effc.runtime.prefix_inputs import empty_inputs
from effc.runtime.tensors import to_floats, to_stored

CLUSTER_TOKENS, PARENT_CLUSTERS = 10, 5
"""Tokens of a cluster and clusters of a parent, the means."""
KEEP = 0.25
SURVIVING, ASKED = 3.0, 0.75
"""Parents let so many times the keys pass that clusters keep, where that is less than this share. They let all pass
otherwise: they would spare hardly more centroids than there are parents."""
REACH, PARENT_REACH = 1.8, 2.0
"""How far beyond their mean a query expects keys of clusters and of parents: so many times `radii`."""
EVERYTHING = np.array([-1, -1], np.float32)
"""Thresholds below any weight."""


@dataclass(frozen=True)
class ClusterTree:
    """The clusters of one key head, in the order in which its tokens then lie.

    Attributes:
        centroids: Means of the keys of each cluster, float32 [clusters, D]; zeros where it has none.
        ends: Token behind each cluster, int32 [clusters].
        radii: What a query of length 1 adds to its product with each centroid, float32 [clusters].
        parents: Means of the keys of each parent, [parents, D].
        parent_ends: Cluster behind each parent, int32 [parents].
        parent_radii: What it adds to that with each parent, [parents].
        order: Tokens in their new order, [tokens].
    """

    centroids: np.ndarray
    ends: np.ndarray
    radii: np.ndarray
    parents: np.ndarray
    parent_ends: np.ndarray
    parent_radii: np.ndarray
    order: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Tokens of each cluster, float32."""
        return np.diff(self.ends, prepend=0).astype(np.float32)

    @property
    def parent_of(self) -> np.ndarray:
        """Parent of each cluster."""
        return np.searchsorted(self.parent_ends, np.arange(len(self.ends)), side="right")

    @property
    def parent_counts(self) -> np.ndarray:
        """Tokens of each parent, float32."""
        counts = np.bincount(self.parent_of, self.counts, minlength=len(self.parent_ends))
        return counts.astype(np.float32)


@dataclass(frozen=True)
class _Layer:
    """Trees of the key heads of one attention, and the queries [K, G, w, D] by which thresholds are set."""

    ports: ClusterPorts
    trees: Sequence[ClusterTree]
    queries: np.ndarray


def cluster_cache(
    layout: CacheLayout,
    cache: MutableMapping[str, np.ndarray],
    tokens: int,
    *,
    keep: float = KEEP,
    cluster_tokens: int = CLUSTER_TOKENS,
) -> dict[str, np.ndarray]:
    """Cluster the keys of a cache of one row and put its tokens in their order.

    Args:
        layout: Of the engine.
        cache: Cache input name -> tensor; keys and values that are clustered are replaced by reordered ones.
        tokens: Tokens of the cache.
        keep: Share of the clustered keys that a step is to read, the mean over layers, heads and the last queries.
        cluster_tokens: Tokens of a cluster, the mean.

    Returns:
        Input name -> tensor, all that the layout names. Empty tensors where the last tokens are all there are.
    """
    observed = max((cache[ports.queries].shape[2] for ports in layout.clusters), default=tokens)
    if tokens <= observed:
        return empty_inputs(layout)
    layers = [_layer(ports, cache, tokens - observed, cluster_tokens) for ports in layout.clusters]
    limits = EVERYTHING if keep == 1 else thresholds(layers, keep)
    found: dict[str, np.ndarray] = {}
    for layer in layers:
        found.update(zip((port.name for port in layer.ports.inputs), [*_stacked(layer), limits], strict=True))
        for name in (layer.ports.key, layer.ports.value):
            moved = [cache[name][0, head, tree.order] for head, tree in enumerate(layer.trees)]
            cache[name][0, :, : len(layer.trees[0].order)] = moved
    return found


def cluster_tree(keys: np.ndarray, cluster_tokens: int = CLUSTER_TOKENS) -> ClusterTree:
    """Clusters of the keys of one head and, above them, parents.

    Keys are assigned by direction, as in the paper; a centroid is the mean of the keys themselves. The first key has a
    cluster and a parent of its own.

    Args:
        keys: float32 [n, D], n >= 1.
        cluster_tokens: Tokens of a cluster, the mean.
    """
    count = max(1, len(keys) // cluster_tokens)
    above = max(1, count // PARENT_CLUSTERS)
    labels = _labels(unit_rows(keys), count)
    sums, counts = sums_by_label(keys, labels, count)
    centroids = sums / np.maximum(counts, 1)[:, None]
    parents = np.zeros(count, np.int64)
    parents[counts > 0] = _labels(unit_rows(centroids[counts > 0]), above)  # those without keys go anywhere
    by_parent = np.argsort(parents, kind="stable")
    rank = np.empty(count, np.int64)
    rank[by_parent] = np.arange(count)
    parent_sums, _ = sums_by_label(sums, parents, above)
    tokens = np.bincount(parents, counts, minlength=above).astype(np.float32)
    means = parent_sums / np.maximum(tokens, 1)[:, None]
    order = np.argsort(rank[labels], kind="stable")
    return ClusterTree(
        centroids=centroids[by_parent],
        ends=np.cumsum(counts[by_parent]).astype(np.int32),
        radii=REACH * radii(keys[order], centroids[by_parent], counts[by_parent]),
        parents=means,
        parent_ends=np.cumsum(np.bincount(parents, minlength=above)).astype(np.int32),
        parent_radii=PARENT_REACH * radii(keys[order], means, tokens),
        order=order,
    )


def _labels(points: np.ndarray, count: int) -> np.ndarray:
    """Labels of `kmeans`, but the first point alone has the first one where there are several.

    Much attention goes to the first token wherever nothing matters (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453),
    and its key is like no other.
    """
    if count == 1 or len(points) == 1:
        return np.zeros(len(points), np.int64)
    return np.concatenate([np.zeros(1, np.int64), 1 + kmeans(points[1:], count - 1)])


def radii(keys: np.ndarray, means: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How far the farthest of the keys of a cluster reaches beyond their mean in a random direction.

    Its distance times the standard deviation of one element of such a direction, 1 / sqrt(D). The mean of keys says
    little about the largest of their scores, the less the more they are.

    Args:
        keys: float32 [n, D], those of a cluster side by side.
        means: Of each cluster, [clusters, D].
        counts: Keys of each cluster.

    Returns:
        float32 [clusters]; 0 where it has no keys.
    """
    found, sizes = counts > 0, counts.astype(np.int64)
    distances = np.linalg.norm(keys - np.repeat(means, sizes, axis=0), axis=1)
    farthest = np.zeros(len(counts), np.float32)
    farthest[found] = np.maximum.reduceat(distances, (np.cumsum(sizes) - sizes)[found])
    return np.asarray(farthest / np.sqrt(np.float32(keys.shape[1])))


def thresholds(layers: Sequence[_Layer], keep: float) -> np.ndarray:
    """Thresholds of parents and of clusters, float32 [2], the same for all layers and heads.

    A step reads with one query, so the quantiles are those of single queries, not of their mean.
    """
    heads = [(layer, head) for layer in layers for head in range(len(layer.trees))]
    above = [_weights(layer, head, None) for layer, head in heads]
    parents = [np.broadcast_to(layer.trees[head].parent_counts, one.shape) for (layer, head), one in zip(heads, above)]
    first = _threshold(above, parents, passing(keep))
    below = [_weights(layer, head, one > first) for (layer, head), one in zip(heads, above)]
    counts = [np.broadcast_to(layer.trees[head].counts, one.shape) for (layer, head), one in zip(heads, below)]
    return np.array([first, _threshold(below, counts, keep)], np.float32)


def passing(keep: float) -> float:
    """Share of the keys that parents let pass where clusters keep a share."""
    return SURVIVING * keep if SURVIVING * keep < ASKED else 1.0


def key_weights(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Softmax weight of one key of each cluster, `exp(s_j) / sum of n_i exp(s_i)`; 0 where none has keys.

    Args:
        scores: [.., clusters].
        counts: Keys of each, broadcast to it.
    """
    most = np.max(np.where(counts > 0, scores, -np.inf), axis=-1, keepdims=True)
    shifted = np.exp(np.minimum(scores - np.where(np.isfinite(most), most, 0), 80))
    total = (counts * shifted).sum(axis=-1, keepdims=True)
    return np.asarray(np.where(total > 0, shifted / np.where(total > 0, total, 1), 0), np.float32)


def _layer(ports: ClusterPorts, cache: Mapping[str, np.ndarray], count: int, cluster_tokens: int) -> _Layer:
    """The clusters of the first tokens of one attention, centroids as they are stored."""
    queries, trees = cache[ports.queries][0], []
    for keys in to_floats(cache[ports.key][0, :, :count], ports.dtype):
        tree = cluster_tree(keys, cluster_tokens)
        rounded = [to_floats(to_stored(one, ports.dtype), ports.dtype) for one in (tree.centroids, tree.parents)]
        trees.append(replace(tree, centroids=rounded[0], parents=rounded[1]))
    return _Layer(ports, trees, queries.reshape(len(trees), -1, *queries.shape[1:]))


def _stacked(layer: _Layer) -> list[np.ndarray]:
    """What trees hold of all heads but the order, as the inputs take it."""
    dtype = layer.ports.dtype
    stacked = {
        name: np.stack([getattr(tree, name) for tree in layer.trees])[None]
        for name in ("centroids", "ends", "radii", "parents", "parent_ends", "parent_radii")
    }
    vectors = ("centroids", "parents")
    return [to_stored(array, dtype) if name in vectors else array for name, array in stacked.items()]


def _weights(layer: _Layer, head: int, surviving: np.ndarray | None) -> np.ndarray:
    """Mean over the query heads of a group of `key_weights`, [w, parents], or [w, clusters] below surviving parents.

    Clusters of other parents get -1.
    """
    tree = layer.trees[head]
    centroids, beyond, counts = (
        (tree.parents, tree.parent_radii, tree.parent_counts)
        if surviving is None
        else (tree.centroids, tree.radii, tree.counts)
    )
    queries = layer.queries[head]
    lengths = np.linalg.norm(queries, axis=-1, keepdims=True)
    scores = layer.ports.scale * (queries @ centroids.T + lengths * beyond)
    if layer.ports.softcap:
        scores = layer.ports.softcap * np.tanh(scores / layer.ports.softcap)
    if surviving is None:
        return np.asarray(key_weights(scores, counts).mean(axis=0))
    reached = surviving[:, tree.parent_of]
    return np.where(reached, key_weights(scores, np.where(reached, counts, 0)).mean(axis=0), np.float32(-1))


def _threshold(weights: Sequence[np.ndarray], counts: Sequence[np.ndarray], keep: float) -> float:
    """The least weight above which lies at most the share `keep` of the keys."""
    values = np.concatenate([one.ravel() for one in weights])
    order = np.argsort(-values, kind="stable")
    before = np.cumsum(np.concatenate([one.ravel() for one in counts])[order], dtype=np.float64)
    place = np.searchsorted(before, keep * before[-1], side="right")
    return float(values[order[min(place, len(order) - 1)]]) if keep < 1 else -1.0
