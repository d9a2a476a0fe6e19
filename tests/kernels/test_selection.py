"""Selections of CachedAttention in real onnxruntime sessions, against float64."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from attention_oracle import Form
from cached_attention_model import DENSE, open_model
from paged_cache_oracle import Pages
from selected_cache import (
    EVEN,
    F32,
    FORMS,
    PAGED,
    STORAGES,
    TOKENS,
    Cache,
    Expected,
    form_for,
    part,
    selection_for,
    tokens_of,
)
from selection_oracle import Selection

KINDS = ("pages", "topk")
OPTIONS = [{"budget": 64}, {"share": 0.25, "reach": 1.0}, {"share": 0.1, "dense_below": 250}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_float64(kind: str, name: str, storage: str, options: dict[str, float], isa: str) -> None:
    form, selection = form_for(name, storage), selection_for(kind, storage, **options)
    feeds = tokens_of(form)
    cache = Cache(form, storage, selection)
    cache.run(feeds, [100, 101])
    few = 0
    for _ in range(40):
        wanted, reads = Expected(cache, selection, feeds).step()
        found = cache.step(feeds, 1)[0, 0]
        np.testing.assert_allclose(found, wanted, atol=2e-5)
        few += sum(not read.all() for read in reads)
    assert few >= (0 if "dense_below" in options else 40 * form.kv_heads)
    cache.run(feeds, [cache.capacity - 512 or 10] * 2)
    wanted, reads = Expected(cache, selection, feeds).step()
    np.testing.assert_allclose(cache.step(feeds, 1)[0, 0], wanted, atol=2e-5)
    assert not any(read.all() for read in reads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("storage", STORAGES)
def test_a_full_budget_is_dense(kind: str, name: str, storage: str) -> None:
    """The same bits as without a selection."""
    form = form_for(name, storage)
    feeds = tokens_of(form)
    steps = [200, *[1] * 60]
    dense = Cache(form, storage, None).run(feeds, steps)
    for options in ({"budget": 512}, {"share": 1.0}, {"budget": 16, "dense_below": TOKENS}):
        found = Cache(form, storage, selection_for(kind, storage, **options)).run(feeds, steps)
        assert np.array_equal(found, dense)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGES)
def test_rows_do_not_depend_on_each_other(kind: str, storage: str) -> None:
    """A row in a left-padded batch is the row alone."""
    form, selection = form_for("gqa", storage), selection_for(kind, storage, budget=64)
    feeds = tokens_of(form, batch=3)
    feeds["valid"][1, :57] = False
    feeds["valid"][2, :150] = False
    steps = [170, *[1] * 50]
    together = Cache(form, storage, selection, batch=3).run(feeds, steps)
    for row, first in enumerate((0, 57, 150)):
        alone = {name: array[row : row + 1, first:] for name, array in feeds.items()}
        found = Cache(form, storage, selection).run(alone, [170 - first, *[1] * 50])
        assert np.array_equal(found[0, -50:], together[row, -50:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_chunks_of_a_prompt_do_not_matter(kind: str, storage: str) -> None:
    form, selection = form_for("gqa", storage), selection_for(kind, storage, budget=64)
    feeds = tokens_of(form)
    whole, parts = (
        Cache(form, storage, selection).run(feeds, [*prompt, *[1] * 30]) for prompt in ([250], [90, 2, 158])
    )
    np.testing.assert_allclose(parts[:, -30:], whole[:, -30:], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORAGES)
def test_the_same_step_twice(kind: str, storage: str) -> None:
    form, selection = form_for("rotary", storage), selection_for(kind, storage, budget=32)
    feeds = tokens_of(form)
    cache = Cache(form, storage, selection)
    cache.run(feeds, [250])
    step = part(feeds, 250, 251)
    (first, _), (second, _) = (cache.model.run(step, cache.past) for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_group_heads_are_repeated_key_heads(kind: str) -> None:
    """GQA with one query repeated over its group reads what the key head alone reads."""
    form = FORMS["gqa"]
    feeds = tokens_of(form)
    group = form.heads // form.kv_heads
    one = feeds["query"].reshape(1, TOKENS, form.kv_heads, group, -1)[:, :, :, :1]
    feeds["query"] = np.repeat(one, group, axis=3).reshape(1, TOKENS, -1)
    selection, steps = selection_for(kind, "float32", budget=64), [250, *[1] * 20]
    grouped = Cache(form, "float32", selection).run(feeds, steps)
    alone = feeds | {"query": one.reshape(1, TOKENS, -1)}
    single = Cache(replace(form, heads=form.kv_heads), "float32", selection).run(alone, steps)
    wanted = np.repeat(single.reshape(1, -1, form.kv_heads, 1, form.value_size), group, axis=3)
    np.testing.assert_allclose(grouped, wanted.reshape(grouped.shape), atol=1e-6)


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
def test_ties_go_to_the_earlier_block(kind: str) -> None:
    form, selection = FORMS["mha"], selection_for(kind, "float32", sinks=0, recent=0, budget=32)
    feeds = tokens_of(form)
    feeds["key"][:] = 1
    feeds["value"][:] = np.arange(TOKENS)[None, :, None]
    cache = Cache(form, "float32", selection)
    cache.run(feeds, [160])
    np.testing.assert_allclose(cache.step(feeds, 1), (np.arange(32).sum() + 160) / 33, rtol=1e-6)


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
    form, selection = FORMS["rotary"], Selection(budget=64)
    feeds = tokens_of(form)
    cache = Cache(form, "bfloat16", selection)
    cache.run(feeds, [200])
    before = [array.copy() for array in cache.past]
    _, copied = cache.model.run(part(feeds, 200, 240), cache.past)
    cache.run(feeds, [40])
    assert np.array_equal(copied[2][:, :, :14], cache.past[2][:, :, :14])
    assert not np.array_equal(before[2], cache.past[2])


@pytest.mark.parametrize(
    ("form", "storage", "options", "message"),
    [
        (FORMS["gqa"], DENSE, {"selection": "some"}, "attribute 'selection' is 'some'"),
        (replace(FORMS["gqa"], window=40), DENSE, {}, "takes no window"),
        (replace(FORMS["gqa"], scale=-1.0), DENSE, {}, "takes no negative scale"),
        (FORMS["gqa"], DENSE, {"select_block": 0}, "'select_block' is 0"),
        (FORMS["gqa"], DENSE, {"select_share": 1.5}, "'select_share' is 1.5"),
        (FORMS["gqa"], DENSE, {"select_reach": -0.5}, "'select_reach' is -0.5"),
        (EVEN["gqa"], PAGED["int8"], {"select_recent": 40}, "other sinks, recent tokens or blocks"),
        (EVEN["gqa"], PAGED["int8"], {"selection": "topk", "select_block": 1, "select_sinks": 3}, "other sinks"),
        (FORMS["gqa"], DENSE, {"selection": "topk"}, "has blocks of one token"),
        (EVEN["gqa"], Pages(page=16, salient=16, key_scheme="balanced"), {}, "coded by channel"),
        (EVEN["gqa"], Pages(page=16, salient=16, key_bits=(16, 16)), {}, "coded by channel"),
    ],
)
def test_what_there_is_not(form: Form, storage: object, options: dict[str, object], message: str) -> None:
    past = Cache(FORMS["gqa"], "float32", Selection()).past
    attributes = dict(storage) if isinstance(storage, dict) else DENSE | asdict(storage) | {"storage": "pages"}
    with pytest.raises(Exception, match=message):
        open_model(form, past, storage=attributes | Selection().attributes() | options)


def test_a_bias_and_missing_bounds_are_refused() -> None:
    form, cache = FORMS["gqa"], Cache(FORMS["gqa"], "float32", Selection())
    feeds = tokens_of(form)
    step = part(feeds, 0, 1)
    biased = open_model(form, cache.past, ["bias"], storage=DENSE | Selection().attributes())
    with pytest.raises(Exception, match="takes no bias"):
        biased.run(step | {"bias": np.zeros((1, 1, 1, 1), F32)}, cache.past)
    short = [*cache.past[:2], cache.past[2][:, :, :5]]
    with pytest.raises(Exception, match="which need 6"):
        cache.model.run(part(feeds, 100, 101), short)
