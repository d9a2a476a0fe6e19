"""Selection `clusters` of CachedAttention in real onnxruntime sessions, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest
from attention_oracle import Form, rotate, split
from cached_attention_model import DENSE, Model, open_model
from cluster_oracle import Clusters, cluster_weights, parent_weights, read_slots

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
DTYPES = {"float32": F32, "float16": np.dtype(np.float16), "bfloat16": BF16}
FORMS = {
    "mha": Form(3, 3, 32, 16, scale=32**-0.5),
    "gqa": Form(6, 2, 32, 32, scale=0.3, softcap=30.0),
    "rotary": Form(4, 1, 33, 48, scale=0.4, rotary="half", rotary_size=32),
}
OBSERVED, CAPACITY = 20, 512
ATTRIBUTES = DENSE | {"selection": "clusters", "select_recent": OBSERVED}
PREFIX, TOKENS = 300, 360


@dataclass
class Cache:
    """A cache that is filled without clusters, and read with them."""

    form: Form
    dtype: np.dtype
    batch: int = 1
    clusters: Clusters | None = None

    def __post_init__(self) -> None:
        form = self.form
        sizes = [(form.kv_heads, CAPACITY, form.head_size), (form.kv_heads, CAPACITY, form.value_size)]
        self.past = [np.zeros((self.batch, *size), self.dtype) for size in sizes]
        self.past.append(np.zeros((self.batch, form.heads, OBSERVED, form.head_size), F32))
        self.tokens = 0
        self.give(self.clusters or Clusters.empty(form))

    def give(self, clusters: Clusters) -> None:
        self.clusters = clusters
        optional = ["cos", "sin"] if self.form.rotary != "none" else []
        self.model: Model = open_model(self.form, self.past, optional, storage=ATTRIBUTES, constants=clusters.inputs())

    def step(self, feeds: dict[str, np.ndarray], count: int) -> np.ndarray:
        y, self.past = self.model.run(part(feeds, self.tokens, self.tokens + count), self.past, in_place=True)
        self.tokens += count
        return y

    def run(self, feeds: dict[str, np.ndarray], steps: Sequence[int]) -> np.ndarray:
        return np.concatenate([self.step(feeds, count) for count in steps], axis=1)

    def reorder(self, order: np.ndarray) -> None:
        """Put the tokens of row 0 in another order, [K, tokens], and give every row the same."""
        for tensor in self.past[:2]:
            moved = np.take_along_axis(tensor[0], order[:, :, None], axis=1)
            tensor[:, :, : order.shape[1]] = moved


def part(feeds: dict[str, np.ndarray], begin: int, end: int) -> dict[str, np.ndarray]:
    new = {name: feeds[name][:, begin:end] for name in ("query", "key", "value", "cos", "sin") if name in feeds}
    return new | {"valid": feeds["valid"][:, :end]}


def tokens_of(form: Form, batch: int = 1, seed: int = 3) -> dict[str, np.ndarray]:
    """Random tokens; the prefix is the same in all rows."""
    rng = np.random.default_rng(seed)
    widths = {
        "query": form.heads * form.head_size,
        "key": form.kv_heads * form.head_size,
        "value": form.kv_heads * form.value_size,
    }
    feeds = {name: rng.standard_normal((batch, TOKENS, width)).astype(F32) for name, width in widths.items()}
    for array in feeds.values():
        array[:, :PREFIX] = array[:1, :PREFIX]
    feeds["valid"] = np.ones((batch, TOKENS), bool)
    if form.rotary != "none":
        angles = np.arange(TOKENS)[:, None] / 50.0 ** np.linspace(0, 1, form.rotary_size // 2)
        angles = np.broadcast_to(angles, (batch, *angles.shape))
        feeds |= {"cos": np.cos(angles).astype(F32), "sin": np.sin(angles).astype(F32)}
    return feeds


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
    vectors = [np.array(one, F32)[None] for one in (centroids, parents)]
    return np.array(orders), Clusters(
        vectors[0],
        np.array(ends, np.int32)[None],
        0.2 * rng.random((1, heads, 17), F32),
        vectors[1],
        np.array([starts] * heads, np.int32)[None],
        0.2 * rng.random((1, heads, 5), F32),
        np.zeros(2, F32),
    )


def queries_of(form: Form, feeds: dict[str, np.ndarray], at: int, row: int = 0) -> np.ndarray:
    """Rotated queries [K, G, D] of one token."""
    new = part(feeds, at, at + 1)
    q = split(new["query"], form.heads)
    if form.rotary != "none":
        q = rotate(q, new["cos"], new["sin"], form)
    return np.asarray(q[row].reshape(form.kv_heads, -1, form.head_size))


def between(weights: list[np.ndarray], share: float) -> float:
    """A threshold that no weight is close to, about `share` of them above it."""
    values = np.sort(np.concatenate(weights))
    values = values[values > 0]
    middle = int((1 - share) * len(values))
    near = values[max(0, middle - 20) : middle + 20]
    at = int(np.argmax(near[1:] / near[:-1]))
    return float(np.sqrt(near[at] * near[at + 1]))


def with_thresholds(form: Form, clusters: Clusters, feeds: dict[str, np.ndarray], *shares: float) -> Clusters:
    """Thresholds that let those shares of parents and clusters pass for the tokens after the prefix."""
    pairs = [
        (head, queries_of(form, feeds, at, row)[head])
        for row in range(len(feeds["query"]))
        for at in range(PREFIX, TOKENS)
        for head in range(form.kv_heads)
    ]
    above = [parent_weights(form, clusters, head, q) for head, q in pairs]
    upper = between(above, shares[0])
    below = [cluster_weights(form, clusters, head, q, weights > upper) for (head, q), weights in zip(pairs, above)]
    return replace(clusters, thresholds=np.array([upper, between(below, shares[1])], F32))


def prepared(form: Form, dtype: str, feeds: dict[str, np.ndarray]) -> Cache:
    """A cache of the prefix with its clusters; in the middle of the parents and of the clusters below them pass."""
    cache = Cache(form, DTYPES[dtype], len(feeds["query"]))
    cache.run(feeds, [170, 1, PREFIX - 171])
    count = PREFIX - OBSERVED
    order, clusters = grouped(cache.past[0][0, :, :count].astype(F32))
    clusters = clusters.rounded(DTYPES[dtype])
    cache.reorder(order)
    cache.give(with_thresholds(form, clusters, feeds, 0.6, 0.5))
    return cache


def expected(cache: Cache, feeds: dict[str, np.ndarray], row: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """The next token's result [H * E], and the slots that each key head reads."""
    form, at, clusters = cache.form, cache.tokens, cache.clusters
    assert clusters is not None
    new = part(feeds, at, at + 1)
    k = split(new["key"], form.kv_heads)
    if form.rotary != "none":
        k = rotate(k, new["cos"], new["sin"], form)
    keys = np.concatenate([cache.past[0][row, :, :at].astype(np.float64), k[row]], axis=1)
    values = np.concatenate(
        [cache.past[1][row, :, :at].astype(np.float64), split(new["value"], form.kv_heads)[row]], axis=1
    )
    results, reads = [], []
    for head, queries in enumerate(queries_of(form, feeds, at, row)):
        read = read_slots(form, clusters, head, queries, at + 1)
        reads.append(read)
        for query in queries:
            scores = keys[head, read] @ query * form.scale
            if form.softcap:
                scores = form.softcap * np.tanh(scores / form.softcap)
            weights = np.exp(scores - scores.max())
            results.append(weights @ values[head, read] / weights.sum())
    return np.concatenate(results), reads


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(name: str, dtype: str, isa: str) -> None:
    form = FORMS[name]
    feeds = tokens_of(form)
    cache = prepared(form, dtype, feeds)
    shares = []
    for _ in range(25):
        wanted, reads = expected(cache, feeds)
        np.testing.assert_allclose(cache.step(feeds, 1)[0, 0], wanted, atol=2e-5)
        assert all(read[PREFIX - OBSERVED :].all() for read in reads)
        shares += [read[: PREFIX - OBSERVED].mean() for read in reads]
    assert 0.05 < np.mean(shares) < 0.6
    assert len(set(shares)) > 10


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_thresholds_below_every_weight_are_dense(name: str, dtype: str) -> None:
    """Up to the order of tokens."""
    form = FORMS[name]
    feeds = tokens_of(form)
    cache = prepared(form, dtype, feeds)
    assert cache.clusters is not None
    cache.give(replace(cache.clusters, thresholds=np.array([-1, -1], F32)))
    dense = Cache(form, DTYPES[dtype]).run(feeds, [PREFIX, *[1] * 30, 5])
    np.testing.assert_allclose(cache.run(feeds, [*[1] * 30, 5]), dense[:, PREFIX:], atol=1e-5)


