"""Selection `clusters` of CachedAttention in real onnxruntime sessions, against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from attention_feeds import FORMS, tokens_of
from attention_oracle import Form
from cached_attention_model import open_model
from cluster_oracle import Clusters, cluster_weights, parent_weights, read_slots
from selected_cache import Cache, Reads, attributes_of
from stored_tokens import StoredTokens, queries_of

from effc.ir.dialect.selections import ClusterSelection

DTYPES = ("float32", "float16", "bfloat16")
OBSERVED = 20
CLUSTERS = ClusterSelection(OBSERVED)
PREFIX, TOKENS = 300, 360


def feeds_of(form: Form) -> dict[str, np.ndarray]:
    return tokens_of(form, count=TOKENS)


@dataclass
class Clustered:
    """A cache that was filled without clusters, and the clusters that it got then."""

    cache: Cache
    clusters: Clusters

    def give(self, **changes: np.ndarray) -> Cache:
        """The cache, after the clusters have changed."""
        self.clusters = replace(self.clusters, **changes)
        self.cache.give(self.clusters.inputs())
        return self.cache

    def reads(self, stored: StoredTokens) -> Reads:
        """What the next step of the first row reads in float64."""
        form, of = self.cache.form, stored.rows[0]
        groups = of.queries.reshape(form.kv_heads, -1, form.head_size)
        return {
            (0, head): np.flatnonzero(read_slots(form, self.clusters, head, queries, len(of.valid)))
            for head, queries in enumerate(groups)
        }


def prepared(form: Form, dtype: str, feeds: dict[str, np.ndarray]) -> Clustered:
    """A cache of the prefix, its tokens in the order of clusters; of parents and clusters below about half pass."""
    cache = Cache(form, dtype, CLUSTERS)
    cache.run(feeds, [170, 1, PREFIX - 171])
    count = PREFIX - OBSERVED
    order, clusters = grouped(cache.past[0][0, :, :count].astype(np.float32))
    for tensor in cache.past[:2]:
        tensor[0, :, :count] = np.take_along_axis(tensor[0], order[:, :, None], axis=1)
    clusters = clusters.rounded(cache.past[0].dtype)
    made = Clustered(cache, clusters)
    made.give(thresholds=thresholds_for(form, clusters, feeds, 0.6, 0.5))
    return made


def grouped(keys: np.ndarray, seed: int = 1) -> tuple[np.ndarray, Clusters]:
    """Order and clusters of keys [K, tokens, D]: 17 in 5 parents, two clusters and a parent without any token.

    Radii are random.
    """
    rng = np.random.default_rng(seed)
    heads, count, size = keys.shape
    labels = rng.integers(0, 17, (heads, count))
    labels[np.isin(labels, (4, 16))] = 5
    labels[np.isin(labels, (8, 9, 10))] = 1  # all of a parent
    starts = [3, 8, 11, 14, 17]
    orders, centroids, parents, ends = [], [], [], []
    for head in range(heads):
        orders.append(np.argsort(labels[head], kind="stable"))
        cluster = [keys[head, labels[head] == j] for j in range(17)]
        centroids.append([one.mean(axis=0) if len(one) else np.zeros(size) for one in cluster])
        joined = [np.concatenate(cluster[a:b]) for a, b in zip([0, *starts], starts)]
        parents.append([one.mean(axis=0) if len(one) else np.zeros(size) for one in joined])
        ends.append(np.cumsum([len(one) for one in cluster]))
    vectors = [np.array(one, np.float32)[None] for one in (centroids, parents)]
    return np.array(orders), Clusters(
        vectors[0],
        np.array(ends, np.int32)[None],
        0.2 * rng.random((1, heads, 17), np.float32),
        vectors[1],
        np.array([starts] * heads, np.int32)[None],
        0.2 * rng.random((1, heads, 5), np.float32),
        np.zeros(2, np.float32),
    )


def between(weights: list[np.ndarray], share: float) -> float:
    """A threshold that no weight is close to, about `share` of them above it."""
    values = np.sort(np.concatenate(weights))
    values = values[values > 0]
    middle = int((1 - share) * len(values))
    near = values[max(0, middle - 20) : middle + 20]
    at = int(np.argmax(near[1:] / near[:-1]))
    return float(np.sqrt(near[at] * near[at + 1]))


def thresholds_for(form: Form, clusters: Clusters, feeds: dict[str, np.ndarray], *shares: float) -> np.ndarray:
    """Those that let such shares of parents and of clusters pass for the tokens after the prefix."""
    pairs = [
        (head, queries)
        for at in range(PREFIX, TOKENS)
        for head, queries in enumerate(queries_of(form, feeds, at).reshape(form.kv_heads, -1, form.head_size))
    ]
    above = [parent_weights(form, clusters, head, q) for head, q in pairs]
    upper = between(above, shares[0])
    below = [cluster_weights(form, clusters, head, q, weights > upper) for (head, q), weights in zip(pairs, above)]
    return np.array([upper, between(below, shares[1])], np.float32)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(name: str, dtype: str, isa: str) -> None:
    feeds = feeds_of(FORMS[name])
    made, shares = prepared(FORMS[name], dtype, feeds), []
    for _ in range(25):
        stored = StoredTokens(made.cache, feeds)
        wanted = made.reads(stored)
        found, reads = made.cache.logged_step(feeds)
        np.testing.assert_allclose(found[:, 0], stored.attention(wanted), atol=2e-5)
        assert all(np.array_equal(reads[key], tokens) for key, tokens in wanted.items())
        shares += [(tokens < PREFIX - OBSERVED).sum() / (PREFIX - OBSERVED) for tokens in reads.values()]
    assert 0.05 < np.mean(shares) < 0.6
    assert len(set(shares)) > 10


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_order_of_a_prefix_does_not_matter(name: str, dtype: str) -> None:
    """Where everything is read: by thresholds below every weight, and by steps of several tokens."""
    feeds = feeds_of(FORMS[name])
    dense = Cache(FORMS[name], dtype).run(feeds, [PREFIX, 2, 28, *[1] * 10])
    made, steps = prepared(FORMS[name], dtype, feeds), [2, 28]
    found = made.cache.run(feeds, steps)
    cache = made.give(thresholds=np.array([-1, -1], np.float32))
    found = np.concatenate([found, cache.run(feeds, [1] * 10)], axis=1)
    np.testing.assert_allclose(found, dense[:, PREFIX:], atol=1e-5)


def test_every_parent_passes_a_threshold_below_every_weight() -> None:
    """With the bits of one that is exceeded by all of them."""
    feeds = feeds_of(FORMS["gqa"])
    results = []
    for first in (-1, -0.0):
        made = prepared(FORMS["gqa"], "float32", feeds)
        cache = made.give(thresholds=np.array([first, made.clusters.thresholds[1]], np.float32))
        results.append(cache.run(feeds, [1] * 20))
    assert np.array_equal(*results)


@pytest.mark.parametrize("thresholds", [(1, 1), (-1, 1), (1, -1)])
def test_thresholds_above_every_weight_leave_the_rest(thresholds: tuple[float, float]) -> None:
    """The observation window and what comes after it."""
    feeds = feeds_of(FORMS["gqa"])
    cache = prepared(FORMS["gqa"], "float32", feeds).give(thresholds=np.array(thresholds, np.float32))
    rest = {name: array[:, PREFIX - OBSERVED :] for name, array in feeds.items()}
    alone = Cache(FORMS["gqa"], "float32", CLUSTERS).run(rest, [OBSERVED, *[1] * 20])
    np.testing.assert_allclose(cache.run(feeds, [1] * 20), alone[:, OBSERVED:], atol=1e-6)


@pytest.mark.parametrize("steps", [[55], [*[1] * 55], [7, 1, 1, 46], [3, 52]], ids=str)
def test_the_last_queries_are_kept(steps: list[int]) -> None:
    form, feeds = FORMS["rotary"], feeds_of(FORMS["rotary"])
    cache = Cache(form, "bfloat16", CLUSTERS)
    cache.run(feeds, steps)
    for at in range(55 - OBSERVED, 55):
        np.testing.assert_allclose(cache.past[2][0, :, at % OBSERVED], queries_of(form, feeds, at), atol=1e-6)


def test_what_is_not_shared_is_copied() -> None:
    feeds, cache = feeds_of(FORMS["gqa"]), Cache(FORMS["gqa"], "bfloat16", CLUSTERS)
    cache.run(feeds, [50])
    before = [array.copy() for array in cache.past]
    _, copied = cache.attempt(feeds, 7)
    assert all(np.array_equal(one, other) for one, other in zip(before, cache.past))
    cache.run(feeds, [7])
    assert np.array_equal(copied[2], cache.past[2])


def test_scores_far_apart_do_not_overflow() -> None:
    """A cluster without keys has score 0, which lies far above the others here."""
    form = replace(FORMS["mha"], scale=20.0)
    feeds = feeds_of(form)
    feeds["key"][:] = 1 + 0.01 * feeds["key"]
    feeds["query"][:] = -np.abs(feeds["query"])
    made = prepared(form, "float32", feeds)
    for _ in range(10):
        stored = StoredTokens(made.cache, feeds)
        wanted = made.reads(stored)
        found = made.cache.step(feeds, 1)
        np.testing.assert_allclose(found[:, 0], stored.attention(wanted), atol=1e-3)
        assert not all(len(tokens) == made.cache.tokens for tokens in wanted.values())


def test_no_queries_are_refused() -> None:
    cache = Cache(FORMS["gqa"], "float32", CLUSTERS)
    storage = attributes_of(cache.kept_as, CLUSTERS) | {"select_recent": 0}
    with pytest.raises(Exception, match="'select_recent' is 0"):
        open_model(cache.form, cache.past, storage=storage, constants=Clusters.empty(cache.form).inputs())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ends": lambda ends: ends[:, :, ::-1]}, "end of cluster . is .* is the cache that of the prefix"),
        ({"ends": lambda ends: ends + 100}, "end of cluster .* it must be from .* to 300"),
        ({"ends": lambda ends: ends[:, :, :5]}, "ends has shape"),
        ({"radii": lambda radii: radii[:, :, :5]}, "radii has shape"),
        ({"parent_radii": lambda radii: radii.astype(np.float64)}, "parent radii is another type; it must be float32"),
        ({"parent_ends": lambda ends: ends - 1}, "the parents of head 0 have not all clusters"),
        ({"thresholds": lambda limits: limits[:1]}, "thresholds has shape"),
        ({"centroids": lambda x: x[:, :, :, :5]}, "centroids has shape"),
        ({"ends": lambda ends: ends.astype(np.int64)}, "ends is another type; it must be int32"),
        (
            {"centroids": lambda x: x.astype(np.float64)},
            "centroids is another type; it must be one of",
        ),
        ({"parents": lambda x: x.astype(np.float16)}, "parents is float16; it must be float32"),
    ],
)
def test_clusters_that_do_not_fit(change: dict[str, object], message: str) -> None:
    feeds = feeds_of(FORMS["gqa"])
    made = prepared(FORMS["gqa"], "float32", feeds)
    clusters = vars(made.clusters)
    cache = made.give(**{name: np.ascontiguousarray(one(clusters[name])) for name, one in change.items()})  # type: ignore[operator]
    with pytest.raises(Exception, match=message):
        cache.step(feeds, 1)


def test_padding_before_a_prefix_is_refused() -> None:
    feeds = feeds_of(FORMS["gqa"])
    cache = prepared(FORMS["gqa"], "float32", feeds).cache
    feeds["valid"][0, 3] = False
    with pytest.raises(Exception, match="row 0 hides a token of the prefix"):
        cache.step(feeds, 1)
