"""CachedAttention with selection `retain` in real onnxruntime sessions, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache as cached

import numpy as np
import pytest
from attention_feeds import part, shared_tokens, tokens_of
from attention_oracle import Form
from cached_attention_model import open_model
from retain_oracle import RowOracle, retained
from selected_cache import Cache, attributes_of

from effc.ir.dialect.selections import RetainSelection

FORMS = {
    "mha": Form(3, 3, 32, 16, scale=32**-0.5, rotary="half", rotary_size=32),
    "gqa": Form(6, 2, 32, 32, scale=0.3, softcap=30.0, rotary="interleaved", rotary_size=32),
    "partial": Form(4, 1, 33, 48, scale=0.4, rotary="half", rotary_size=16),
}
DTYPES = ("float32", "bfloat16", "float16")
RETAIN = RetainSelection(budget=24, sinks=2, recent=6, block=1)
STEPS = {
    "longest": [21, 21, 21, *[1] * 30],
    "chunks": [1, 17, 0, 6, 7, 18, 1, 1, 5, 20, *[1] * 20],
    "tokens": [1] * 70,
    "full": [20, 4, 1, 1, 3, *[1] * 20],
}


def expected(cache: Cache, feeds: dict[str, np.ndarray], steps: Sequence[int]) -> tuple[np.ndarray, RowOracle]:
    """The result of one row whose first token is valid, and what is kept after it."""
    assert isinstance(cache.selection, RetainSelection)
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
    assert numbers(cache) == oracle.numbers


def numbers(cache: Cache) -> list[int]:
    """Tokens that the first row keeps."""
    return [int(n) - 1 for n in cache.past[2][0] if n]


@cached
def expected_of(name: str, dtype: str, steps: str) -> tuple[np.ndarray, RowOracle]:
    """For every instruction set."""
    return expected(Cache(FORMS[name], dtype, RETAIN), shared_tokens(FORMS[name]), STEPS[steps])


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_matches_float64(name: str, dtype: str, steps: str, isa: str) -> None:
    feeds, cache = shared_tokens(FORMS[name]), Cache(FORMS[name], dtype, RETAIN)
    wanted, oracle = expected_of(name, dtype, steps)
    assert_same(cache, cache.run(feeds, STEPS[steps]), wanted, oracle)
    for tensor, tokens in zip(cache.past[:2], (oracle.keys, oracle.values), strict=True):
        stored = np.array(tokens).transpose(1, 0, 2)
        count = len(tokens)
        assert np.array_equal(tensor[0, :, :count].astype(np.float64), stored)  # un-rotated, rounded once
        assert not tensor[0, :, count:].any()


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 8, "sinks": 0, "recent": 0},
        {"budget": 9, "sinks": 2, "recent": 6},  # nothing is chosen by its score
        {"budget": 2, "sinks": 0, "recent": 0},
        {"budget": 24, "recent": 0, "block": 9},
        {"budget": 130, "sinks": 4, "recent": 20, "block": 16},  # more than a block of tokens
    ],
    ids=str,
)
def test_other_sizes_match_float64(options: dict[str, int]) -> None:
    retain, feeds = replace(RETAIN, **options), tokens_of(FORMS["gqa"])
    longest = retain.longest_step
    steps = [longest, *[1] * 20, max(1, longest // 2), *[1] * 5, 0, longest // 3, 1]
    check(Cache(FORMS["gqa"], "float32", retain), feeds, steps)


def test_the_example_of_the_paper() -> None:
    """Scores 9, 1, 5, 7, 3 with one sink in five places: the fourth best, token 1, goes for one new token."""
    retain = RetainSelection(budget=5, sinks=1, recent=0, block=1)
    scores = np.array([9, 1, 5, 7, 3, 0], np.float32)
    assert retained(retain, [0, 1, 2, 3, 4], scores, 1) == [0, 2, 3, 4]
    form, feeds = FORMS["mha"], tokens_of(FORMS["mha"])
    feeds["scores"][0, :6] = scores
    cache = Cache(form, "float32", retain)
    cache.run(feeds, [3, 2, 1])
    assert numbers(cache) == [0, 2, 3, 4, 5]


@pytest.mark.parametrize("name", FORMS)
def test_float16_rounds_once(name: str) -> None:
    """Without an overflow the numbers of a float32 cache, which turns keys before it stores them."""
    form, feeds = FORMS[name], tokens_of(FORMS[name])
    feeds["query"] /= 2
    steps = [140, *[1] * 25, 30]
    dense = Cache(form, "float32").run(feeds, steps)
    found = Cache(form, "float16", replace(RETAIN, budget=195)).run(feeds, steps)
    np.testing.assert_allclose(found, dense, atol=2e-2)


def test_the_best_stay() -> None:
    feeds, cache = tokens_of(FORMS["gqa"]), Cache(FORMS["gqa"], "float32", RETAIN)
    best = [40, 41]
    feeds["scores"][0, best] = 90
    for count in (21, 13, 10, *[1] * 20, 13, 5):
        cache.run(feeds, [count])
        kept = numbers(cache)
        assert len(kept) <= RETAIN.budget
        assert kept[-RETAIN.recent :] == list(range(cache.tokens - RETAIN.recent, cache.tokens))
        assert cache.tokens <= 41 or set(best) <= set(kept)


@pytest.mark.parametrize("score", [0.0, float(np.log(32000)), -3.0])
def test_of_equal_scores_the_newest_stay(score: float) -> None:
    """Nothing is known, all decayed to nothing, or all logits were uniform: the sinks and the last tokens."""
    form, feeds = FORMS["gqa"], tokens_of(FORMS["gqa"])
    feeds["scores"][:] = score
    cache = Cache(form, "float32", replace(RETAIN, recent=0))
    for steps in ([20], [20], [2], [1] * 9, [7]):
        cache.run(feeds, steps)
    assert numbers(cache) == [0, 1, *range(cache.tokens - 22, cache.tokens)]


def test_invalid_tokens_inside_are_never_kept() -> None:
    feeds = tokens_of(FORMS["gqa"])
    feeds["valid"][0, [1, 3, 20, 40, 41, 57]] = False
    check(Cache(FORMS["gqa"], "float32", RETAIN), feeds, [3, 18, 20, *[1] * 30, 20])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ring": 23}, "which is 24; it is 23"),
        ({"select_budget": 8}, "'select_budget' is 8"),
        ({"select_block": 0}, "'select_block' is 0"),
        ({"select_sinks": -1}, "'select_sinks' is -1"),
    ],
)
def test_what_there_is_not(options: dict[str, object], message: str) -> None:
    cache = Cache(FORMS["gqa"], "float32", RETAIN)
    with pytest.raises(Exception, match=message):
        open_model(cache.form, cache.past, storage=attributes_of(cache.kept_as, RETAIN) | options)


def test_steps_that_are_refused() -> None:
    feeds, cache = tokens_of(FORMS["gqa"]), Cache(FORMS["gqa"], "float32", RETAIN)
    with pytest.raises(Exception, match=r"has 22 new tokens, but a step may have at most .* = 21; read the text"):
        cache.run(feeds, [22])
    with pytest.raises(Exception, match=r"scores has shape \[1,5\], but must be \[1,3\]"):
        cache.model.run(cache.feeds(feeds, 3) | {"scores": feeds["scores"][:, :5]}, cache.past)
    cache.tokens = 30
    with pytest.raises(Exception, match="counts 30 past tokens of row 0, but its cache is empty"):
        cache.run(feeds, [1])
    cache.tokens = 0
    cache.run(feeds, [21])
    feeds["scores"][0, 5] = np.nan
    with pytest.raises(Exception, match="score of row 0, slot 5 is NaN"):
        cache.run(feeds, [5])


@pytest.mark.parametrize("damaged", [[*range(24, 0, -1)], [1] * 24, [*range(2, 26)], [-1, *range(1, 24)]])
def test_a_damaged_cache_is_refused(damaged: list[int]) -> None:
    feeds, cache = tokens_of(FORMS["gqa"]), Cache(FORMS["gqa"], "float32", RETAIN)
    cache.run(feeds, [20, 4])
    cache.past[2][0] = damaged
    with pytest.raises(Exception, match="of row 0 are not in order"):
        cache.run(feeds, [1])
