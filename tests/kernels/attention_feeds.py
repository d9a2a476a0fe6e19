"""Forms of attention, and random tokens to feed them step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from attention_oracle import Form

FORMS = {
    "mha": Form(3, 3, 32, 16, scale=32**-0.5),
    "gqa": Form(6, 2, 32, 32, scale=0.3, softcap=30.0),
    "rotary": Form(4, 1, 33, 48, scale=0.4, rotary="half", rotary_size=32),
}
EVEN = {name: replace(form, head_size=32) for name, form in FORMS.items()}
"""The same with keys that fill whole words of codes."""
TOKENS = 330
BASE = 50.0
"""Of the angles: pair j of a token at position p is turned by `p / BASE ** (j / (R / 2 - 1))`."""


def angles(form: Form, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [.., R / 2], float32, of positions [..]."""
    turns = positions[..., None] / BASE ** np.linspace(0, 1, form.rotary_size // 2)
    return np.cos(turns).astype(np.float32), np.sin(turns).astype(np.float32)


def tokens_of(
    form: Form, batch: int = 1, seed: int = 3, count: int = TOKENS, firsts: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """Random queries, keys, values and scores; angles with rotary; rows begin at the slots `firsts`."""
    rng = np.random.default_rng(seed)
    widths = {
        "query": form.heads * form.head_size,
        "key": form.kv_heads * form.head_size,
        "value": form.kv_heads * form.value_size,
    }
    feeds = {name: rng.standard_normal((batch, count, width)).astype(np.float32) for name, width in widths.items()}
    feeds["query"] *= 2
    positions = np.arange(count) - np.array([*firsts] or [0] * batch)[:, None]
    feeds["valid"] = positions >= 0
    feeds["scores"] = rng.exponential(size=(batch, count)).astype(np.float32).round(1)  # some are equal
    if form.rotary != "none":
        feeds["cos"], feeds["sin"] = angles(form, np.maximum(positions, 0))
    return feeds


shared_tokens = cache(tokens_of)
"""The same, made once for all tests that do not change them."""


def part(feeds: dict[str, np.ndarray], begin: int, end: int) -> dict[str, np.ndarray]:
    """A step of the tokens [begin, end)."""
    new = {name: feeds[name][:, begin:end] for name in ("query", "key", "value", "cos", "sin") if name in feeds}
    return new | {name: feeds[name][:, :end] for name in ("valid", "scores")}


def row_of(feeds: dict[str, np.ndarray], row: int, first: int = 0) -> dict[str, np.ndarray]:
    """One row from a slot on."""
    return {name: array[row : row + 1, first:] for name, array in feeds.items()}


def repeated_queries(form: Form, feeds: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Feeds in which all query heads of a key head are alike, and those with one of them: for `heads = kv_heads`."""
    batch, count, _ = feeds["query"].shape
    one = feeds["query"].reshape(batch, count, form.kv_heads, -1, form.head_size)[:, :, :, :1]
    group = form.heads // form.kv_heads
    alike = np.repeat(one, group, axis=3).reshape(batch, count, -1)
    return feeds | {"query": alike}, feeds | {"query": one.reshape(batch, count, -1)}


def repeated_keys(form: Form, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Feeds in which every query head has a key head of its own, that of its group."""
    batch, count, _ = feeds["key"].shape
    group = form.heads // form.kv_heads
    return feeds | {
        name: np.repeat(feeds[name].reshape(batch, count, form.kv_heads, -1), group, axis=2).reshape(batch, count, -1)
        for name in ("key", "value")
    }
