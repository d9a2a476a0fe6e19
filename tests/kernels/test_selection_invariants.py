"""What holds for every selection of CachedAttention, with every storage it can have: the table is `selection_cases.py`.

Reads are those of the log. What one selection does is tested in its own file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache as cached

import ml_dtypes
import numpy as np
import pytest
from attention_feeds import FORMS, repeated_keys, repeated_queries, row_of, shared_tokens, tokens_of
from attention_oracle import Form
from selected_cache import PAGED, Cache, Reads
from selection_case import PROMPT, TOKENS, Case, Setup
from selection_cases import CASES
from stored_tokens import StoredTokens

from effc.ir.dialect.selections import SELECTIONS

PAIRS = [(name, storage) for name, case in CASES.items() for storage in case.storages]
pairs = pytest.mark.parametrize(("name", "storage"), PAIRS)
CAPACITY = 256
DECODED = 9
"""Steps of one token: more than any choice, or room, lasts."""


def prepared(case: Case, setup: Setup, cache: Cache, feeds: dict[str, np.ndarray]) -> Cache:
    """The cache after its prompt."""
    cache.run(feeds, case.prompt(setup))
    setup.prepare(cache)
    return cache


def feeds_of(form: Form, firsts: Sequence[int] = (0,)) -> dict[str, np.ndarray]:
    """For tests that do not change them."""
    return shared_tokens(form, batch=len(firsts), count=TOKENS, firsts=firsts)


@cached
def dense_attention(form: Form, storage: str, isa: str, steps: Sequence[int]) -> np.ndarray:
    """Without a selection, of mild queries."""
    return Cache(form, storage, capacity=CAPACITY).run(mild(feeds_of(form)), steps)


def mild(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With shorter queries."""
    return feeds | {"query": feeds["query"] / 2}


def cache_of(setup: Setup, form: Form, storage: str, batch: int = 1) -> Cache:
    return Cache(form, storage, setup.selection, batch, CAPACITY)


def alike(first: Reads, second: Reads) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def test_every_selection_has_a_case() -> None:
    assert {case.kind for case in CASES.values()} == set(SELECTIONS)


@pairs
@pytest.mark.parametrize("form_name", FORMS)
def test_i1_a_full_budget_is_dense_attention(name: str, storage: str, form_name: str, isa: str) -> None:
    """The bits of no selection or, where tokens lie, turn or are added up otherwise, the numbers of a float32 cache;
    and attention in float64 over all that is stored."""
    case, steps = CASES[name], [1, 1, 5, 1, 1]
    for setup in case.full(storage):
        form = case.form(form_name, storage, setup)
        feeds = mild(feeds_of(form))
        cache = prepared(case, setup, cache_of(setup, form, storage), feeds)
        found = cache.run(feeds, steps[:-1])
        stored = StoredTokens(cache, feeds)
        found = np.concatenate([found, cache.step(feeds, 1)], axis=1)
        dense = replace(form, window=0)
        wanted = dense_attention(dense, storage if setup.exact else "float32", isa, (PROMPT, *steps))[:, PROMPT:]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance(setup, storage))
        np.testing.assert_allclose(found[:, -1], stored.attention(stored.everything()), rtol=0, atol=1e-5)


def tolerance(setup: Setup, storage: str) -> float:
    if setup.exact:
        return 0
    return 1e-5 if storage == "float32" else 2e-2


@pairs
@pytest.mark.parametrize("form_name", FORMS)
def test_i2_what_is_read(name: str, storage: str, form_name: str, isa: str) -> None:
    """Once, in order, of the row, with what is forced, as many as there must be; the result is over just that."""
    case = CASES[name]
    setup = case.small(storage)
    form, firsts = case.form(form_name, storage, setup), (0, 57) if case.pads else (0, 0)
    feeds = feeds_of(form, firsts)
    cache = prepared(case, setup, cache_of(setup, form, storage, batch=2), feeds)
    steps, few = case.prompt(setup), 0
    for _ in range(DECODED):
        steps = [*steps, 1]
        stored = StoredTokens(cache, feeds)
        y, reads = cache.logged_step(feeds)
        assert set(reads) == {(row, head) for row in range(2) for head in range(form.kv_heads)}
        for (row, head), tokens in reads.items():
            of_row = row_steps(steps, firsts[row])
            assert (np.diff(tokens) > 0).all()
            assert tokens[0] >= 0 and tokens[-1] == sum(of_row) - 1
            assert set(case.forced(setup, of_row, head)) <= set(tokens.tolist())
            assert case.count(setup, of_row, head) in (None, len(tokens))
            few += len(tokens) < sum(of_row)
        if name not in ("window compact", "window cap"):  # test_far_sinks.py has them
            np.testing.assert_allclose(y[:, 0], stored.attention(reads), rtol=0, atol=2e-5)
    assert (few > 0) == (name != "all")


