"""Prefixes that a cache is given between a prompt and the steps after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from attention_feeds import angles
from attention_oracle import rotate
from cluster_oracle import Clusters
from lowrank_oracle import BLOCK, Prefix, random_prefix
from selected_cache import Cache

CLUSTERED, LOW_RANK = 180, 22 * BLOCK
"""Tokens of a prefix in clusters, and of one of low rank."""


def clusters_above(*thresholds: float) -> Callable[[Cache], None]:
    """Gives a cache 15 clusters in 5 parents, other ones for each key head."""

    def give(cache: Cache) -> None:
        form, rng = cache.form, np.random.default_rng(1)
        ends = np.sort(rng.integers(0, CLUSTERED, (1, form.kv_heads, 15)), axis=2)
        ends[:, :, -1] = CLUSTERED
        parent_ends = np.broadcast_to([2, 5, 9, 10, 15], (1, form.kv_heads, 5))
        vectors = [rng.standard_normal((1, form.kv_heads, n, form.head_size)) / 4 for n in (15, 5)]
        give_clusters(cache, vectors[0], ends, vectors[1], parent_ends, thresholds, radius=0.3)

    return give


def clusters_at_the_threshold(cache: Cache) -> None:
    """Gives a cache 16 clusters of 8 keys with one centroid."""
    form = cache.form
    ends = np.broadcast_to(np.arange(8, 129, 8), (1, form.kv_heads, 16))
    parent_ends = np.broadcast_to([16], (1, form.kv_heads, 1))
    vectors = [np.ones((1, form.kv_heads, n, form.head_size)) for n in (16, 1)]
    give_clusters(cache, vectors[0], ends, vectors[1], parent_ends, (-1, 1 / 128))


def give_clusters(
    cache: Cache,
    centroids: np.ndarray,
    ends: np.ndarray,
    parents: np.ndarray,
    parent_ends: np.ndarray,
    thresholds: Sequence[float],
    radius: float = 0,
) -> None:
    """As inputs, centroids and parents in the type of the cache, with random radii up to one."""
    rng = np.random.default_rng(2)
    clusters = Clusters(
        centroids=centroids,
        ends=ends.astype(np.int32),
        radii=radius * rng.random(ends.shape, np.float32),
        parents=parents,
        parent_ends=parent_ends.astype(np.int32),
        parent_radii=radius * rng.random(parent_ends.shape, np.float32),
        thresholds=np.array(thresholds, np.float32),
    )
    cache.give(clusters.rounded(cache.past[0].dtype).inputs())


def outlier_chunks(head: int) -> list[int]:
    """Three, other ones for each key head."""
    return [head, head + 2, head + 4]


def low_rank(cache: Cache) -> None:
    """Gives a cache random matrices."""
    form = cache.form
    outliers = np.array([[outlier_chunks(head) for head in range(form.kv_heads)]], np.int32)
    give_low_rank(cache, random_prefix(form, LOW_RANK, 12, outliers, np.dtype(np.float32)))


def low_rank_alike(cache: Cache) -> None:
    """Gives a cache random matrices with landmarks that are alike."""
    low_rank(cache)
    cache.give(cache.constants | {"landmarks": np.ones_like(cache.constants["landmarks"])})


def own_tokens(cache: Cache) -> None:
    """Gives a cache the tokens that it has, of the rank that they have: not low."""
    form = cache.form
    keys, values = (tensor[0, :, :LOW_RANK].astype(np.float32) for tensor in cache.past)
    if form.rotary != "none":
        cos, sin = angles(form, np.arange(LOW_RANK)[None])
        keys = rotate(keys[None], cos, -sin, form)[0]
    heads, rank = form.kv_heads, form.kv_heads * form.head_size
    prefix = Prefix(
        tokens=keys.transpose(1, 0, 2).reshape(1, LOW_RANK, rank),
        basis=np.eye(rank).reshape(1, heads, form.head_size, rank),
        values=values[None],
        landmarks=np.zeros((1, heads, LOW_RANK // BLOCK, form.head_size)),
        outliers=np.zeros((1, heads, 0), np.int32),
        outlier_keys=np.zeros((1, heads, 0, BLOCK, form.head_size)),
    )
    give_low_rank(cache, prefix)


def give_low_rank(cache: Cache, prefix: Prefix) -> None:
    """As inputs, in the type of the cache."""
    cache.give(cache.constants | prefix.cast(cache.past[0].dtype).inputs())
