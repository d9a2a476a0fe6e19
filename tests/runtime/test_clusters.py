"""Clusters of a prefix: trees, the order of tokens, thresholds, and what a layout says of them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

from effc.errors import EngineError
from effc.runtime.bundle import CacheLayout, CachePort, ClusterPorts, Port
from effc.runtime.clusters import (
    cluster_cache,
    cluster_tree,
    key_weights,
    radii,
)
from effc.runtime.prefix_inputs import check_inputs, empty_inputs, prefix_ports

HEADS, KV_HEADS, SIZE, OBSERVED, SCALE = 6, 2, 16, 20, 0.3


def layout(layers: int = 1, dtype: str = "float32", softcap: float = 0.0) -> CacheLayout:
    ports, clusters = [], []
    for layer in range(layers):
        kinds = {
            "key": (dtype, ["batch", KV_HEADS, "past", SIZE]),
            "value": (dtype, ["batch", KV_HEADS, "past", SIZE]),
            "queries": ("float32", ["batch", HEADS, OBSERVED, SIZE]),
        }
        names = {kind: f"past_key_values.{layer}.{kind}" for kind in kinds}
        ports += [CachePort(names[kind], f"present.{layer}.{kind}", *form) for kind, form in kinds.items()]
        inputs = [
            Port(f"clusters.{layer}.centroids", dtype, [1, KV_HEADS, "clusters", SIZE]),
            Port(f"clusters.{layer}.ends", "int32", [1, KV_HEADS, "clusters"]),
            Port(f"clusters.{layer}.radii", "float32", [1, KV_HEADS, "clusters"]),
            Port(f"clusters.{layer}.parents", dtype, [1, KV_HEADS, "parents", SIZE]),
            Port(f"clusters.{layer}.parent_ends", "int32", [1, KV_HEADS, "parents"]),
            Port(f"clusters.{layer}.parent_radii", "float32", [1, KV_HEADS, "parents"]),
            Port("clusters.thresholds", "float32", [2]),
        ]
        clusters.append(ClusterPorts(**names, dtype=dtype, scale=SCALE, softcap=softcap, inputs=inputs))
    return CacheLayout("in-place", ports, clusters=clusters)


def random_cache(of: CacheLayout, tokens: int) -> dict[str, np.ndarray]:
    """Keys lie around a few directions; values count the tokens."""
    rng = np.random.default_rng(7)
    cache = {}
    for port in of.clusters:
        shape = (1, KV_HEADS, tokens, SIZE)
        centres = 2 * rng.standard_normal((KV_HEADS, 30, SIZE))
        keys = centres[:, rng.integers(0, 30, tokens)][None] + 0.3 * rng.standard_normal(shape)
        values = np.broadcast_to(np.arange(tokens, dtype=np.float32)[None, None, :, None], shape)
        stored = ml_dtypes.bfloat16 if port.dtype == "bfloat16" else port.dtype
        carried = [array.astype(stored) for array in (keys, values)]
        cache[port.key], cache[port.value] = (
            array.view(np.uint16) if port.dtype == "bfloat16" else array.copy() for array in carried
        )
        cache[port.queries] = rng.standard_normal((1, HEADS, OBSERVED, SIZE)).astype(np.float32)
    return cache


def floats(array: np.ndarray) -> np.ndarray:
    return np.asarray((array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array).astype(np.float64))


@pytest.mark.parametrize("count", [1, 2, 19, 20, 39, 40, 333, 1000])
@pytest.mark.parametrize("size", [1, 7, 20])
def test_a_tree_holds_every_token_once(count: int, size: int) -> None:
    keys = np.random.default_rng(1).standard_normal((count, SIZE)).astype(np.float32)
    tree = cluster_tree(keys, size)
    assert len(tree.ends) == max(1, count // size)
    assert len(tree.parent_ends) == max(1, count // size // 5)
    assert np.array_equal(np.sort(tree.order), np.arange(count))
    assert (np.diff(tree.ends, prepend=0) >= 0).all()
    assert (tree.ends[-1], tree.parent_ends[-1]) == (count, len(tree.ends))
    moved = keys[tree.order].astype(np.float64)
    bounds = np.concatenate([[0], tree.ends])
    for cluster, (begin, end) in enumerate(zip(bounds, tree.ends)):
        own = moved[begin:end]
        np.testing.assert_allclose(tree.centroids[cluster], own.mean(axis=0) if len(own) else 0, atol=1e-5)
        np.testing.assert_allclose(tree.radii[cluster], 1.8 * reach(own), atol=1e-5)
        assert (np.diff(tree.order[begin:end]) > 0).all()
    firsts = bounds[np.concatenate([[0], tree.parent_ends])]
    for parent, (begin, end) in enumerate(pairwise(firsts)):
        own = moved[begin:end]
        np.testing.assert_allclose(tree.parents[parent], own.mean(axis=0) if len(own) else 0, atol=1e-5)
        np.testing.assert_allclose(tree.parent_radii[parent], 2 * reach(own), atol=1e-5)
    assert np.array_equal(tree.parent_counts, np.diff(firsts))


@pytest.mark.parametrize(("count", "alone"), [(9, False), (10, True), (49, True), (50, True), (333, True)])
def test_the_first_key_has_a_cluster_and_a_parent_of_its_own(count: int, alone: bool) -> None:
    """Where there are two clusters, and two parents."""
    keys = np.random.default_rng(1).standard_normal((count, SIZE)).astype(np.float32)
    tree = cluster_tree(keys, 5)
    assert tree.order[0] == 0
    assert (tree.ends[0] == 1) == alone
    assert tree.parent_ends[0] == (1 if count >= 50 else count // 5)
    if alone:
        assert np.array_equal(tree.centroids[0], keys[0])
        assert tree.radii[0] == 0


def reach(keys: np.ndarray) -> float:
    """Largest distance from the mean, divided by the root of the elements."""
    distances = np.linalg.norm(keys - keys.mean(axis=0), axis=1) if len(keys) else np.zeros(1)
    return float(distances.max() / SIZE**0.5)


def test_radii_of_runs() -> None:
    keys = np.array([[3, 0, 0, 4], [0, 0, 0, 0], [1, 1, 1, 1], [7, 7, 7, 7]], np.float32)
    means = np.array([[0, 0, 0, 0], [9, 9, 9, 9], [1, 1, 1, 1], [7, 7, 7, 5]], np.float32)
    assert radii(keys, means, np.array([2, 0, 1, 1])).tolist() == [2.5, 0, 0, 1]


def test_equal_keys_leave_clusters_empty() -> None:
    tree = cluster_tree(np.ones((100, SIZE), np.float32), 5)
    assert tree.ends.tolist().count(100) + tree.ends.tolist().count(1) == 20
    assert tree.counts.sum() == tree.parent_counts.sum() == 100
    assert set(tree.centroids.sum(axis=1).tolist()) == {0.0, float(SIZE)}


def test_weights_of_equal_keys_are_their_softmax() -> None:
    rng = np.random.default_rng(3)
    counts = np.array([3, 0, 1, 10, 2])
    centroids, queries = rng.standard_normal((5, SIZE)), 30 * rng.standard_normal((4, SIZE))
    scores = queries @ centroids.T
    weights = key_weights(scores.astype(np.float32), counts)
    exact = np.repeat(scores, counts, axis=1)
    exact = np.exp(exact - exact.max(axis=1, keepdims=True))
    exact /= exact.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.repeat(weights, counts, axis=1), exact, atol=1e-5)
    assert not key_weights(scores, np.zeros(5)).any()


def shares_read(of: CacheLayout, cache: Mapping[str, np.ndarray], clusters: Mapping[str, np.ndarray]) -> np.ndarray:
    """Share of the keys that each layer, head and last query reads, in float64."""
    first, last = clusters["clusters.thresholds"].astype(np.float64)
    shares = []
    for port in of.clusters:
        centroids, ends, near, parents, parent_ends, far = (clusters[one.name][0] for one in port.inputs[:6])
        centroids, parents = floats(centroids), floats(parents)
        queries = cache[port.queries][0].astype(np.float64).reshape(KV_HEADS, -1, OBSERVED, SIZE)
        for head in range(KV_HEADS):
            counts = np.diff(ends[head], prepend=0)
            above = np.searchsorted(parent_ends[head], np.arange(len(counts)), side="right")
            parent_counts = np.bincount(above, counts, minlength=parents.shape[1])
            for at in range(OBSERVED):
                upper = estimate(port, queries[head, :, at], parents[head], far[head], parent_counts)
                reached = (upper > first)[above]
                lower = estimate(port, queries[head, :, at], centroids[head], near[head], counts * reached)
                shares.append((counts * (reached & (lower > last))).sum() / counts.sum())
    return np.array(shares)


def estimate(
    port: ClusterPorts, queries: np.ndarray, centroids: np.ndarray, beyond: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    scores = (queries @ centroids.T + np.linalg.norm(queries, axis=1)[:, None] * beyond) * port.scale
    if port.softcap:
        scores = port.softcap * np.tanh(scores / port.softcap)
    weights = np.exp(scores)
    return np.asarray((weights / np.maximum(weights @ counts, 1e-300)[:, None]).mean(axis=0))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.6])
def test_the_share_that_was_asked_for_is_read(dtype: str, keep: float) -> None:
    """By the last queries; and layers and heads have shares of their own."""
    of = layout(3, dtype, softcap=20.0 if dtype == "float16" else 0.0)
    cache = random_cache(of, 800 + OBSERVED)
    clusters = cluster_cache(of, cache, 800 + OBSERVED, keep=keep)
    shares = shares_read(of, cache, clusters)
    assert keep - 0.01 < shares.mean() <= keep + 1e-3
    assert shares.std() > 0.01


def test_tokens_follow_their_clusters() -> None:
    of = layout(2, "bfloat16")
    cache = random_cache(of, 300 + OBSERVED)
    before = {name: array.copy() for name, array in cache.items()}
    clusters = cluster_cache(of, cache, 300 + OBSERVED, keep=0.25)
    check_inputs(of, clusters)
    for port in of.clusters:
        centroids, ends = (clusters[one.name][0] for one in port.inputs[:2])
        assert np.array_equal(cache[port.queries], before[port.queries])
        for head in range(KV_HEADS):
            order = floats(cache[port.value])[0, head, :, 0].astype(int)  # counted up to 256 in bfloat16
            assert np.array_equal(order[-OBSERVED:], floats(before[port.value])[0, head, -OBSERVED:, 0].astype(int))
            means = np.add.reduceat(floats(cache[port.key])[0, head, :300], np.concatenate([[0], ends[head, :-1]]))
            np.testing.assert_allclose(
                means / np.diff(ends[head], prepend=0)[:, None], floats(centroids)[head], rtol=1e-2, atol=1e-3
            )
            pairs = [
                sorted(zip(*(floats(one[name])[0, head, :300].tolist() for name in (port.key, port.value))))
                for one in (before, cache)
            ]
            assert pairs[0] == pairs[1]


@pytest.mark.parametrize("tokens", [1, OBSERVED])
def test_a_prefix_that_is_all_observed_has_no_clusters(tokens: int) -> None:
    of = layout(2)
    cache = random_cache(of, tokens)
    before = {name: array.copy() for name, array in cache.items()}
    found = cluster_cache(of, cache, tokens, keep=0.25)
    assert {name: array.shape for name, array in found.items()} == {
        name: array.shape for name, array in empty_inputs(of).items()
    }
    assert all(np.array_equal(cache[name], array) for name, array in before.items())
    assert [found[port.name].size for port in prefix_ports(of)[:-1]] == [0] * 6 + [2] + [0] * 5


def test_one_token_more_has_one_cluster() -> None:
    of = layout()
    found = cluster_cache(of, random_cache(of, OBSERVED + 1), OBSERVED + 1, keep=0.5)
    assert found["clusters.0.ends"].tolist() == [[[1], [1]]]


def test_everything_is_kept() -> None:
    of = layout()
    found = cluster_cache(of, random_cache(of, 200), 200, keep=1.0)
    assert found["clusters.thresholds"].tolist() == [-1, -1]


def test_clusters_of_another_engine_are_refused() -> None:
    of = layout()
    clusters = cluster_cache(of, random_cache(of, 200), 200, keep=0.5)
    for changed in (
        {name: array for name, array in clusters.items() if "ends" not in name},
        clusters | {"clusters.0.ends": clusters["clusters.0.ends"][:, :, 1:]},
        clusters | {"clusters.0.ends": clusters["clusters.0.ends"].astype(np.int64)},
        clusters | {"clusters.9.ends": clusters["clusters.0.ends"]},
    ):
        with pytest.raises(EngineError, match="are not those of the engine"):
            check_inputs(of, changed)


@pytest.mark.parametrize("keep", [0.05, 0.24, 0.25, 0.6])
def test_parents_are_asked_where_they_spare_centroids(keep: float) -> None:
    of = layout()
    found = cluster_cache(of, random_cache(of, 420), 420, keep=keep)
    assert (found["clusters.thresholds"][0] == -1) == (keep >= 0.25)