def row_steps(steps: Sequence[int], first: int) -> list[int]:
    """Of a row that begins at slot `first`."""
    ends = np.maximum(np.cumsum(steps) - first, 0)
    return [int(step) for step in np.diff(ends, prepend=0) if step]


@pairs
@pytest.mark.parametrize("form_name", ["mha", "gqa"])
def test_i3_of_equal_tokens_the_documented_ones_are_read(name: str, storage: str, form_name: str) -> None:
    """Keys, scores and centroids are alike, and sums of them exact."""
    case = CASES[name]
    setup = case.tied(storage)
    form = case.form(form_name, storage, setup)
    feeds = tokens_of(form, count=TOKENS)
    for what in ("query", "key", "scores"):
        feeds[what][:] = 1
    if "cos" in feeds:
        feeds["cos"][:], feeds["sin"][:] = 1, 0
    cache, steps = prepared(case, setup, cache_of(setup, form, storage), feeds), case.prompt(setup)
    for _ in range(DECODED):
        steps = [*steps, 1]
        for (_, head), tokens in cache.logged_step(feeds)[1].items():
            assert tokens.tolist() == sorted(case.chosen_of_alike(setup, steps, head))


@pairs
def test_i4_rows_do_not_depend_on_each_other(name: str, storage: str) -> None:
    """A row in a left-padded batch is the row alone, also one that begins after the prompt of the others."""
    case = CASES[name]
    setup = case.small(storage)
    form, firsts = case.form("gqa", storage, setup), (0, 57, 150, 205) if case.pads else (0, 0, 0)
    feeds = feeds_of(form, firsts)
    prompt, steps = case.prompt(setup), [*[1] * DECODED, 5, 1]
    batch = prepared(case, setup, cache_of(setup, form, storage, len(firsts)), feeds)
    together = batch.run(feeds, steps)
    _, reads = batch.logged_step(feeds)
    for row, first in enumerate(firsts):
        alone, own = cache_of(setup, form, storage), row_of(feeds, row, first)
        before = row_steps(prompt, first)
        for step in before:
            alone.step(own, step)
        setup.prepare(alone)
        after = row_steps([*prompt, *steps], first)[len(before) :]
        found = alone.run(own, after)
        np.testing.assert_allclose(found[0], together[row, -sum(after) :], rtol=0, atol=case.row_tolerance)
        for (_, head), tokens in alone.logged_step(own)[1].items():
            assert np.array_equal(tokens, reads[row, head])
        if alone.places and not setup.window:
            assert all(np.array_equal(one[0], other[row]) for one, other in zip(alone.past, batch.past, strict=True))


