"""Selection `lowrank` of CachedAttention in real onnxruntime sessions, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest
from attention_oracle import Form, rotate, split
from cached_attention_model import DENSE, open_model
from lowrank_oracle import BLOCK, Prefix, angles_of, keys_of, random_prefix, read_slots

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
DTYPES = {"float32": F32, "float16": np.dtype(np.float16), "bfloat16": BF16}
FORMS = {
    "mha": Form(3, 3, 64, 16, scale=64**-0.5, rotary="half", rotary_size=64),
    "gqa": Form(6, 2, 32, 32, scale=0.3, softcap=30.0, rotary="interleaved", rotary_size=32),
    "partial": Form(4, 1, 33, 48, scale=0.4, rotary="half", rotary_size=16),
    "plain": Form(4, 2, 80, 8, scale=0.1),
}
CAPACITY, POSITIONS = 512, 400
COUNT, TAIL, TOKENS = 272, 9, 330
"""Tokens of the prefix, of the cache behind it, and in all."""
ATTRIBUTES = DENSE | {"selection": "lowrank", "select_block": BLOCK}


@dataclass
class Cache:
    """A cache whose first places belong to a prefix."""

    form: Form
    dtype: np.dtype
    prefix: Prefix
    wanted: int = 6
    batch: int = 1
    dense_below: int = 0

    def __post_init__(self) -> None:
        form, rng = self.form, np.random.default_rng(9)
        self.tokens = self.prefix.count + (TAIL if self.prefix.count else 0)
        self.past = []
        for size in (form.head_size, form.value_size):
            tensor = np.full((self.batch, form.kv_heads, CAPACITY, size), np.nan, self.dtype)
            tail = rng.standard_normal((form.kv_heads, self.tokens - self.prefix.count, size))
            tensor[:, :, self.prefix.count : self.tokens] = tail
            self.past.append(tensor)
        optional = ["cos", "sin"] if form.rotary != "none" else []
        tables = dict(zip(("far_cos", "far_sin"), angles_of(form, POSITIONS))) if optional else {}
        attributes = ATTRIBUTES | {"select_budget": self.wanted * BLOCK, "dense_below": self.dense_below}
        constants = tables | self.prefix.inputs()
        self.model = open_model(form, self.past, optional, storage=attributes, constants=constants)

    def step(self, feeds: dict[str, np.ndarray], count: int) -> np.ndarray:
        y, self.past = self.model.run(part(feeds, self.tokens, self.tokens + count), self.past, in_place=True)
        self.tokens += count
        return y

    def run(self, feeds: dict[str, np.ndarray], steps: Sequence[int]) -> np.ndarray:
        return np.concatenate([self.step(feeds, count) for count in steps], axis=1)


def part(feeds: dict[str, np.ndarray], begin: int, end: int) -> dict[str, np.ndarray]:
    new = {name: feeds[name][:, begin:end] for name in ("query", "key", "value", "cos", "sin") if name in feeds}
    return new | {"valid": feeds["valid"][:, :end]}


def tokens_of(form: Form, batch: int = 1, seed: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = {"query": (form.heads, form.head_size), "key": (form.kv_heads, form.head_size)}
    sizes["value"] = (form.kv_heads, form.value_size)
    feeds = {name: rng.standard_normal((batch, TOKENS, a * b)).astype(F32) for name, (a, b) in sizes.items()}
    feeds["valid"] = np.ones((batch, TOKENS), bool)
    if form.rotary != "none":
        for name, table in zip(("cos", "sin"), angles_of(form, TOKENS)):
            feeds[name] = np.repeat(table, batch, axis=0)
    return feeds


def expected(cache: Cache, feeds: dict[str, np.ndarray], count: int, row: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Results [count, H * E] of the next step, and the slots [K, total] that it reads."""
    form, at, prefix = cache.form, cache.tokens, cache.prefix
    new = part(feeds, at, at + count)
    q, k = split(new["query"], form.heads)[row], split(new["key"], form.kv_heads)[row]
    if form.rotary != "none":
        q, k = (rotate(one[None], new["cos"][:1], new["sin"][:1], form)[0] for one in (q, k))
    tail = slice(prefix.count, at)
    held = [tensor[row, :, tail].astype(np.float64) for tensor in cache.past]
    keys = np.concatenate([keys_of(form, prefix), held[0], k], axis=1)
    values = np.concatenate(
        [prefix.values[0].astype(np.float64), held[1], split(new["value"], form.kv_heads)[row]], axis=1
    )
    group, results, reads = form.heads // form.kv_heads, [], []
    for head in range(form.kv_heads):
        own = slice(head * group, (head + 1) * group)
        wanted = cache.wanted if count == 1 and at >= cache.dense_below else 10**6
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
    feeds = tokens_of(form)
    cache = Cache(form, DTYPES[dtype], random_prefix(form, COUNT, 20, 3, DTYPES[dtype]))
    for _ in range(8):
        wanted, reads = expected(cache, feeds, 1)
        np.testing.assert_allclose(cache.step(feeds, 1)[0], wanted, atol=2e-5)
        assert (reads[:, :COUNT].sum(axis=1) == (cache.wanted + 3) * BLOCK).all()
    wanted, reads = expected(cache, feeds, 30)
    assert reads.all()
    np.testing.assert_allclose(cache.step(feeds, 30)[0], wanted, atol=2e-5)