def test_every_parent_passes_a_threshold_below_every_weight() -> None:
    """With the bits of one that is exceeded by all of them."""
    form = FORMS["gqa"]
    feeds = tokens_of(form)
    results = []
    for first in (-1, -0.0):
        cache = prepared(form, "float32", feeds)
        assert cache.clusters is not None
        cache.give(replace(cache.clusters, thresholds=np.array([first, cache.clusters.thresholds[1]], F32)))
        results.append(cache.run(feeds, [1] * 20))
    assert np.array_equal(*results)


@pytest.mark.parametrize("thresholds", [(1, 1), (-1, 1), (1, -1)])
def test_thresholds_above_every_weight_leave_the_rest(thresholds: tuple[float, float]) -> None:
    """The observation window and what comes after it."""
    form = FORMS["gqa"]
    feeds = tokens_of(form)
    cache = prepared(form, "float32", feeds)
    assert cache.clusters is not None
    cache.give(replace(cache.clusters, thresholds=np.array(thresholds, F32)))
    rest = {name: array[:, PREFIX - OBSERVED :] for name, array in feeds.items()}
    alone = Cache(form, F32).run(rest, [OBSERVED, *[1] * 20])
    np.testing.assert_allclose(cache.run(feeds, [1] * 20), alone[:, OBSERVED:], atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_tokens_read_everything(name: str, dtype: str) -> None:
    form = FORMS[name]
    feeds = tokens_of(form)
    cache = prepared(form, dtype, feeds)
    dense = Cache(form, DTYPES[dtype]).run(feeds, [PREFIX, 2, 31])
    np.testing.assert_allclose(cache.run(feeds, [2, 31]), dense[:, PREFIX:], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_after_a_prefix_do_not_matter(dtype: str) -> None:
    form = FORMS["gqa"]
    feeds = tokens_of(form)
    whole, parts = (prepared(form, dtype, feeds).run(feeds, steps) for steps in ([29, *[1] * 9], [9, 20, *[1] * 9]))
    np.testing.assert_allclose(parts[:, -9:], whole[:, -9:], atol=1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_do_not_depend_on_each_other(dtype: str) -> None:
    form = FORMS["gqa"]
    feeds = tokens_of(form, batch=3)
    cache = prepared(form, dtype, feeds)
    together = cache.run(feeds, [4, *[1] * 20])
    for row in range(3):
        alone = Cache(form, DTYPES[dtype], 1)
        own = {name: array[row : row + 1] for name, array in feeds.items()}
        alone.run(own, [PREFIX])
        alone.reorder(grouped(alone.past[0][0, :, : PREFIX - OBSERVED].astype(F32))[0])
        assert cache.clusters is not None
        alone.give(cache.clusters)
        np.testing.assert_array_equal(alone.run(own, [4, *[1] * 20])[0], together[row])


def test_the_same_step_twice() -> None:
    form = FORMS["rotary"]
    feeds = tokens_of(form)
    cache = prepared(form, "bfloat16", feeds)
    step = part(feeds, PREFIX, PREFIX + 1)
    (first, _), (second, _) = (cache.model.run(step, cache.past) for _ in range(2))
    assert np.array_equal(first, second)


def test_group_heads_are_repeated_key_heads() -> None:
    """GQA with one query repeated over its group reads what the key head alone reads."""
    form = FORMS["gqa"]
    feeds = tokens_of(form)
    group = form.heads // form.kv_heads
    one = feeds["query"].reshape(1, TOKENS, form.kv_heads, group, -1)[:, :, :, :1]
    feeds["query"] = np.repeat(one, group, axis=3).reshape(1, TOKENS, -1)
    cache = prepared(form, "float32", feeds)
    single = Cache(replace(form, heads=form.kv_heads), F32, clusters=cache.clusters)
    single.past[:2], single.tokens = cache.past[:2], cache.tokens
    steps = [1] * 20
    found = single.run(feeds | {"query": one.reshape(1, TOKENS, -1)}, steps)
    wanted = np.repeat(found.reshape(1, -1, form.kv_heads, 1, form.value_size), group, axis=3)
    found = cache.run(feeds, steps)
    np.testing.assert_allclose(found, wanted.reshape(found.shape), atol=1e-6)


@pytest.mark.parametrize("steps", [[55], [*[1] * 55], [7, 1, 1, 46], [3, 52]], ids=str)
def test_the_last_queries_are_kept(steps: list[int]) -> None:
    form = FORMS["rotary"]
    feeds = tokens_of(form)
    cache = Cache(form, BF16)
    cache.run(feeds, steps)
    for at in range(55 - OBSERVED, 55):
        kept = cache.past[2][0, :, at % OBSERVED].reshape(form.kv_heads, -1, form.head_size)
        np.testing.assert_allclose(kept, queries_of(form, feeds, at), atol=1e-6)


def test_what_is_not_shared_is_copied() -> None:
    form = FORMS["gqa"]
    feeds = tokens_of(form)
    cache = Cache(form, BF16)
    cache.run(feeds, [50])
    before = [array.copy() for array in cache.past]
    _, copied = cache.model.run(part(feeds, 50, 57), cache.past)
    assert all(np.array_equal(one, other) for one, other in zip(before, cache.past))
    cache.run(feeds, [7])
    assert np.array_equal(copied[2], cache.past[2])


def test_scores_far_apart_do_not_overflow() -> None:
    """A cluster without keys has score 0, which lies far above the others here."""
    form = replace(FORMS["mha"], scale=20.0)
    feeds = tokens_of(form)
    feeds["key"][:] = 1 + 0.01 * feeds["key"]
    feeds["query"][:] = -np.abs(feeds["query"])
    cache = prepared(form, "float32", feeds)
    for _ in range(10):
        wanted, reads = expected(cache, feeds)
        np.testing.assert_allclose(cache.step(feeds, 1)[0, 0], wanted, atol=1e-3)
        assert not all(read.all() for read in reads)


@pytest.mark.parametrize(
    ("form", "storage", "message"),
    [
        (replace(FORMS["gqa"], window=40), {}, "takes no window"),
        (FORMS["gqa"], {"select_recent": 0}, "'select_recent' is 0"),
    ],
)
def test_what_there_is_not(form: Form, storage: dict[str, object], message: str) -> None:
    cache = Cache(FORMS["gqa"], F32)
    with pytest.raises(Exception, match=message):
        open_model(form, cache.past, storage=ATTRIBUTES | storage, constants=Clusters.empty(form).inputs())


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
    form = FORMS["gqa"]
    feeds = tokens_of(form)
    cache = prepared(form, "float32", feeds)
    assert cache.clusters is not None
    changed = {name: np.ascontiguousarray(one(vars(cache.clusters)[name])) for name, one in change.items()}  # type: ignore[operator]
    cache.give(replace(cache.clusters, **changed))
    with pytest.raises(Exception, match=message):
        cache.step(feeds, 1)


def test_padding_before_a_prefix_is_refused() -> None:
    form = FORMS["gqa"]
    feeds = tokens_of(form)
    cache = prepared(form, "float32", feeds)
    feeds["valid"][0, 3] = False
    with pytest.raises(Exception, match="row 0 hides a token of the prefix"):
        cache.step(feeds, 1)
