"""CachedAttention with selection `retain` in real onnxruntime sessions, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from attention_oracle import Form
from cached_attention_model import DENSE, Model, open_model
from retain_oracle import Retain, RowOracle, place_angles, retained

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
FORMS = {
    "mha": Form(3, 3, 32, 16, scale=32**-0.5, rotary="half", rotary_size=32),
    "gqa": Form(6, 2, 32, 32, scale=0.3, softcap=30.0, rotary="interleaved", rotary_size=32),
    "partial": Form(4, 1, 33, 48, scale=0.4, rotary="half", rotary_size=16),
}
DTYPES = {"float32": F32, "bfloat16": BF16, "float16": F16}
TOKENS = 200
RETAIN = Retain(budget=24)
STEPS = {
    "longest": [21, 21, 21, *[1] * 30],
    "chunks": [1, 17, 0, 6, 7, 18, 1, 1, 5, 20, *[1] * 20],
    "tokens": [1] * 70,
    "full": [20, 4, 1, 1, 3, *[1] * 20],
}


class Cache:
    """A session and its cache."""

    def __init__(self, form: Form, retain: Retain, dtype: np.dtype = F32, batch: int = 1) -> None:
        sizes = (form.head_size, form.value_size)
        self.past = [
            *(np.zeros((batch, form.kv_heads, retain.budget, size), dtype) for size in sizes),
            np.zeros((batch, retain.budget), np.int32),
        ]
        cos, sin = place_angles(form, np.arange(retain.budget))
        self.model: Model = open_model(
            form,
            self.past,
            storage=DENSE | retain.attributes(),
            constants={"place_cos": cos, "place_sin": sin},
            scores=True,
        )
        self.done = 0

    def run(self, feeds: dict[str, np.ndarray], steps: Sequence[int], in_place: bool = True) -> np.ndarray:
        results = []
        for count in steps:
            y, self.past = self.model.run(part(feeds, self.done, self.done + count), self.past, in_place)
            results.append(y)
            self.done += count
        return np.concatenate(results, axis=1)


class Dense(Cache):
    """The same without a selection, rotated by the position in the text."""

    def __init__(self, form: Form, dtype: np.dtype) -> None:
        self.past = [np.zeros((1, form.kv_heads, TOKENS, size), dtype) for size in (form.head_size, form.value_size)]
        self.model = open_model(form, self.past, ["cos", "sin"], storage=DENSE)
        self.done = 0

    def run(self, feeds: dict[str, np.ndarray], steps: Sequence[int], in_place: bool = True) -> np.ndarray:
        results = []
        for count in steps:
            new = part(feeds, self.done, self.done + count)
            del new["scores"]
            cos, sin = place_angles(self.model.form, np.arange(self.done, self.done + count))
            y, self.past = self.model.run(new | {"cos": cos, "sin": sin}, self.past, in_place)
            results.append(y)
            self.done += count
        return np.concatenate(results, axis=1)


def part(feeds: dict[str, np.ndarray], begin: int, end: int) -> dict[str, np.ndarray]:
    new = {name: feeds[name][:, begin:end] for name in ("query", "key", "value")}
    return new | {name: feeds[name][:, :end] for name in ("valid", "scores")}


def feeds_of(form: Form, batch: int = 1, seed: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    widths = {
        "query": form.heads * form.head_size,
        "key": form.kv_heads * form.head_size,
        "value": form.kv_heads * form.value_size,
    }
    feeds = {name: rng.standard_normal((batch, TOKENS, width)).astype(F32) for name, width in widths.items()}
    scores = rng.exponential(size=(batch, TOKENS)).astype(F32).round(1)  # some are equal
    return feeds | {"valid": np.ones((batch, TOKENS), bool), "scores": scores}


def row_of(feeds: dict[str, np.ndarray], row: int, first: int = 0) -> dict[str, np.ndarray]:
    return {name: array[row : row + 1, first:] for name, array in feeds.items()}


def expected(
    form: Form, retain: Retain, dtype: np.dtype, feeds: dict[str, np.ndarray], steps: Sequence[int]
) -> tuple[np.ndarray, RowOracle]:
    """The result of one row whose first token is valid, and what is kept after it."""
    oracle, results, done = RowOracle(form, retain, dtype), [], 0
    for count in steps:
        new = part(feeds, done, done + count)
        results.append(oracle.step(new, new["valid"][0, done:]))
        done += count
    return np.concatenate(results), oracle


def numbers(cache: Cache, row: int = 0) -> list[int]:
    """Tokens that a row keeps."""
    return [int(n) - 1 for n in cache.past[2][row] if n]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_matches_float64(name: str, dtype: str, steps: str, isa: str) -> None:
    form, feeds = FORMS[name], feeds_of(FORMS[name])
    cache = Cache(form, RETAIN, DTYPES[dtype])
    found = cache.run(feeds, STEPS[steps])
    wanted, oracle = expected(form, RETAIN, DTYPES[dtype], feeds, STEPS[steps])
    np.testing.assert_allclose(found[0], wanted, atol=2e-5)
    assert numbers(cache) == oracle.numbers
    for tensor, tokens in zip(cache.past[:2], (oracle.keys, oracle.values), strict=True):
        stored = np.array(tokens).transpose(1, 0, 2)
        count = len(tokens)
        assert np.array_equal(tensor[0, :, :count].astype(np.float64), stored)  # un-rotated, rounded once
        assert not tensor[0, :, count:].any()


@pytest.mark.parametrize(
    "retain",
    [
        Retain(budget=8, sinks=0, recent=0),
        Retain(budget=9, sinks=2, recent=6),  # nothing is chosen by its score
        Retain(budget=2, sinks=0, recent=0),
        Retain(budget=24, recent=0, block=9),
        Retain(budget=130, sinks=4, recent=20, block=16),  # more than a block of tokens
    ],
    ids=str,
)
def test_other_sizes_match_float64(retain: Retain) -> None:
    form, feeds = FORMS["gqa"], feeds_of(FORMS["gqa"])
    steps = [retain.longest, *[1] * 20, max(1, retain.longest // 2), *[1] * 5, 0, retain.longest // 3, 1]
    cache = Cache(form, retain)
    found = cache.run(feeds, steps)
    wanted, oracle = expected(form, retain, F32, feeds, steps)
    np.testing.assert_allclose(found[0], wanted, atol=2e-5)
    assert numbers(cache) == oracle.numbers


def test_the_example_of_the_paper() -> None:
    """Scores 9, 1, 5, 7, 3 with one sink in five places: the fourth best, token 1, goes for one new token."""
    retain = Retain(budget=5, sinks=1, recent=0)
    scores = np.array([9, 1, 5, 7, 3, 0], F32)
    assert retained(retain, [0, 1, 2, 3, 4], scores, 1) == [0, 2, 3, 4]
    form, feeds = FORMS["mha"], feeds_of(FORMS["mha"])
    feeds["scores"][0, :6] = scores
    cache = Cache(form, retain)
    cache.run(feeds, [3, 2, 1])
    assert numbers(cache) == [0, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_without_an_overflow_it_is_attention(name: str, dtype: str) -> None:
    form, feeds = FORMS[name], feeds_of(FORMS[name])
    steps = [140, *[1] * 25, 30]
    dense = Dense(form, F32).run(feeds, steps)
    found = Cache(form, Retain(budget=195), DTYPES[dtype]).run(feeds, steps)
    np.testing.assert_allclose(found, dense, atol=1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("name", FORMS)
def test_what_is_kept(name: str) -> None:
    """Ascending, with the first and last tokens and the best, never more than there are places."""
    feeds, cache = feeds_of(FORMS[name]), Cache(FORMS[name], RETAIN)
    best = [40, 41]
    feeds["scores"][0, best] = 90
    for count in (21, 13, 10, *[1] * 20, 13, 5):
        cache.run(feeds, [count])
        kept = numbers(cache)
        assert kept == sorted(set(kept))
        assert len(kept) <= RETAIN.budget
        assert kept[: RETAIN.sinks] == list(range(RETAIN.sinks))
        assert kept[-RETAIN.recent :] == list(range(cache.done - RETAIN.recent, cache.done))
        assert cache.done <= 41 or set(best) <= set(kept)


@pytest.mark.parametrize("score", [0.0, float(np.log(32000)), -3.0])
def test_of_equal_scores_the_newest_stay(score: float) -> None:
    """Nothing is known, all decayed to nothing, or all logits were uniform: the sinks and the last tokens."""
    form, feeds = FORMS["gqa"], feeds_of(FORMS["gqa"])
    feeds["scores"][:] = score
    cache = Cache(form, Retain(budget=24, sinks=2, recent=0))
    for steps in ([20], [20], [2], [1] * 9, [7]):
        cache.run(feeds, steps)
    assert numbers(cache) == [0, 1, *range(cache.done - 22, cache.done)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other(dtype: str) -> None:
    """A row in a left-padded batch is the row alone, also while it has fewer tokens than the budget."""
    form, feeds = FORMS["partial"], feeds_of(FORMS["partial"], batch=4)
    firsts = (0, 7, 15, 45)
    for row, first in enumerate(firsts):
        feeds["valid"][row, :first] = False
    steps = [20, 20, *[1] * 40, 5]
    cache = Cache(form, RETAIN, DTYPES[dtype], batch=4)
    together = cache.run(feeds, steps)
    for row, first in enumerate(firsts):
        own = {0: [20, 20], 7: [13, 20], 15: [5, 20], 45: []}[first]
        own += [*[1] * (80 - max(first, 40)), 5]
        alone = Cache(form, RETAIN, DTYPES[dtype])
        found = alone.run(row_of(feeds, row, first), own)
        assert np.array_equal(found[0], together[row, first:])
        assert numbers(alone) == numbers(cache, row)
        for one, other in zip(alone.past, cache.past, strict=True):
            assert np.array_equal(one[0], other[row])


def test_invalid_tokens_inside_are_never_kept() -> None:
    form, feeds = FORMS["gqa"], feeds_of(FORMS["gqa"])
    feeds["valid"][0, [1, 3, 20, 40, 41, 57]] = False
    steps = [3, 18, 20, *[1] * 30, 20]
    cache = Cache(form, RETAIN)
    found = cache.run(feeds, steps)
    wanted, oracle = expected(form, RETAIN, F32, feeds, steps)
    np.testing.assert_allclose(found[0], wanted, atol=2e-5)
    assert numbers(cache) == oracle.numbers


def test_copies_are_steps_in_place() -> None:
    form, feeds = FORMS["partial"], feeds_of(FORMS["partial"])
    caches = [Cache(form, RETAIN), Cache(form, RETAIN)]
    steps = [20, 1, 16, *[1] * 20, 3]
    first, second = (cache.run(feeds, steps, place) for cache, place in zip(caches, (True, False), strict=True))
    assert np.array_equal(first, second)
    for one, other in zip(caches[0].past, caches[1].past, strict=True):
        assert np.array_equal(one, other)


def test_the_same_step_twice() -> None:
    form, feeds = FORMS["gqa"], feeds_of(FORMS["gqa"])
    cache = Cache(form, RETAIN)
    cache.run(feeds, [20, 12])
    step = part(feeds, 32, 42)
    (first, kept), (second, again) = (cache.model.run(step, cache.past) for _ in range(2))
    assert np.array_equal(first, second)
    for one, other in zip(kept, again, strict=True):
        assert np.array_equal(one, other)


def test_a_used_buffer_is_a_new_cache() -> None:
    form, feeds = FORMS["gqa"], feeds_of(FORMS["gqa"])
    fresh, used = Cache(form, RETAIN), Cache(form, RETAIN)
    used.run(feeds_of(form, seed=8), [17, 20])
    used.done = 0
    steps = [10, *[1] * 60]
    assert np.array_equal(used.run(feeds, steps), fresh.run(feeds, steps))
    assert numbers(used) == numbers(fresh)


def test_group_heads_are_repeated_key_heads() -> None:
    form, feeds = FORMS["gqa"], feeds_of(FORMS["gqa"])
    group = form.heads // form.kv_heads
    repeated = {
        name: np.repeat(feeds[name].reshape(1, TOKENS, form.kv_heads, -1), group, axis=2).reshape(1, TOKENS, -1)
        for name in ("key", "value")
    }
    steps = [20, 20, *[1] * 20]
    grouped, each = Cache(form, RETAIN), Cache(replace(form, kv_heads=form.heads), RETAIN)
    np.testing.assert_allclose(grouped.run(feeds, steps), each.run(feeds | repeated, steps), atol=1e-6)
    assert numbers(grouped) == numbers(each)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        (replace(FORMS["gqa"], window=40), {}, "takes no window"),
        (replace(FORMS["gqa"], causal=0), {}, "needs causal attention"),
        (replace(FORMS["gqa"], rotary="none", rotary_size=0), {}, "give rotary"),
        (FORMS["gqa"], {"ring": 23}, "which is 24; it is 23"),
        (FORMS["gqa"], {"select_budget": 8}, "'select_budget' is 8"),
        (FORMS["gqa"], {"select_block": 0}, "'select_block' is 0"),
        (FORMS["gqa"], {"select_sinks": -1}, "'select_sinks' is -1"),
    ],
)
def test_what_there_is_not(form: Form, options: dict[str, object], message: str) -> None:
    past = Cache(FORMS["gqa"], RETAIN).past
    with pytest.raises(Exception, match=message):
        open_model(form, past, storage=DENSE | RETAIN.attributes() | options)


def test_steps_that_are_refused() -> None:
    form, feeds = FORMS["gqa"], feeds_of(FORMS["gqa"])
    cache = Cache(form, RETAIN)
    with pytest.raises(Exception, match=r"has 22 new tokens, but a step may have at most .* = 21; read the text"):
        cache.run(feeds, [22])
    with pytest.raises(Exception, match="counts 30 past tokens of row 0, but its cache is empty"):
        cache.model.run(part(feeds, 30, 31), cache.past)
    with pytest.raises(Exception, match=r"scores has shape \[1,5\], but must be \[1,3\]"):
        cache.model.run(part(feeds, 0, 3) | {"scores": feeds["scores"][:, :5]}, cache.past)
    cache.run(feeds, [21])
    feeds["scores"][0, 5] = np.nan
    with pytest.raises(Exception, match="score of row 0, slot 5 is NaN"):
        cache.run(feeds, [5])


@pytest.mark.parametrize("damaged", [[*range(24, 0, -1)], [1] * 24, [*range(2, 26)], [-1, *range(1, 24)]])
def test_a_damaged_cache_is_refused(damaged: list[int]) -> None:
    form, feeds = FORMS["gqa"], feeds_of(FORMS["gqa"])
    cache = Cache(form, RETAIN)
    cache.run(feeds, [20, 4])
    cache.past[2][0] = damaged
    with pytest.raises(Exception, match="of row 0 are not in order"):
        cache.run(feeds, [1])
