"""Selection `topk` that uses a choice again, as the log of reads tells it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from attention_oracle import Form
from cached_attention_model import open_model
from selected_cache import DENSE, F32, FORMS, PAGED, TOKENS, Cache, Expected, part, tokens_of
from selection_oracle import Selection

from effc.kernels.read_log import logged_reads

FORM = FORMS["gqa"]
PROMPT = 200


def selection(**options: float) -> Selection:
    return Selection("topk", block=1, budget=24, **options)


def alike(feeds: dict[str, np.ndarray], begin: int = PROMPT) -> dict[str, np.ndarray]:
    """All queries from `begin` on are one direction."""
    feeds["query"][:, begin:] = feeds["query"][:, begin : begin + 1] * np.linspace(1, 2, TOKENS - begin)[:, None]
    return feeds


def read(cache: Cache, feeds: dict[str, np.ndarray], row: int = 0) -> set[int]:
    """Tokens that one step reads."""
    with logged_reads() as found:
        cache.step(feeds, 1)
    of_row = [one for one in found if one.row == row]
    sets = [{token for begin, end in one.runs for token in range(begin, end)} for one in of_row]
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
        wanted = attention(Expected(cache, cache.selection, feeds), slots)
        np.testing.assert_allclose(cache.step(feeds, 1)[0, 0], wanted, atol=2e-5)


def attention(expected: Expected, slots: np.ndarray) -> np.ndarray:
    """Of the next token over some slots."""

    class Fixed(Expected):
        def _read(self, head: int, queries: np.ndarray) -> np.ndarray:
            mask = np.zeros(self.before + 1, bool)
            mask[slots] = True
            return mask

    expected.__class__ = Fixed
    return expected.step()[0]


def test_a_prompt_in_between_is_the_end_of_a_choice() -> None:
    feeds = alike(tokens_of(FORM))
    cache = Cache(FORM, "float32", selection(refresh=100, similarity=0.9))
    cache.run(feeds, [PROMPT, 1])
    cache.step(feeds, 30)
    tokens = read(cache, feeds)
    assert len(tokens) == 4 + 24 + 13


def test_rows_remember_alone_and_copies_are_alike() -> None:
    feeds = alike(tokens_of(FORM, batch=2))
    feeds["valid"][1, :57] = False
    options = selection(refresh=3, similarity=0.9)
    cache = Cache(FORM, "float32", options, batch=2)
    together = cache.run(feeds, [PROMPT, *[1] * 8])
    alone = {name: array[1:, 57:] for name, array in feeds.items()}
    found = Cache(FORM, "float32", options).run(alone, [PROMPT - 57, *[1] * 8])
    assert np.array_equal(found[0, -8:], together[1, -8:])
    at = cache.tokens
    for _ in range(4):
        step = part(feeds, at, at + 1)
        (first, copied), past = cache.model.run(step, cache.past), [one.copy() for one in cache.past]
        second, in_place = cache.model.run(step, cache.past, in_place=True)
        assert np.array_equal(first, second)
        for one, other in zip(copied, in_place, strict=True):
            assert np.array_equal(one[:, :at] if one.ndim == 2 else one, other[:, :at] if one.ndim == 2 else other)
        cache.past, at = in_place, at + 1
        assert not all(np.array_equal(*pair) for pair in zip(past, cache.past, strict=True))


@pytest.mark.parametrize(
    ("form", "storage", "options", "message"),
    [
        (FORM, DENSE, {"select_refresh": -1}, "'select_refresh' is -1"),
        (FORM, DENSE, {"select_similarity": 1.5}, "'select_similarity' is 1.5"),
        (replace(FORM, head_size=32), "int8", {"select_refresh": 2}, "select_refresh must be 0"),
    ],
)
def test_what_there_is_not(form: Form, storage: object, options: dict[str, object], message: str) -> None:
    from dataclasses import asdict

    attributes = dict(DENSE) if storage == DENSE else DENSE | asdict(PAGED[str(storage)]) | {"storage": "pages"}
    past = Cache(form, "float32", selection(refresh=2)).past
    with pytest.raises(Exception, match=message):
        open_model(form, past, storage=attributes | selection().attributes() | options)


def test_a_short_memory_is_refused() -> None:
    cache = Cache(FORM, "float32", selection(refresh=2))
    feeds = tokens_of(FORM)
    short = [*cache.past[:2], cache.past[2][:, :50], *cache.past[3:]]
    with pytest.raises(Exception, match="has 50 flags"):
        cache.model.run(part(feeds, 100, 101), short)
    assert cache.past[3].dtype == F32
