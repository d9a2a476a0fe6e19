"""CachedAttention with selection `evict` in real onnxruntime sessions, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache as cached

import numpy as np
import pytest
from attention_feeds import FORMS, part, shared_tokens, tokens_of
from cached_attention_model import open_model
from evict_oracle import RowOracle
from selected_cache import Cache, attributes_of

from effc.ir.dialect.selections import EvictSelection

DTYPES = ("float32", "bfloat16")
EVICT = EvictSelection(budget=24, sinks=2, recent=6, block=6, pool=5)
STEPS = {
    "at once": [120, *[1] * 40],
    "chunks": [1, 50, 0, 6, 7, 30, 1, 1, 5, 40, *[1] * 20],
    "tokens": [1] * 70,
    "budget": [24, 1, 5, 1, *[1] * 20],
    "one below the room": [29, 1, 1, *[1] * 10],
    "one past the room": [31, *[1] * 10],
}


def expected(cache: Cache, feeds: dict[str, np.ndarray], steps: Sequence[int]) -> tuple[np.ndarray, RowOracle]:
    """The result of one row whose first token is valid, and what is kept after it."""
    assert isinstance(cache.selection, EvictSelection)
    oracle, results, done = RowOracle(cache.form, cache.selection, cache.past[0].dtype), [], 0
    for count in steps:
        new = part(feeds, done, done + count)
        results.append(oracle.step(new, new["valid"][0, done:]))
        done += count
    return np.concatenate(results), oracle


def check(cache: Cache, feeds: dict[str, np.ndarray], steps: Sequence[int]) -> None:
    """Run a new cache beside the oracle."""
    assert_same(cache, cache.run(feeds, steps), *expected(cache, feeds, steps))


def assert_same(cache: Cache, found: np.ndarray, wanted: np.ndarray, oracle: RowOracle) -> None:
    np.testing.assert_allclose(found[0], wanted, atol=2e-5)
    assert numbers(cache) == [[one.number for one in head] for head in oracle.kept]


def numbers(cache: Cache) -> list[list[int]]:
    """Tokens that each key head keeps."""
    return [[int(n) - 1 for n in head if n] for head in cache.past[2][0]]


@cached
def expected_of(name: str, dtype: str, steps: str) -> tuple[np.ndarray, RowOracle]:
    """For every instruction set."""
    return expected(Cache(FORMS[name], dtype, EVICT), shared_tokens(FORMS[name]), STEPS[steps])


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_matches_float64(name: str, dtype: str, steps: str, isa: str) -> None:
    feeds, cache = shared_tokens(FORMS[name]), Cache(FORMS[name], dtype, EVICT)
    wanted, oracle = expected_of(name, dtype, steps)
    assert_same(cache, cache.run(feeds, STEPS[steps]), wanted, oracle)
    for head, tokens in enumerate(oracle.kept):
        for tensor, what in zip(cache.past[:2], ("key", "value"), strict=True):
            stored = np.array([getattr(one, what) for one in tokens])
            np.testing.assert_allclose(tensor[0, head, : len(tokens)].astype(np.float64), stored, rtol=1e-2, atol=1e-5)
            assert not tensor[0, head, len(tokens) :].any()


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 8},  # all of it is forced
        {"budget": 9, "sinks": 0, "recent": 1, "block": 1, "pool": 1},
        {"budget": 32, "sinks": 31, "recent": 1, "pool": 3},
        {"budget": 20, "sinks": 0, "recent": 7, "block": 3, "pool": 9},
        {"budget": 20, "recent": 3, "block": 17},
    ],
    ids=str,
)
def test_other_sizes_match_float64(options: dict[str, int]) -> None:
    form, feeds = FORMS["gqa"], tokens_of(FORMS["gqa"])
    check(Cache(form, "float32", replace(EVICT, **options)), feeds, [100, *[1] * 30, 9])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_without_an_overflow_it_is_dense(name: str, dtype: str) -> None:
    """The same bits as without a selection, up to and with the step that overflows."""
    form, feeds = FORMS[name], tokens_of(FORMS[name])
    evict = replace(EVICT, budget=150, recent=20, block=20)
    steps = [140, *[1] * 25, 30]
    dense = Cache(form, dtype).run(feeds, steps)
    assert np.array_equal(Cache(form, dtype, evict).run(feeds, steps), dense)


def test_as_many_stay_for_every_head() -> None:
    feeds, cache = tokens_of(FORMS["gqa"]), Cache(FORMS["gqa"], "float32", EVICT)
    for count in (90, *[1] * 20, 13, 5):
        cache.run(feeds, [count])
        for head in numbers(cache):
            assert EVICT.budget <= len(head) <= EVICT.budget + EVICT.block
        assert len({len(head) for head in numbers(cache)}) == 1


def test_invalid_tokens_inside_are_never_kept() -> None:
    feeds = tokens_of(FORMS["gqa"])
    feeds["valid"][0, [3, 40, 41, 88, 97, 120]] = False
    check(Cache(FORMS["gqa"], "float32", EVICT), feeds, [3, 90, *[1] * 30, 20])


def test_a_token_that_the_end_attends_to_is_kept_with_its_neighbours() -> None:
    form, feeds = FORMS["mha"], tokens_of(FORMS["mha"])
    feeds["key"][0, 50] = 3 * feeds["query"][0, 95:101].mean(axis=0)
    cache = Cache(form, "float32", EVICT)
    cache.run(feeds, [101])
    for head in numbers(cache):
        assert set(range(48, 53)) <= set(head)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ring": 29}, "which is 30; it is 29"),
        ({"select_budget": 7}, "'select_budget' is 7"),
        ({"select_recent": 0}, "'select_recent' is 0"),
        ({"select_block": 0}, "'select_block' is 0"),
        ({"select_pool": 4}, "'select_pool' is 4; it must be odd"),
        ({"select_pool": 0}, "'select_pool' is 0"),
    ],
)
def test_what_there_is_not(options: dict[str, object], message: str) -> None:
    cache = Cache(FORMS["gqa"], "float32", EVICT)
    with pytest.raises(Exception, match=message):
        open_model(cache.form, cache.past, storage=attributes_of(cache.kept_as, EVICT) | options)


def test_an_empty_cache_is_refused() -> None:
    cache = Cache(FORMS["gqa"], "float32", EVICT)
    cache.tokens = 30
    with pytest.raises(Exception, match="counts 30 past tokens of row 0, but its cache is empty"):
        cache.step(tokens_of(cache.form), 1)


@pytest.mark.parametrize("damaged", [[*range(30, 0, -1)], [1] * 30])
def test_a_damaged_cache_is_refused(damaged: list[int]) -> None:
    feeds, cache = tokens_of(FORMS["gqa"]), Cache(FORMS["gqa"], "float32", EVICT)
    cache.run(feeds, [30])
    cache.past[2][0, 1] = damaged
    with pytest.raises(Exception, match="row 0, head 1 are not in order"):
        cache.run(feeds, [1])