@pairs
def test_i5_a_group_is_its_key_head_repeated(name: str, storage: str) -> None:
    """Where all heads choose together, or nobody does: query heads that have each a key head of their own.

    Where key heads choose by the queries of their group, and where pages keep what these attend to: query heads that
    are all alike.
    """
    case = CASES[name]
    setup = case.small(storage)
    form = case.form("gqa", storage, setup)
    feeds, group = feeds_of(form), form.heads // form.kv_heads
    if case.per_key_head or storage == "mixed":
        feeds, other = repeated_queries(form, feeds)
        single = replace(form, heads=form.kv_heads)
    else:
        other, single = repeated_keys(form, feeds), replace(form, kv_heads=form.heads)
    results, reads = [], []
    for one, given in ((form, feeds), (single, other)):
        cache = prepared(case, setup, cache_of(setup, one, storage), given)
        found, what = cache.logged_run(given, DECODED)
        results.append(found.reshape(DECODED, one.kv_heads, -1, form.value_size))
        reads.append(what)
    wanted = results[1].reshape(DECODED, -1, single.heads // single.kv_heads, form.value_size)
    if single.kv_heads == form.kv_heads:
        wanted = np.repeat(wanted, group, axis=2)
    np.testing.assert_allclose(results[0], wanted.reshape(results[0].shape), rtol=0, atol=1e-6)
    ratio = single.kv_heads // form.kv_heads
    for first, second in zip(*reads, strict=True):
        assert len(second) == single.kv_heads
        assert all(np.array_equal(tokens, first[row, head // ratio]) for (row, head), tokens in second.items())


@pytest.mark.parametrize(("name", "storage"), [pair for pair in PAIRS if pair[1] != "mixed"])
def test_i6_chunks_of_a_prompt_do_not_matter(name: str, storage: str) -> None:
    """Chunks that the selection documents to be alike. Of tokens that no rounding of exact ones changes before coding;
    which of `mixed` are salient is documented to depend on the steps, see test_cached_attention_pages.py."""
    case = CASES[name]
    setup = case.small(storage)
    form = case.form("gqa", storage, setup)
    feeds = tokens_of(form, count=TOKENS)
    if storage in PAGED:
        for what in ("key", "value"):
            feeds[what] = feeds[what].astype(ml_dtypes.bfloat16).astype(np.float32)
    results, reads = [], []
    for prompt, text in case.cuts(setup):
        cache = cache_of(setup, form, storage)
        cache.run(feeds, prompt)
        setup.prepare(cache)
        cache.run(feeds, text)
        found, what = cache.logged_run(feeds, DECODED)
        results.append(found)
        reads.append(what)
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=1e-5)
    assert all(alike(first, second) for first, second in zip(*reads, strict=True))


@pairs
def test_i7_the_same_step_twice(name: str, storage: str) -> None:
    """From one state: the same bits, reads and state."""
    case = CASES[name]
    setup = case.small(storage)
    form = case.form("rotary", storage, setup)
    feeds = feeds_of(form)
    cache = prepared(case, setup, cache_of(setup, form, storage), feeds)
    cache.run(feeds, [1, 1])
    saved, tokens = [tensor.copy() for tensor in cache.past], cache.tokens
    found = []
    for _ in range(2):
        cache.past, cache.tokens = [tensor.copy() for tensor in saved], tokens
        y, reads = cache.logged_step(feeds)
        found.append(([y, cache.step(feeds, 5), *cache.past], reads))
    assert alike(found[0][1], found[1][1])
    assert all(np.array_equal(one, other) for one, other in zip(found[0][0], found[1][0], strict=True))


@pairs
def test_copies_are_steps_in_place(name: str, storage: str) -> None:
    """A cache that is not shared between past and present goes on as one that is."""
    case = CASES[name]
    setup = case.small(storage)
    form = case.form("rotary", storage, setup)
    feeds = feeds_of(form)
    caches = [cache_of(setup, form, storage) for _ in range(2)]
    results = []
    for cache, in_place in zip(caches, (True, False), strict=True):
        prompt = cache.run(feeds, case.prompt(setup), in_place)
        setup.prepare(cache)
        results.append([prompt, cache.run(feeds, [1, 5, *[1] * DECODED], in_place)])
    assert all(np.array_equal(one, other) for one, other in zip(*results, strict=True))
    if caches[0].places:
        assert all(np.array_equal(one, other) for one, other in zip(caches[0].past, caches[1].past, strict=True))


@pairs
def test_a_used_buffer_is_a_new_cache(name: str, storage: str) -> None:
    case = CASES[name]
    setup = case.small(storage)
    form = case.form("gqa", storage, setup)
    feeds, other = feeds_of(form), tokens_of(form, seed=8, count=TOKENS)
    fresh, used = (cache_of(setup, form, storage) for _ in range(2))
    used.run(other, [*case.prompt(setup), 1, 1])
    used.tokens = 0
    results, reads = [], []
    for cache in (fresh, used):
        few = cache.run(feeds, [10, 1, 1])
        found, what = prepared(case, setup, cache, feeds).logged_run(feeds, 4)
        results.append(np.concatenate([few, found], axis=1))
        reads.append(what)
    assert np.array_equal(*results)
    assert all(alike(first, second) for first, second in zip(*reads, strict=True))
