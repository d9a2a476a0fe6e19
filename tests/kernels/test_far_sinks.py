"""CachedAttention with selection `window` in real onnxruntime sessions, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from attention_oracle import Form, rotate, split
from cached_attention_model import DENSE, Model, open_model

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
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


def angles(form: Form, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [1, positions, R / 2]."""
    turns = positions[None, :, None] / 30.0 ** np.linspace(0, 1, form.rotary_size // 2)
    return np.cos(turns).astype(F32), np.sin(turns).astype(F32)


def feeds_of(form: Form, batch: int, seed: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    widths = {
        "query": form.heads * form.head_size,
        "key": form.kv_heads * form.head_size,
        "value": form.kv_heads * form.value_size,
    }
    feeds = {name: rng.standard_normal((batch, TOKENS, width)).astype(F32) for name, width in widths.items()}
    feeds["valid"] = np.ones((batch, TOKENS), bool)
    return feeds


def far_position(positions: str) -> int:
    return {"compact": SINKS + WINDOW - 1, "cap": WINDOW}[positions]


def with_angles(form: Form, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Angles of the position of every token in its row; padding has some, too."""
    if form.rotary == "none":
        return feeds
    starts = feeds["valid"].argmax(axis=1)
    both = [angles(form, np.maximum(np.arange(TOKENS) - start, 0)) for start in starts]
    return feeds | {name: np.concatenate([one[i] for one in both]) for i, name in enumerate(("cos", "sin"))}


class Cache:
    """A session and its cache."""

    def __init__(self, form: Form, positions: str, batch: int = 1, dtype: np.dtype = F32, ring: int = WINDOW) -> None:
        lead = (batch, form.kv_heads)
        self.past = [
            np.zeros((*lead, length, size), dtype)
            for length in (ring, SINKS)
            for size in (form.head_size, form.value_size)
        ]
        constants = {}
        if positions != "keep":
            cos, sin = angles(form, np.array([far_position(positions)]))
            constants = {"far_cos": cos, "far_sin": sin}
        storage = DENSE | {"ring": ring, "selection": "window", "select_sinks": SINKS, "select_positions": positions}
        optional = ["cos", "sin"] if form.rotary != "none" else []
        self.model: Model = open_model(form, self.past, optional, storage=storage, constants=constants)
        self.done = 0

    def run(self, feeds: dict[str, np.ndarray], steps: Sequence[int], in_place: bool = True) -> np.ndarray:
        results = []
        for count in steps:
            new = slice(self.done, self.done + count)
            step = {name: feeds[name][:, new] for name in ("query", "key", "value", "cos", "sin") if name in feeds}
            step["valid"] = feeds["valid"][:, : self.done + count]
            y, self.past = self.model.run(step, self.past, in_place)
            results.append(y)
            self.done += count
        return np.concatenate(results, axis=1)


def expected(form: Form, positions: str, feeds: dict[str, np.ndarray], dtype: np.dtype = F32) -> np.ndarray:
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
        cos, sin = (np.repeat(one, TOKENS, axis=1) for one in angles(form, np.array([far_position(positions)])))
        far_q = rotate(q, cos, sin, form)
        far_k = k if positions == "cap" else near_k
    for b, i, h in np.ndindex(batch, TOKENS, form.heads):
        valid, start, kv = feeds["valid"][b], feeds["valid"][b].argmax(), h // group
        near = [j for j in range(max(0, i - WINDOW + 1), i + 1) if valid[j]]
        far = [j for j in range(start, start + SINKS) if j <= i - WINDOW and valid[j]]
        if not near and not far:
            continue
        stored = far_k[b, kv, far].astype(F32).astype(dtype).astype(np.float64)
        scores = np.concatenate([near_k[b, kv, near] @ near_q[b, h, i], stored @ far_q[b, h, i]]) * form.scale
        if form.softcap:
            scores = form.softcap * np.tanh(scores / form.softcap)
        weights = np.exp(scores - scores.max())
        values = np.concatenate([v[b, kv, near], v[b, kv, far].astype(F32).astype(dtype).astype(np.float64)])
        result[b, i, h] = weights @ values / weights.sum()
    return result.reshape(batch, TOKENS, -1)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("name", "positions"),
    [*((name, "keep") for name in FORMS), *((name, p) for name in MOVED for p in ("compact", "cap"))],
)
def test_matches_float64(name: str, positions: str, steps: str, isa: str) -> None:
    form = FORMS[name]
    feeds = feeds_of(form, 2)
    feeds["valid"][1, :13] = False
    feeds["valid"][0, [1, 60]] = False
    feeds = with_angles(form, feeds)
    found = Cache(form, positions, batch=2).run(feeds, STEPS[steps])
    np.testing.assert_allclose(found, expected(form, positions, feeds), atol=5e-6)


@pytest.mark.parametrize("positions", ["keep", "compact", "cap"])
def test_sinks_are_rounded_once(positions: str) -> None:
    form = FORMS["half"]
    feeds = with_angles(form, feeds_of(form, 1))
    found = Cache(form, positions, dtype=BF16).run(feeds, [TOKENS])
    np.testing.assert_allclose(found, expected(form, positions, feeds, BF16), atol=5e-6)


def test_a_ring_may_be_longer_than_the_window() -> None:
    form = FORMS["half"]
    feeds = with_angles(form, feeds_of(form, 1))
    found = Cache(form, "compact", ring=WINDOW + 11).run(feeds, STEPS["few, many, few"])
    np.testing.assert_allclose(found, expected(form, "compact", feeds), atol=5e-6)


@pytest.mark.parametrize("positions", ["keep", "compact", "cap"])
def test_copies_are_steps_in_place(positions: str) -> None:
    form = FORMS["half"]
    feeds = with_angles(form, feeds_of(form, 1))
    caches = [Cache(form, positions), Cache(form, positions)]
    first, second = (cache.run(feeds, [2, 1, 60, 1], place) for cache, place in zip(caches, (True, False), strict=True))
    assert np.array_equal(first, second)
    for one, other in zip(caches[0].past, caches[1].past, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("positions", ["keep", "compact", "cap"])
def test_rows_do_not_depend_on_each_other(positions: str) -> None:
    form = FORMS["half"]
    feeds = feeds_of(form, 2)
    feeds["valid"][1, :40] = False
    feeds = with_angles(form, feeds)
    together = Cache(form, positions, batch=2).run(feeds, [80, *[1] * 30])
    alone = {name: array[1:, 40:] for name, array in feeds.items()}
    found = Cache(form, positions).run(alone, [40, *[1] * 30])
    np.testing.assert_allclose(found[0], together[1, 40:], atol=1e-6)


@pytest.mark.parametrize("positions", ["compact", "cap"])
def test_a_shift_of_all_positions_changes_nothing_nearby(positions: str) -> None:
    """LM-Infinite: only distances count; with `compact` the sinks keep theirs, so they are left out here."""
    form = FORMS["half"]
    feeds = with_angles(form, feeds_of(form, 1))
    moved = angles(form, np.arange(TOKENS) + 1000.0)
    shifted = feeds | dict(zip(("cos", "sin"), moved, strict=True))
    both = [Cache(form, positions).run(one, [TOKENS]) for one in (feeds, shifted)]
    same = slice(0, TOKENS) if positions == "cap" else slice(0, WINDOW)
    np.testing.assert_allclose(both[0][:, same], both[1][:, same], atol=2e-4)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        (replace(PLAIN, window=0), {}, "a ring must hold the window"),
        (replace(PLAIN, causal=0), {}, "needs causal attention"),
        (PLAIN, {"ring": 0}, "needs a ring"),
        (PLAIN, {"select_sinks": 0}, "'select_sinks' is 0"),
        (PLAIN, {"select_positions": "none"}, "'select_positions' is 'none'"),
        (PLAIN, {"select_positions": "cap"}, "moved by rotation only"),
    ],
)
def test_what_there_is_not(form: Form, options: dict[str, object], message: str) -> None:
    past = [np.zeros((1, 2, n, size), F32) for n in (WINDOW, SINKS) for size in (16, 24)]
    storage = DENSE | {"ring": WINDOW, "selection": "window", "select_sinks": SINKS, "select_positions": "keep"}
    with pytest.raises(Exception, match=message):
        open_model(form, past, storage=storage | options)


def test_far_angles_must_fit() -> None:
    form = FORMS["half"]
    past = [np.zeros((1, 2, n, size), F32) for n in (WINDOW, SINKS) for size in (16, 24)]
    storage = DENSE | {"ring": WINDOW, "selection": "window", "select_sinks": SINKS, "select_positions": "cap"}
    with pytest.raises(Exception, match="this storage needs 13"):
        open_model(form, past, ["cos", "sin"], storage=storage)
    wrong = {"far_cos": np.ones((1, 2, 8), F32), "far_sin": np.ones((1, 2, 8), F32)}
    model = open_model(form, past, ["cos", "sin"], storage=storage, constants=wrong)
    feeds = with_angles(form, feeds_of(form, 1))
    step = {name: feeds[name][:, :1] for name in ("query", "key", "value", "cos", "sin", "valid")}
    with pytest.raises(Exception, match="far cos has shape"):
        model.run(step, past)
