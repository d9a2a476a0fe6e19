"""CachedAttention with selection `window` in real onnxruntime sessions, against float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache as cached

import numpy as np
import numpy.typing as npt
import pytest
from attention_feeds import angles, tokens_of
from attention_oracle import Form, rotate, split
from cached_attention_model import open_model
from selected_cache import Cache, attributes_of

from effc.ir.dialect.selections import WindowSelection

WINDOW, SINKS, TOKENS = 24, 5, 150
PLAIN = Form(4, 2, 16, 24, scale=0.3, window=WINDOW)
FORMS = {
    "plain": PLAIN,
    "softcap": replace(PLAIN, softcap=4.0),
    "half": replace(PLAIN, rotary="half", rotary_size=16),
    "partly, interleaved": Form(3, 1, 33, 17, scale=0.2, window=WINDOW, rotary="interleaved", rotary_size=10),
}
MOVED = [name for name, form in FORMS.items() if form.rotary != "none"]
STEPS = {
    "at once": [TOKENS],
    "tokens": [1] * TOKENS,
    "few, many, few": [3, 70, *[1] * 20, 50, 7],
    "one window": [WINDOW - 1, 1, 1, WINDOW, WINDOW + 1, TOKENS - 3 * WINDOW - 2],
}


def cache_of(form: Form, positions: str, storage: str = "float32", batch: int = 1, ring: int = WINDOW) -> Cache:
    return Cache(form, storage, WindowSelection(SINKS, positions), batch, ring=ring)


def feeds_of(form: Form, **options: object) -> dict[str, np.ndarray]:
    feeds = tokens_of(form, seed=4, count=TOKENS, **options)
    feeds["query"] /= 2
    return feeds


def expected(form: Form, positions: str, feeds: dict[str, np.ndarray], dtype: npt.DTypeLike = np.float32) -> np.ndarray:
    """Every query by itself, [B, S, H * E]."""
    q, k, v = (
        split(feeds[name], heads)
        for name, heads in (("query", form.heads), ("key", form.kv_heads), ("value", form.kv_heads))
    )
    group, batch = form.heads // form.kv_heads, len(q)
    result = np.zeros((batch, TOKENS, form.heads, form.value_size))
    tables = (feeds["cos"], feeds["sin"]) if "cos" in feeds else None
    near_q, near_k = (rotate(x, *tables, form) if tables else x for x in (q, k))
    far_q, far_k = near_q, near_k
    if positions != "keep":
        far = {"compact": SINKS + WINDOW - 1, "cap": WINDOW}[positions]
        cos, sin = angles(form, np.full((1, TOKENS), far))
        far_q = rotate(q, cos, sin, form)
        far_k = k if positions == "cap" else near_k
    for b, i, h in np.ndindex(batch, TOKENS, form.heads):
        valid, start, kv = feeds["valid"][b], feeds["valid"][b].argmax(), h // group
        near = [j for j in range(max(0, i - WINDOW + 1), i + 1) if valid[j]]
        far = [j for j in range(start, start + SINKS) if j <= i - WINDOW and valid[j]]
        if not near and not far:
            continue
        stored = far_k[b, kv, far].astype(np.float32).astype(dtype).astype(np.float64)
        scores = np.concatenate([near_k[b, kv, near] @ near_q[b, h, i], stored @ far_q[b, h, i]]) * form.scale
        if form.softcap:
            scores = form.softcap * np.tanh(scores / form.softcap)
        weights = np.exp(scores - scores.max())
        values = np.concatenate([v[b, kv, near], v[b, kv, far].astype(np.float32).astype(dtype).astype(np.float64)])
        result[b, i, h] = weights @ values / weights.sum()
    return result.reshape(batch, TOKENS, -1)


@cached
def padded(name: str) -> dict[str, np.ndarray]:
    """Two rows, one of which begins later, and one of which has holes."""
    feeds = feeds_of(FORMS[name], batch=2, firsts=(0, 13))
    feeds["valid"][0, [1, 60]] = False
    return feeds


@cached
def expected_of(name: str, positions: str) -> np.ndarray:
    """For every instruction set and every way to step."""
    return expected(FORMS[name], positions, padded(name))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("name", "positions"),
    [*((name, "keep") for name in FORMS), *((name, p) for name in MOVED for p in ("compact", "cap"))],
)
def test_matches_float64(name: str, positions: str, steps: str, isa: str) -> None:
    found = cache_of(FORMS[name], positions, batch=2).run(padded(name), STEPS[steps])
    np.testing.assert_allclose(found, expected_of(name, positions), atol=5e-6)


@pytest.mark.parametrize("positions", ["keep", "compact", "cap"])
def test_sinks_are_rounded_once(positions: str) -> None:
    form, feeds = FORMS["half"], feeds_of(FORMS["half"])
    cache = cache_of(form, positions, "bfloat16")
    found = cache.run(feeds, [TOKENS])
    np.testing.assert_allclose(found, expected(form, positions, feeds, cache.past[0].dtype), atol=5e-6)


def test_a_ring_may_be_longer_than_the_window() -> None:
    form, feeds = FORMS["half"], feeds_of(FORMS["half"])
    found = cache_of(form, "compact", ring=WINDOW + 11).run(feeds, STEPS["few, many, few"])
    np.testing.assert_allclose(found, expected(form, "compact", feeds), atol=5e-6)


@pytest.mark.parametrize("positions", ["compact", "cap"])
def test_a_shift_of_all_positions_changes_nothing_nearby(positions: str) -> None:
    """LM-Infinite: only distances count; with `compact` the sinks keep theirs, so they are left out here."""
    form, feeds = FORMS["half"], feeds_of(FORMS["half"])
    moved = angles(form, np.arange(TOKENS)[None] + 1000.0)
    shifted = feeds | dict(zip(("cos", "sin"), moved, strict=True))
    both = [cache_of(form, positions).run(one, [TOKENS]) for one in (feeds, shifted)]
    same = slice(0, TOKENS) if positions == "cap" else slice(0, WINDOW)
    np.testing.assert_allclose(both[0][:, same], both[1][:, same], atol=2e-4)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        (replace(PLAIN, window=0), {}, "a ring must hold the window"),
        (PLAIN, {"select_sinks": 0}, "'select_sinks' is 0"),
        (PLAIN, {"select_positions": "none"}, "'select_positions' is 'none'"),
    ],
)
def test_what_there_is_not(form: Form, options: dict[str, object], message: str) -> None:
    cache = cache_of(PLAIN, "keep")
    with pytest.raises(Exception, match=message):
        open_model(form, cache.past, storage=attributes_of(cache.kept_as, cache.selection) | options)


def test_far_angles_must_fit() -> None:
    cache = cache_of(FORMS["half"], "cap")
    with pytest.raises(Exception, match="this storage needs 13"):
        cache.give({})
    cache.give({"far_cos": np.ones((1, 2, 8), np.float32), "far_sin": np.ones((1, 2, 8), np.float32)})
    with pytest.raises(Exception, match="far cos has shape"):
        cache.step(feeds_of(cache.form), 1)
