"""CachedAttention with selection `stride` in real onnxruntime sessions, against float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache as cached

import numpy as np
import pytest
from attention_feeds import FORMS, TOKENS, tokens_of
from attention_oracle import Form, rotate, split
from cached_attention_model import open_model
from selected_cache import Cache, attributes_of

from effc.ir.dialect.selections import StrideSelection

STRIDE = StrideSelection(sinks=3, recent=24, block=8, stride=3)


def allowed(stride: StrideSelection, head: int, query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Whether queries of a key head read tokens, both counted from the first of their row."""
    near = query // stride.block - key // stride.block < stride.recent // stride.block
    strided = (key // stride.block - head) % stride.stride == 0
    return (key >= 0) & (key <= query) & ((key < stride.sinks) | near | strided)


def expected(form: Form, stride: StrideSelection, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Every query by itself, [B, S, H * E]."""
    q, k, v = (
        split(feeds[name], heads)
        for name, heads in (("query", form.heads), ("key", form.kv_heads), ("value", form.kv_heads))
    )
    if form.rotary != "none":
        q, k = (rotate(x, feeds["cos"], feeds["sin"], form) for x in (q, k))
    group, batch = form.heads // form.kv_heads, len(q)
    result = np.zeros((batch, TOKENS, form.heads, form.value_size))
    for b, head in np.ndindex(batch, form.kv_heads):
        valid = feeds["valid"][b]
        tokens = np.arange(TOKENS) - valid.argmax()
        seen = allowed(stride, head, tokens[:, None], tokens[None]) & valid[None]
        for h in range(head * group, (head + 1) * group):
            scores = q[b, h] @ k[b, head].T * form.scale
            if form.softcap:
                scores = form.softcap * np.tanh(scores / form.softcap)
            weights = np.where(seen, np.exp(scores - scores.max()), 0)
            result[b, :, h] = weights @ v[b, head] / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
    return result.reshape(batch, TOKENS, -1)


STEPS = {
    "at once": [TOKENS],
    "tokens": [1] * TOKENS,
    "few, many, few": [3, 70, *[1] * 20, 50, 7, 0, 150, *[1] * 30],
    "blocks": [8, 16, 1, 7, 24, 8 * 34, 2],
}
PATTERNS = {
    "plain": STRIDE,
    "no sinks": replace(STRIDE, sinks=0, recent=8, stride=5),
    "sinks of blocks": replace(STRIDE, sinks=21),
    "blocks of one": replace(STRIDE, sinks=1, recent=2, block=1, stride=4),
    "long blocks": replace(STRIDE, recent=150, block=150, stride=2),
    "far strides": replace(STRIDE, stride=1000),
}


@cached
def padded(name: str) -> dict[str, np.ndarray]:
    """Two rows, one of which begins later, and one of which has holes."""
    feeds = tokens_of(FORMS[name], batch=2, firsts=(0, 45))
    feeds["valid"][0, [1, 60, 61, 200]] = False
    return feeds


@cached
def expected_of(name: str) -> np.ndarray:
    """For every instruction set and every way to step."""
    return expected(FORMS[name], STRIDE, padded(name))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", FORMS)
def test_matches_float64(name: str, steps: str, isa: str) -> None:
    found = Cache(FORMS[name], "float32", STRIDE, batch=2).run(padded(name), STEPS[steps])
    np.testing.assert_allclose(found, expected_of(name), atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("steps", ["at once", "few, many, few"])
def test_patterns(pattern: str, steps: str) -> None:
    form, feeds = FORMS["gqa"], tokens_of(FORMS["gqa"])
    found = Cache(form, "float32", PATTERNS[pattern]).run(feeds, STEPS[steps])
    np.testing.assert_allclose(found, expected(form, PATTERNS[pattern], feeds), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select_block": 0}, "'select_block' is 0"),
        ({"select_recent": 4}, "'select_recent' is 4"),
        ({"select_recent": 20}, "it must be a multiple of select_block, which is 8"),
        ({"select_stride": 0}, "'select_stride' is 0"),
    ],
)
def test_what_there_is_not(options: dict[str, object], message: str) -> None:
    cache = Cache(FORMS["gqa"], "float32", STRIDE)
    with pytest.raises(Exception, match=message):
        open_model(cache.form, cache.past, storage=attributes_of(cache.kept_as, STRIDE) | options)