@pytest.mark.parametrize(("rank", "outliers", "count"), [(1, 0, 8), (16, 34, 272), (33, 1, 136), (96, 0, 400)])
def test_sizes(rank: int, outliers: int, count: int) -> None:
    form = FORMS["mha"]
    feeds = {name: np.concatenate([array] * 2, axis=1) for name, array in tokens_of(form).items()}
    prefix = random_prefix(form, count, rank, outliers, BF16)
    cache = Cache(form, BF16, prefix)
    for steps in (1, 1, 3, 40):
        wanted, _ = expected(cache, feeds, steps)
        np.testing.assert_allclose(cache.step(feeds, steps)[0], wanted, atol=2e-5)


@pytest.mark.parametrize("name", FORMS)
def test_all_chunks_are_dense_attention_over_the_same_keys(name: str) -> None:
    """Also with `dense_below`; steps of one token and of several."""
    form = FORMS[name]
    feeds = tokens_of(form)
    prefix = random_prefix(form, COUNT, 20, 3, F32)
    outputs = []
    for wanted, below in ((COUNT // BLOCK, 0), (1, TOKENS)):
        cache = Cache(form, F32, prefix, wanted=wanted, dense_below=below)
        outputs.append(cache.run(feeds, [1] * 10 + [7]))
    dense = Cache(form, F32, Prefix.empty(form, F32))
    filled = Cache(form, F32, prefix)
    dense.past = [tensor.copy() for tensor in filled.past]
    dense.past[0][0, :, :COUNT], dense.past[1][0, :, :COUNT] = keys_of(form, prefix), prefix.values[0]
    dense.tokens = filled.tokens
    wanted_outputs = dense.run(feeds, [1] * 10 + [7])
    for found in outputs:
        np.testing.assert_allclose(found, wanted_outputs, atol=1e-5)


def test_without_a_prefix_it_is_dense_attention_to_the_bit() -> None:
    form = FORMS["gqa"]
    feeds = tokens_of(form)
    cache = Cache(form, BF16, Prefix.empty(form, BF16))
    shapes = [(1, form.kv_heads, CAPACITY, size) for size in (form.head_size, form.value_size)]
    past = [np.zeros(shape, BF16) for shape in shapes]
    plain = open_model(form, past, ["cos", "sin"])
    for begin, end in ((0, 40), (40, 41), (41, 42)):
        y, past = plain.run(part(feeds, begin, end), past, in_place=True)
        np.testing.assert_array_equal(cache.step(feeds, end - begin), y)


def test_the_places_of_the_prefix_are_not_touched() -> None:
    form = FORMS["gqa"]
    cache = Cache(form, BF16, random_prefix(form, COUNT, 16, 2, BF16))
    cache.run(tokens_of(form), [1, 5, 1])
    for tensor in cache.past:
        assert np.isnan(tensor[:, :, :COUNT].astype(F32)).all()


def test_a_planted_chunk_is_read() -> None:
    """Its keys are ten times the query: without them the result is another one."""
    form = FORMS["plain"]
    feeds, prefix = tokens_of(form), random_prefix(form, COUNT, 20, 0, F32)
    cache = Cache(form, F32, prefix, wanted=1)
    query = feeds["query"][0, cache.tokens].reshape(form.heads, -1)
    coefficients = np.linalg.lstsq(prefix.basis[0, 0].astype(np.float64), 30 * query[0], rcond=None)[0]
    prefix.tokens[0, 40:48] = coefficients
    landmarks = keys_of(form, prefix).reshape(form.kv_heads, -1, BLOCK, form.head_size).mean(axis=2)
    cache = Cache(form, F32, replace(prefix, landmarks=landmarks[None].astype(F32)), wanted=1)
    found = cache.step(feeds, 1)[0, 0].reshape(form.heads, -1)
    np.testing.assert_allclose(found[0], prefix.values[0, 0, 40:48].mean(axis=0), atol=1e-3)


def test_rows_do_not_depend_on_each_other() -> None:
    form = FORMS["gqa"]
    prefix, feeds = random_prefix(form, COUNT, 20, 3, BF16), tokens_of(form, batch=3)
    together = Cache(form, BF16, prefix, batch=3).run(feeds, [1, 1, 4, 1])
    for row in range(3):
        own = {name: array[row : row + 1] for name, array in feeds.items()}
        np.testing.assert_array_equal(together[row : row + 1], Cache(form, BF16, prefix).run(own, [1, 1, 4, 1]))


@pytest.mark.parametrize(
    "change", ["unordered", "beyond", "negative", "chunks", "past", "positions", "hidden", "batch"]
)
def test_what_does_not_fit_is_refused(change: str) -> None:
    form = FORMS["mha"]
    feeds, prefix, messages = tokens_of(form), random_prefix(form, COUNT, 20, 3, F32), {}
    numbers = {"unordered": [5, 4, 9], "beyond": [1, 2, COUNT // BLOCK], "negative": [-1, 2, 3]}
    if change in numbers:
        prefix = replace(prefix, outliers=np.array([[numbers[change]] * form.kv_heads], np.int32))
        messages[change] = "outlier"
    if change == "chunks":
        prefix, messages = replace(prefix, landmarks=prefix.landmarks[:, :, 1:]), {change: "33 chunks of 8"}
    if change == "positions":
        prefix, messages = random_prefix(form, 408, 20, 3, F32), {change: "angles of 400 positions"}
        feeds = {name: np.concatenate([array] * 2, axis=1) for name, array in feeds.items()}
    cache = Cache(form, F32, prefix)
    if change == "past":
        cache.tokens, messages = COUNT - 1, {change: "counts 271 past tokens"}
    if change == "hidden":
        feeds["valid"][0, 100], messages = False, {change: "row 0 hides a token of the prefix"}
    if change == "batch":
        return _refuse_batches_of_angles(form, prefix)
    with pytest.raises(Exception, match=messages[change]):
        cache.step(feeds, 1)


def _refuse_batches_of_angles(form: Form, prefix: Prefix) -> None:
    past = [np.zeros((2, form.kv_heads, CAPACITY, size), F32) for size in (form.head_size, form.value_size)]
    tables = [np.repeat(table, 2, axis=0) for table in angles_of(form, POSITIONS)]
    constants = dict(zip(("far_cos", "far_sin"), tables)) | prefix.inputs()
    model = open_model(form, past, ["cos", "sin"], storage=ATTRIBUTES | {"select_budget": 8}, constants=constants)
    feeds = tokens_of(form, batch=2)
    with pytest.raises(Exception, match="the same for all rows"):
        model.run(part(feeds, COUNT, COUNT + 1), past, in_place=True)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"select_block": 0}, "select_block"),
        ({"select_sinks": 4}, "neither select_sinks nor select_recent"),
        ({"select_share": 1.5}, "select_share"),
        ({"window": 16}, "takes no window"),
    ],
)
def test_attributes_out_of_range_are_refused(attributes: dict[str, object], message: str) -> None:
    form = FORMS["plain"]
    past = [np.zeros((1, form.kv_heads, 64, size), F32) for size in (form.head_size, form.value_size)]
    with pytest.raises(Exception, match=message):
        open_model(form, past, storage=ATTRIBUTES | attributes, constants=Prefix.empty(form, F32).inputs())
