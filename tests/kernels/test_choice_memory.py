"""Selection `topk` that uses a choice again, as the log of reads tells it."""

from __future__ import annotations

import numpy as np
import pytest
from attention_feeds import FORMS, TOKENS, tokens_of
from cached_attention_model import open_model
from selected_cache import Cache, attributes_of
from selection_cases import topk_selection
from stored_tokens import StoredTokens

from effc.ir.dialect.selections import TopKSelection

FORM = FORMS["gqa"]
PROMPT = 200


def selection(**options: float) -> TopKSelection:
    return topk_selection(budget=24, **options)


def alike(feeds: dict[str, np.ndarray], begin: int = PROMPT) -> dict[str, np.ndarray]:
    """All queries from `begin` on are one direction."""
    feeds["query"][:, begin:] = feeds["query"][:, begin : begin + 1] * np.linspace(1, 2, TOKENS - begin)[:, None]
    return feeds


def read(cache: Cache, feeds: dict[str, np.ndarray]) -> set[int]:
    """Tokens that one step reads."""
    _, found = cache.logged_step(feeds)
    sets = [set(tokens.tolist()) for (row, _), tokens in found.items() if row == 0]
    assert all(one == sets[0] for one in sets)
    return sets[0]


def after(cache: Cache, tokens: int, feeds: dict[str, np.ndarray]) -> list[set[int]]:
    return [read(cache, feeds) for _ in range(tokens)]


def test_one_choice_serves_as_many_steps_as_it_may() -> None:
    feeds = alike(tokens_of(FORM))
    cache = Cache(FORM, "float32", selection(refresh=4, similarity=0.9))
    cache.run(feeds, [PROMPT])
    steps = after(cache, 9, feeds)
    for place, tokens in enumerate(steps):
        first = place // 4 * 4
        old = {token for token in steps[first] if token < PROMPT + first - 12}
        assert tokens == old | set(range(PROMPT + first - 12, PROMPT + place + 1))
    assert len(steps[0]) == 4 + 24 + 13


@pytest.mark.parametrize("similarity", [1.0, 0.5])
def test_another_query_chooses_anew(similarity: float) -> None:
    """As a cache that never remembers."""
    feeds = tokens_of(FORM)
    remembers, forgets = (
        Cache(FORM, "float32", one) for one in (selection(refresh=50, similarity=similarity), selection())
    )
    for cache in (remembers, forgets):
        cache.run(feeds, [PROMPT])
    assert after(remembers, 10, feeds) == after(forgets, 10, feeds)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FORMS)
def test_what_is_read_again_matches_float64(name: str, storage: str, isa: str) -> None:
    form = FORMS[name]
    feeds = alike(tokens_of(form))
    cache = Cache(form, storage, selection(refresh=100, similarity=0.9))
    cache.run(feeds, [PROMPT])
    chosen = sorted(read(cache, feeds))
    for _ in range(5):
        tokens = [token for token in chosen if token < PROMPT - 12]
        slots = np.array([*tokens, *range(PROMPT - 12, cache.tokens + 1)])
        wanted = StoredTokens(cache, feeds).attention({(0, head): slots for head in range(form.kv_heads)})
        np.testing.assert_allclose(cache.step(feeds, 1)[:, 0], wanted, atol=2e-5)


def test_a_prompt_in_between_is_the_end_of_a_choice() -> None:
    feeds = alike(tokens_of(FORM))
    cache = Cache(FORM, "float32", selection(refresh=100, similarity=0.9))
    cache.run(feeds, [PROMPT, 1])
    cache.step(feeds, 30)
    tokens = read(cache, feeds)
    assert len(tokens) == 4 + 24 + 13


def test_copies_remember_alike() -> None:
    feeds = alike(tokens_of(FORM, batch=2, firsts=(0, 57)))
    cache = Cache(FORM, "float32", selection(refresh=3, similarity=0.9), batch=2)
    cache.run(feeds, [PROMPT, *[1] * 8])
    for _ in range(4):
        at, past = cache.tokens, [one.copy() for one in cache.past]
        first, copied = cache.attempt(feeds, 1)
        assert np.array_equal(first, cache.step(feeds, 1))
        for one, other in zip(copied, cache.past, strict=True):
            assert np.array_equal(one[:, :at] if one.ndim == 2 else one, other[:, :at] if one.ndim == 2 else other)
        assert not all(np.array_equal(*pair) for pair in zip(past, cache.past, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select_refresh": -1}, "'select_refresh' is -1"),
        ({"select_similarity": 1.5}, "'select_similarity' is 1.5"),
    ],
)
def test_what_there_is_not(options: dict[str, object], message: str) -> None:
    cache = Cache(FORM, "float32", selection(refresh=2))
    with pytest.raises(Exception, match=message):
        open_model(FORM, cache.past, storage=attributes_of(cache.kept_as, cache.selection) | options)


def test_a_short_memory_is_refused() -> None:
    cache = Cache(FORM, "float32", selection(refresh=2))
    cache.past[2], cache.tokens = cache.past[2][:, :50], 100
    with pytest.raises(Exception, match="has 50 flags"):
        cache.step(tokens_of(FORM), 1)
