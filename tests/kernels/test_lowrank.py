"""Selection `lowrank` of CachedAttention in real onnxruntime sessions, against float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from attention_feeds import angles, part, tokens_of
from attention_oracle import Form, rotate, split
from cached_attention_model import open_model
from lowrank_oracle import BLOCK, Prefix, keys_of, random_outliers, random_prefix, read_slots
from selected_cache import DTYPES, Cache, attributes_of

from effc.ir.dialect.selections import LowRankSelection

FORMS = {
    "mha": Form(3, 3, 64, 16, scale=64**-0.5, rotary="half", rotary_size=64),
    "gqa": Form(6, 2, 32, 32, scale=0.3, softcap=30.0, rotary="interleaved", rotary_size=32),
    "partial": Form(4, 1, 33, 48, scale=0.4, rotary="half", rotary_size=16),
    "plain": Form(4, 2, 80, 8, scale=0.1),
}
CAPACITY, POSITIONS = 512, 400
COUNT, TAIL = 272, 9
"""Tokens of the prefix, and of the cache behind it."""


def feeds_of(form: Form, batch: int = 1, count: int = 330) -> dict[str, np.ndarray]:
    feeds = tokens_of(form, batch, count=count)
    feeds["query"] /= 2
    return feeds


def prefix_of(form: Form, count: int = COUNT, rank: int = 20, outliers: int = 3) -> Prefix:
    return random_prefix(form, count, rank, random_outliers(form, count, outliers), np.dtype(np.float32))


def cache_of(
    form: Form, storage: str, prefix: Prefix, wanted: int = 6, batch: int = 1, dense_below: int = 0
) -> tuple[Cache, Prefix]:
    """A cache whose first places belong to a prefix, and that in the type of the cache."""
    selection = LowRankSelection(budget=wanted * BLOCK, dense_below=dense_below)
    cache, rng = Cache(form, storage, selection, batch, CAPACITY), np.random.default_rng(9)
    prefix = prefix.cast(cache.past[0].dtype)
    cache.tokens = prefix.count + TAIL
    for tensor in cache.past:
        tensor[:] = np.nan
        tensor[:, :, prefix.count : cache.tokens] = rng.standard_normal((form.kv_heads, TAIL, tensor.shape[3]))
    tables = angles(form, np.arange(POSITIONS)[None]) if form.rotary != "none" else ()
    cache.give(dict(zip(("far_cos", "far_sin"), tables)) | prefix.inputs())
    return cache, prefix


def expected(cache: Cache, prefix: Prefix, feeds: dict[str, np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Results [count, H * E] of the next step of the first row, and the slots [K, total] that it reads."""
    form, at, selection = cache.form, cache.tokens, cache.selection
    assert isinstance(selection, LowRankSelection)
    new = part(feeds, at, at + count)
    q, k = split(new["query"], form.heads)[0], split(new["key"], form.kv_heads)[0]
    if form.rotary != "none":
        q, k = (rotate(one[None], new["cos"][:1], new["sin"][:1], form)[0] for one in (q, k))
    tail = slice(prefix.count, at)
    held = [tensor[0, :, tail].astype(np.float64) for tensor in cache.past]
    keys = np.concatenate([keys_of(form, prefix), held[0], k], axis=1)
    values = np.concatenate(
        [prefix.values[0].astype(np.float64), held[1], split(new["value"], form.kv_heads)[0]], axis=1
    )
    group, results, reads = form.heads // form.kv_heads, [], []
    for head in range(form.kv_heads):
        own = slice(head * group, (head + 1) * group)
        wanted = selection.budget // BLOCK if count == 1 and at >= selection.dense_below else 10**6
        reads.append(read_slots(form, prefix, head, q[own, 0], at + count, wanted))
        for queries in q[own]:
            scores = queries @ keys[head].T * form.scale
            if form.softcap:
                scores = form.softcap * np.tanh(scores / form.softcap)
            seen = reads[-1] & (np.arange(at + count) <= at + np.arange(count)[:, None])
            scores = np.where(seen, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            results.append(weights @ values[head] / weights.sum(axis=1, keepdims=True))
    return np.concatenate(results, axis=1), np.array(reads)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(name: str, dtype: str, isa: str) -> None:
    form = FORMS[name]
    feeds, (cache, prefix) = feeds_of(form), cache_of(form, dtype, prefix_of(form))
    for _ in range(8):
        wanted, reads = expected(cache, prefix, feeds, 1)
        found, logged = cache.logged_step(feeds)
        np.testing.assert_allclose(found[0], wanted, atol=2e-5)
        assert all(np.array_equal(logged[0, head], np.flatnonzero(read)) for head, read in enumerate(reads))
        assert (reads[:, :COUNT].sum(axis=1) == (6 + 3) * BLOCK).all()
    wanted, reads = expected(cache, prefix, feeds, 30)
    assert reads.all()
    np.testing.assert_allclose(cache.step(feeds, 30)[0], wanted, atol=2e-5)


@pytest.mark.parametrize(("rank", "outliers", "count"), [(1, 0, 8), (16, 34, 272), (33, 1, 136), (96, 0, 400)])
def test_sizes(rank: int, outliers: int, count: int) -> None:
    form = FORMS["mha"]
    feeds = feeds_of(form, count=660)
    cache, prefix = cache_of(form, "bfloat16", prefix_of(form, count, rank, outliers))
    for steps in (1, 1, 3, 40):
        wanted, _ = expected(cache, prefix, feeds, steps)
        np.testing.assert_allclose(cache.step(feeds, steps)[0], wanted, atol=2e-5)


def test_the_places_of_the_prefix_are_not_touched() -> None:
    form = FORMS["gqa"]
    cache, _ = cache_of(form, "bfloat16", prefix_of(form, rank=16, outliers=2))
    cache.run(feeds_of(form), [1, 5, 1])
    for tensor in cache.past:
        assert np.isnan(tensor[:, :, :COUNT].astype(np.float32)).all()


def test_a_planted_chunk_is_read() -> None:
    """Its keys are ten times the query: without them the result is another one."""
    form = FORMS["plain"]
    feeds, prefix = feeds_of(form), prefix_of(form, outliers=0)
    query = feeds["query"][0, COUNT + TAIL].reshape(form.heads, -1)
    coefficients = np.linalg.lstsq(prefix.basis[0, 0].astype(np.float64), 30 * query[0], rcond=None)[0]
    prefix.tokens[0, 40:48] = coefficients
    landmarks = keys_of(form, prefix).reshape(form.kv_heads, -1, BLOCK, form.head_size).mean(axis=2)
    cache, _ = cache_of(form, "float32", replace(prefix, landmarks=landmarks[None]), wanted=1)
    found = cache.step(feeds, 1)[0, 0].reshape(form.heads, -1)
    np.testing.assert_allclose(found[0], prefix.values[0, 0, 40:48].mean(axis=0), atol=1e-3)


@pytest.mark.parametrize("change", ["unordered", "beyond", "negative", "chunks", "past", "positions", "hidden"])
def test_what_does_not_fit_is_refused(change: str) -> None:
    form = FORMS["mha"]
    feeds, prefix, messages = feeds_of(form, count=660), prefix_of(form), {}
    numbers = {"unordered": [5, 4, 9], "beyond": [1, 2, COUNT // BLOCK], "negative": [-1, 2, 3]}
    if change in numbers:
        prefix = replace(prefix, outliers=np.array([[numbers[change]] * form.kv_heads], np.int32))
        messages[change] = "outlier"
    if change == "chunks":
        prefix, messages = replace(prefix, landmarks=prefix.landmarks[:, :, 1:]), {change: "33 chunks of 8"}
    if change == "positions":
        prefix, messages = prefix_of(form, 408), {change: "angles of 400 positions"}
    cache, _ = cache_of(form, "float32", prefix)
    if change == "past":
        cache.tokens, messages = COUNT - 1, {change: "counts 271 past tokens"}
    if change == "hidden":
        feeds["valid"][0, 100], messages = False, {change: "row 0 hides a token of the prefix"}
    with pytest.raises(Exception, match=messages[change]):
        cache.step(feeds, 1)


def test_angles_of_several_rows_are_refused() -> None:
    cache, _ = cache_of(FORMS["mha"], "float32", prefix_of(FORMS["mha"]), batch=2)
    tables = {name: np.repeat(cache.constants[name], 2, axis=0) for name in ("far_cos", "far_sin")}
    cache.give(cache.constants | tables)
    with pytest.raises(Exception, match="the same for all rows"):
        cache.step(feeds_of(cache.form, batch=2), 1)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"select_block": 0}, "select_block"),
        ({"select_sinks": 4}, "neither select_sinks nor select_recent"),
        ({"select_share": 1.5}, "select_share"),
    ],
)
def test_attributes_out_of_range_are_refused(attributes: dict[str, object], message: str) -> None:
    cache, _ = cache_of(FORMS["plain"], "float32", Prefix.empty(FORMS["plain"], np.dtype(np.float32)))
    storage = attributes_of(cache.kept_as, cache.selection) | attributes
    with pytest.raises(Exception, match=message):
        open_model(cache.form, cache.past, storage=storage, constants=cache.constants)
