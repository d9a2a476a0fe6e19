"""CachedAttention with selection `evict` in real onnxruntime sessions, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from attention_oracle import Form
from cached_attention_model import DENSE, Model, open_model
from evict_oracle import Evict, RowOracle

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
FORMS = {
    "mha": Form(3, 3, 32, 16, scale=32**-0.5),
    "gqa": Form(6, 2, 32, 32, scale=0.3, softcap=30.0),
    "rotary": Form(4, 1, 33, 48, scale=0.4, rotary="half", rotary_size=32),
}
DTYPES = {"float32": F32, "bfloat16": BF16}
TOKENS = 200
EVICT = Evict(budget=24)
STEPS = {
    "at once": [120, *[1] * 40],
    "chunks": [1, 50, 0, 6, 7, 30, 1, 1, 5, 40, *[1] * 20],
    "tokens": [1] * 70,
    "budget": [24, 1, 5, 1, *[1] * 20],
    "one below the room": [29, 1, 1, *[1] * 10],
    "one past the room": [31, *[1] * 10],
}


class Cache:
    """A session and its cache."""

    def __init__(self, form: Form, evict: Evict, dtype: np.dtype = F32, batch: int = 1) -> None:
        lead, group = (batch, form.kv_heads), form.heads // form.kv_heads
        self.past = [
            *(np.zeros((*lead, evict.places, size), dtype) for size in (form.head_size, form.value_size)),
            np.zeros((*lead, evict.places), np.int32),
            np.zeros((*lead, evict.recent, group * form.head_size), F32),
        ]
        optional = ["cos", "sin"] if form.rotary != "none" else []
        self.model: Model = open_model(form, self.past, optional, storage=DENSE | evict.attributes())
        self.done = 0

    def run(self, feeds: dict[str, np.ndarray], steps: Sequence[int], in_place: bool = True) -> np.ndarray:
        results = []
        for count in steps:
            y, self.past = self.model.run(part(feeds, self.done, self.done + count), self.past, in_place)
            results.append(y)
            self.done += count
        return np.concatenate(results, axis=1)


class Dense(Cache):
    """The same without a selection."""

    def __init__(self, form: Form, dtype: np.dtype) -> None:
        self.past = [np.zeros((1, form.kv_heads, TOKENS, size), dtype) for size in (form.head_size, form.value_size)]
        optional = ["cos", "sin"] if form.rotary != "none" else []
        self.model = open_model(form, self.past, optional, storage=DENSE)
        self.done = 0


def part(feeds: dict[str, np.ndarray], begin: int, end: int) -> dict[str, np.ndarray]:
    new = {name: feeds[name][:, begin:end] for name in ("query", "key", "value", "cos", "sin") if name in feeds}
    return new | {"valid": feeds["valid"][:, :end]}


def feeds_of(form: Form, batch: int = 1, seed: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    widths = {
        "query": form.heads * form.head_size,
        "key": form.kv_heads * form.head_size,
        "value": form.kv_heads * form.value_size,
    }
    feeds = {name: rng.standard_normal((batch, TOKENS, width)).astype(F32) for name, width in widths.items()}
    feeds["query"] *= 2
    feeds["valid"] = np.ones((batch, TOKENS), bool)
    if form.rotary != "none":
        angles = np.arange(TOKENS)[:, None] / 50.0 ** np.linspace(0, 1, form.rotary_size // 2)
        angles = np.broadcast_to(angles, (batch, *angles.shape))
        feeds |= {"cos": np.cos(angles).astype(F32), "sin": np.sin(angles).astype(F32)}
    return feeds


def row_of(feeds: dict[str, np.ndarray], row: int, first: int = 0) -> dict[str, np.ndarray]:
    return {name: array[row : row + 1, first:] for name, array in feeds.items()}


def expected(
    form: Form, evict: Evict, dtype: np.dtype, feeds: dict[str, np.ndarray], steps: Sequence[int]
) -> tuple[np.ndarray, RowOracle]:
    """The result of one row whose first token is valid, and what is kept after it."""
    oracle, results, done = RowOracle(form, evict, dtype), [], 0
    for count in steps:
        new = part(feeds, done, done + count)
        results.append(oracle.step(new, new["valid"][0, done:]))
        done += count
    return np.concatenate(results), oracle


def numbers(cache: Cache, row: int = 0) -> list[list[int]]:
    """Tokens that each key head keeps."""
    return [[int(n) - 1 for n in head if n] for head in cache.past[2][row]]


def kept_by(oracle: RowOracle) -> list[list[int]]:
    return [[one.number for one in head] for head in oracle.kept]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_matches_float64(name: str, dtype: str, steps: str, isa: str) -> None:
    form, feeds = FORMS[name], feeds_of(FORMS[name])
    cache = Cache(form, EVICT, DTYPES[dtype])
    found = cache.run(feeds, STEPS[steps])
    wanted, oracle = expected(form, EVICT, DTYPES[dtype], feeds, STEPS[steps])
    np.testing.assert_allclose(found[0], wanted, atol=2e-5)
    assert numbers(cache) == kept_by(oracle)
    for head, tokens in enumerate(oracle.kept):
        for tensor, what in zip(cache.past[:2], ("key", "value"), strict=True):
            stored = np.array([getattr(one, what) for one in tokens])
            np.testing.assert_allclose(tensor[0, head, : len(tokens)].astype(np.float64), stored, rtol=1e-2, atol=1e-5)
            assert not tensor[0, head, len(tokens) :].any()


@pytest.mark.parametrize(
    "evict",
    [
        Evict(budget=8, sinks=2, recent=6),  # all of it is forced
        Evict(budget=9, sinks=0, recent=1, block=1, pool=1),
        Evict(budget=32, sinks=31, recent=1, pool=3),
        Evict(budget=20, sinks=0, recent=7, block=3, pool=9),
        Evict(budget=20, recent=3, block=17),
    ],
    ids=str,
)
def test_other_sizes_match_float64(evict: Evict) -> None:
    form, feeds, steps = FORMS["gqa"], feeds_of(FORMS["gqa"]), [100, *[1] * 30, 9]
    cache = Cache(form, evict)
    found = cache.run(feeds, steps)
    wanted, oracle = expected(form, evict, F32, feeds, steps)
    np.testing.assert_allclose(found[0], wanted, atol=2e-5)
    assert numbers(cache) == kept_by(oracle)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_without_an_overflow_it_is_dense(name: str, dtype: str) -> None:
    """The same bits as without a selection, up to and with the step that overflows."""
    form, feeds = FORMS[name], feeds_of(FORMS[name])
    evict = Evict(budget=150, recent=20, block=20)
    steps = [140, *[1] * 25, 30]
    dense = Dense(form, DTYPES[dtype]).run(feeds, steps)
    found = Cache(form, evict, DTYPES[dtype]).run(feeds, steps)
    assert np.array_equal(found, dense)


@pytest.mark.parametrize("name", FORMS)
def test_what_is_kept(name: str) -> None:
    """As many for every head, ascending, with the first and last tokens, never more than there are places."""
    feeds, cache = feeds_of(FORMS[name]), Cache(FORMS[name], EVICT)
    for count in (90, *[1] * 20, 13, 5):
        cache.run(feeds, [count])
        for head in numbers(cache):
            assert head == sorted(set(head))
            assert EVICT.budget <= len(head) <= EVICT.places
            assert head[: EVICT.sinks] == list(range(EVICT.sinks))
            assert head[-EVICT.recent :] == list(range(cache.done - EVICT.recent, cache.done))
        assert len({len(head) for head in numbers(cache)}) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other(dtype: str) -> None:
    """A row in a left-padded batch is the row alone, also while it has fewer tokens than the budget."""
    form, feeds = FORMS["rotary"], feeds_of(FORMS["rotary"], batch=4)
    firsts = (0, 57, 85, 95)
    for row, first in enumerate(firsts):
        feeds["valid"][row, :first] = False
    steps = [90, *[1] * 40, 5]
    cache = Cache(form, EVICT, DTYPES[dtype], batch=4)
    together = cache.run(feeds, steps)
    for row, first in enumerate(firsts):
        own = [90 - first, *steps[1:]] if first < 90 else [*[1] * (130 - first), 5]
        alone = Cache(form, EVICT, DTYPES[dtype])
        found = alone.run(row_of(feeds, row, first), own)
        assert np.array_equal(found[0], together[row, first:])
        assert numbers(alone) == [numbers(cache, row)[head] for head in range(form.kv_heads)]
        for one, other in zip(alone.past, cache.past, strict=True):
            assert np.array_equal(one[0], other[row])


def test_invalid_tokens_inside_are_never_kept() -> None:
    form, feeds = FORMS["gqa"], feeds_of(FORMS["gqa"])
    feeds["valid"][0, [3, 40, 41, 88, 97, 120]] = False
    steps = [3, 90, *[1] * 30, 20]
    cache = Cache(form, EVICT)
    found = cache.run(feeds, steps)
    wanted, oracle = expected(form, EVICT, F32, feeds, steps)
    np.testing.assert_allclose(found[0], wanted, atol=2e-5)
    assert numbers(cache) == kept_by(oracle)


def test_copies_are_steps_in_place() -> None:
    form, feeds = FORMS["rotary"], feeds_of(FORMS["rotary"])
    caches = [Cache(form, EVICT), Cache(form, EVICT)]
    steps = [20, 1, 60, *[1] * 20, 3]
    first, second = (cache.run(feeds, steps, place) for cache, place in zip(caches, (True, False), strict=True))
    assert np.array_equal(first, second)
    for one, other in zip(caches[0].past, caches[1].past, strict=True):
        assert np.array_equal(one, other)


def test_the_same_step_twice() -> None:
    form, feeds = FORMS["gqa"], feeds_of(FORMS["gqa"])
    cache = Cache(form, EVICT)
    cache.run(feeds, [80])
    step = part(feeds, 80, 100)
    (first, kept), (second, again) = (cache.model.run(step, cache.past) for _ in range(2))
    assert np.array_equal(first, second)
    for one, other in zip(kept, again, strict=True):
        assert np.array_equal(one, other)


def test_a_used_buffer_is_a_new_cache() -> None:
    form, feeds = FORMS["gqa"], feeds_of(FORMS["gqa"])
    fresh, used = Cache(form, EVICT), Cache(form, EVICT)
    used.run(feeds_of(form, seed=8), [77])
    used.done = 0
    steps = [10, *[1] * 60]
    assert np.array_equal(used.run(feeds, steps), fresh.run(feeds, steps))
    assert numbers(used) == numbers(fresh)


def test_group_heads_are_repeated_key_heads() -> None:
    """GQA with one query repeated over its group keeps what the key head alone keeps."""
    form, feeds = FORMS["gqa"], feeds_of(FORMS["gqa"])
    group = form.heads // form.kv_heads
    one = feeds["query"].reshape(1, TOKENS, form.kv_heads, group, -1)[:, :, :, :1]
    feeds["query"] = np.repeat(one, group, axis=3).reshape(1, TOKENS, -1)
    steps = [80, *[1] * 20]
    grouped, alone = Cache(form, EVICT), Cache(replace(form, heads=form.kv_heads), EVICT)
    found = grouped.run(feeds, steps)
    single = alone.run(feeds | {"query": one.reshape(1, TOKENS, -1)}, steps)
    wanted = np.repeat(single.reshape(1, -1, form.kv_heads, 1, form.value_size), group, axis=3)
    np.testing.assert_allclose(found, wanted.reshape(found.shape), atol=1e-6)
    assert numbers(grouped) == numbers(alone)


def test_a_token_that_the_end_attends_to_is_kept_with_its_neighbours() -> None:
    form, feeds = FORMS["mha"], feeds_of(FORMS["mha"])
    feeds["key"][0, 50] = 3 * feeds["query"][0, 95:101].mean(axis=0)
    cache = Cache(form, EVICT)
    cache.run(feeds, [101])
    for head in numbers(cache):
        assert set(range(48, 53)) <= set(head)


def test_ties_go_to_the_earlier_token() -> None:
    form, feeds = FORMS["mha"], feeds_of(FORMS["mha"])
    feeds["key"][:] = 1
    cache = Cache(form, Evict(budget=20, sinks=0, recent=4, pool=1))
    cache.run(feeds, [100])
    assert numbers(cache) == [[*range(16), *range(96, 100)]] * form.kv_heads


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        (replace(FORMS["gqa"], window=40), {}, "takes no window"),
        (replace(FORMS["gqa"], scale=-1.0), {}, "takes no negative scale"),
        (replace(FORMS["gqa"], causal=0), {}, "needs causal attention"),
        (FORMS["gqa"], {"ring": 29}, "which is 30; it is 29"),
        (FORMS["gqa"], {"select_budget": 7}, "'select_budget' is 7"),
        (FORMS["gqa"], {"select_recent": 0}, "'select_recent' is 0"),
        (FORMS["gqa"], {"select_block": 0}, "'select_block' is 0"),
        (FORMS["gqa"], {"select_pool": 4}, "'select_pool' is 4; it must be odd"),
        (FORMS["gqa"], {"select_pool": 0}, "'select_pool' is 0"),
    ],
)
def test_what_there_is_not(form: Form, options: dict[str, object], message: str) -> None:
    past = Cache(FORMS["gqa"], EVICT).past
    with pytest.raises(Exception, match=message):
        open_model(form, past, storage=DENSE | EVICT.attributes() | options)


def test_a_bias_and_an_empty_cache_are_refused() -> None:
    form, feeds = FORMS["gqa"], feeds_of(FORMS["gqa"])
    cache = Cache(form, EVICT)
    biased = open_model(form, cache.past, ["bias"], storage=DENSE | EVICT.attributes())
    with pytest.raises(Exception, match="takes no bias"):
        biased.run(part(feeds, 0, 1) | {"bias": np.zeros((1, 1, 1, 1), F32)}, cache.past)
    with pytest.raises(Exception, match="counts 30 past tokens of row 0, but its cache is empty"):
        cache.model.run(part(feeds, 30, 31), cache.past)


@pytest.mark.parametrize("numbers", [[*range(30, 0, -1)], [1] * 30])
def test_a_damaged_cache_is_refused(numbers: list[int]) -> None:
    form, feeds = FORMS["gqa"], feeds_of(FORMS["gqa"])
    cache = Cache(form, EVICT)
    cache.run(feeds, [30])
    cache.past[2][0, 1] = numbers
    with pytest.raises(Exception, match="row 0, head 1 are not in order"):
        cache.run(feeds, [1])
