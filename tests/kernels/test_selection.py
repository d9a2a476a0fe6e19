"""Selections `pages` and `topk` of CachedAttention in real onnxruntime sessions, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from attention_feeds import EVEN, FORMS, shared_tokens, tokens_of
from attention_oracle import Form
from cached_attention_model import open_model
from selected_cache import STORAGES, Cache, attributes_of, form_for, storage_of
from selection_cases import page_selection, topk_selection
from selection_oracle import Blocks, expected_reads
from stored_tokens import StoredTokens

KINDS = ("pages", "topk")
OPTIONS = {
    "pages": [
        {"budget": 64},
        {"budget": 48, "reach": 0.0},
        {"share": 0.25, "reach": 1.0},
        {"share": 0.1, "dense_below": 250},
    ],
    "topk": [{"budget": 64}, {"share": 0.25}, {"share": 0.1, "dense_below": 250}],
}


def selection_for(kind: str, storage: str, **options: float) -> Blocks:
    return page_selection(storage, **options) if kind == "pages" else topk_selection(**options)


def checked_step(cache: Cache, feeds: dict[str, np.ndarray]) -> list[bool]:
    """Of each key head, whether a step leaves anything out; it must be as in float64."""
    stored = StoredTokens(cache, feeds)
    wanted = expected_reads(stored)
    found, reads = cache.logged_step(feeds)
    assert all(np.array_equal(reads[key], tokens) for key, tokens in wanted.items())
    np.testing.assert_allclose(found[:, 0], stored.attention(wanted), atol=2e-5)
    return [len(tokens) < cache.tokens for tokens in wanted.values()]


@pytest.mark.parametrize(("kind", "options"), [(kind, one) for kind in KINDS for one in OPTIONS[kind]], ids=str)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("storage", STORAGES)
def test_matches_float64(kind: str, name: str, storage: str, options: dict[str, float], isa: str) -> None:
    form, selection = form_for(name, storage), selection_for(kind, storage, **options)
    feeds = shared_tokens(form)
    cache = Cache(form, storage, selection)
    cache.run(feeds, [100, 101])
    few = sum(sum(checked_step(cache, feeds)) for _ in range(40))
    assert few >= (0 if "dense_below" in options else 40 * form.kv_heads)
    cache.run(feeds, [10, 10])
    assert all(checked_step(cache, feeds))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGES)
def test_a_planted_key_is_found(kind: str, storage: str) -> None:
    form = form_for("mha", storage)
    selection = selection_for(kind, storage, budget=32)
    feeds = tokens_of(form)
    feeds["key"][0, 77] = 3 * feeds["query"][0, 300]
    feeds["value"][0, 77] = 50
    cache = Cache(form, storage, selection)
    cache.run(feeds, [200, 100])
    found = cache.step(feeds, 1)
    np.testing.assert_allclose(found, 50, rtol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_invalid_tokens_inside_are_not_read(kind: str) -> None:
    form, selection = FORMS["gqa"], selection_for(kind, "float32", budget=64)
    feeds = tokens_of(form)
    feeds["valid"][0, 20:200:3] = False
    spoiled = {name: array.copy() for name, array in feeds.items()}
    spoiled["value"][0, 20:200:3] = 1e6
    steps = [250, *[1] * 20]
    found, other = (Cache(form, "float32", selection).run(one, steps) for one in (feeds, spoiled))
    assert np.array_equal(found[:, -20:], other[:, -20:])


def test_bounds_that_are_not_shared_are_copied() -> None:
    form, selection = FORMS["rotary"], page_selection("bfloat16", budget=64)
    feeds = tokens_of(form)
    cache = Cache(form, "bfloat16", selection)
    cache.run(feeds, [200])
    before = [array.copy() for array in cache.past]
    _, copied = cache.attempt(feeds, 40)
    cache.run(feeds, [40])
    assert np.array_equal(copied[2][:, :, :14], cache.past[2][:, :, :14])
    assert not np.array_equal(before[2], cache.past[2])


@pytest.mark.parametrize(
    ("form", "storage", "options", "message"),
    [
        (FORMS["gqa"], "float32", {"selection": "some"}, "attribute 'selection' is 'some'"),
        (FORMS["gqa"], "float32", {"select_block": 0}, "'select_block' is 0"),
        (FORMS["gqa"], "float32", {"select_share": 1.5}, "'select_share' is 1.5"),
        (FORMS["gqa"], "float32", {"select_reach": -0.5}, "'select_reach' is -0.5"),
        (EVEN["gqa"], "int8", {"select_recent": 40}, "other sinks, recent tokens or blocks"),
        (EVEN["gqa"], "int8", {"selection": "topk", "select_block": 1, "select_sinks": 3}, "other sinks"),
        (FORMS["gqa"], "float32", {"selection": "topk"}, "has blocks of one token"),
        (EVEN["gqa"], "int8", {"key_scheme": "balanced"}, "coded by channel"),
        (EVEN["gqa"], "int8", {"key_bits": (16, 16)}, "coded by channel"),
    ],
)
def test_what_there_is_not(form: Form, storage: str, options: dict[str, object], message: str) -> None:
    selection = page_selection(storage)
    past = Cache(FORMS["gqa"], "float32", selection).past
    with pytest.raises(Exception, match=message):
        open_model(form, past, storage=attributes_of(storage_of(storage), selection) | options)


def test_missing_bounds_are_refused() -> None:
    cache = Cache(FORMS["gqa"], "float32", page_selection("float32"))
    cache.past[2], cache.tokens = cache.past[2][:, :, :5], 100
    with pytest.raises(Exception, match="which need 6"):
        cache.step(tokens_of(FORMS["gqa"]), 1)
