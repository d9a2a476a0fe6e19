"""CachedAttention with selection `stride` in real onnxruntime sessions, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest
from attention_oracle import Form, rotate, split
from cached_attention_model import DENSE, Model, open_model

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
FORMS = {
    "mha": Form(3, 3, 32, 16, scale=32**-0.5),
    "gqa": Form(6, 2, 32, 32, scale=0.3, softcap=30.0),
    "rotary": Form(4, 1, 33, 48, scale=0.4, rotary="half", rotary_size=32),
}
DTYPES = {"float32": F32, "bfloat16": BF16}
TOKENS = 330


@dataclass(frozen=True)
class Stride:
    """Attributes of the selection."""

    sinks: int = 3
    recent: int = 24
    block: int = 8
    stride: int = 3

    def attributes(self) -> dict[str, object]:
        names = ("sinks", "recent", "block", "stride")
        return {"selection": "stride", **{f"select_{name}": getattr(self, name) for name in names}}

    def allowed(self, head: int, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        """Whether queries of a key head read tokens, both counted from the first of their row."""
        near = query // self.block - key // self.block < self.recent // self.block
        strided = (key // self.block - head) % self.stride == 0
        return (key >= 0) & (key <= query) & ((key < self.sinks) | near | strided)


class Cache:
    """A session and its cache."""

    def __init__(self, form: Form, stride: Stride | None, dtype: np.dtype = F32, batch: int = 1) -> None:
        lead = (batch, form.kv_heads, TOKENS)
        self.past = [np.zeros((*lead, size), dtype) for size in (form.head_size, form.value_size)]
        optional = ["cos", "sin"] if form.rotary != "none" else []
        storage = DENSE | (stride.attributes() if stride else {})
        self.model: Model = open_model(form, self.past, optional, storage=storage)
        self.done = 0

    def run(self, feeds: dict[str, np.ndarray], steps: Sequence[int]) -> np.ndarray:
        results = []
        for count in steps:
            new = slice(self.done, self.done + count)
            step = {name: feeds[name][:, new] for name in ("query", "key", "value", "cos", "sin") if name in feeds}
            step["valid"] = feeds["valid"][:, : self.done + count]
            y, self.past = self.model.run(step, self.past, in_place=True)
            results.append(y)
            self.done += count
        return np.concatenate(results, axis=1)


def feeds_of(form: Form, batch: int = 1, seed: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    widths = {
        "query": form.heads * form.head_size,
        "key": form.kv_heads * form.head_size,
        "value": form.kv_heads * form.value_size,
    }
    feeds = {name: rng.standard_normal((batch, TOKENS, width)).astype(F32) for name, width in widths.items()}
    feeds["query"] *= 2
    feeds["valid"] = np.ones((batch, TOKENS), bool)
    if form.rotary != "none":
        angles = np.arange(TOKENS)[:, None] / 50.0 ** np.linspace(0, 1, form.rotary_size // 2)
        angles = np.broadcast_to(angles, (batch, *angles.shape))
        feeds |= {"cos": np.cos(angles).astype(F32), "sin": np.sin(angles).astype(F32)}
    return feeds


def expected(form: Form, stride: Stride, feeds: dict[str, np.ndarray]) -> np.ndarray:
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
        seen = stride.allowed(head, tokens[:, None], tokens[None]) & valid[None]
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
    "plain": Stride(),
    "no sinks": Stride(sinks=0, recent=8, stride=5),
    "sinks of blocks": Stride(sinks=21),
    "blocks of one": Stride(sinks=1, recent=2, block=1, stride=4),
    "long blocks": Stride(recent=150, block=150, stride=2),
    "far strides": Stride(stride=1000),
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", FORMS)
def test_matches_float64(name: str, steps: str, isa: str) -> None:
    form, feeds = FORMS[name], feeds_of(FORMS[name], batch=2)
    feeds["valid"][1, :45] = False
    feeds["valid"][0, [1, 60, 61, 200]] = False
    found = Cache(form, Stride(), batch=2).run(feeds, STEPS[steps])
    np.testing.assert_allclose(found, expected(form, Stride(), feeds), atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("steps", ["at once", "few, many, few"])
def test_patterns(pattern: str, steps: str) -> None:
    form, feeds = FORMS["gqa"], feeds_of(FORMS["gqa"])
    found = Cache(form, PATTERNS[pattern]).run(feeds, STEPS[steps])
    np.testing.assert_allclose(found, expected(form, PATTERNS[pattern], feeds), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_a_pattern_of_everything_is_dense(name: str, dtype: str) -> None:
    """The same bits as without a selection."""
    form, feeds, steps = FORMS[name], feeds_of(FORMS[name]), [200, 5, *[1] * 60]
    dense = Cache(form, None, DTYPES[dtype]).run(feeds, steps)
    for stride in (Stride(stride=1), Stride(recent=TOKENS // 8 * 8 + 8), Stride(sinks=TOKENS)):
        assert np.array_equal(Cache(form, stride, DTYPES[dtype]).run(feeds, steps), dense)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other(dtype: str) -> None:
    """A row in a left-padded batch is the row alone."""
    form, feeds = FORMS["gqa"], feeds_of(FORMS["gqa"], batch=3)
    firsts = (0, 57, 150)
    for row, first in enumerate(firsts):
        feeds["valid"][row, :first] = False
    together = Cache(form, Stride(), DTYPES[dtype], batch=3).run(feeds, [170, *[1] * 50])
    for row, first in enumerate(firsts):
        alone = {name: array[row : row + 1, first:] for name, array in feeds.items()}
        found = Cache(form, Stride(), DTYPES[dtype]).run(alone, [170 - first, *[1] * 50])
        assert np.array_equal(found[0], together[row, first:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_a_prompt_do_not_matter(dtype: str) -> None:
    form, feeds = FORMS["rotary"], feeds_of(FORMS["rotary"])
    whole, parts = (
        Cache(form, Stride(), DTYPES[dtype]).run(feeds, [*prompt, *[1] * 30]) for prompt in ([250], [90, 2, 158])
    )
    np.testing.assert_allclose(parts[:, -30:], whole[:, -30:], atol=1e-5 if dtype == "float32" else 0.05)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        (replace(FORMS["gqa"], window=40), {}, "takes no window"),
        (replace(FORMS["gqa"], causal=0), {}, "needs causal attention"),
        (FORMS["gqa"], {"select_block": 0}, "'select_block' is 0"),
        (FORMS["gqa"], {"select_recent": 4}, "'select_recent' is 4"),
        (FORMS["gqa"], {"select_recent": 20}, "it must be a multiple of select_block, which is 8"),
        (FORMS["gqa"], {"select_stride": 0}, "'select_stride' is 0"),
    ],
)
def test_what_there_is_not(form: Form, options: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=message):
        open_model(form, Cache(FORMS["gqa"], None).past, storage=DENSE | Stride().attributes() | options)


def test_a_bias_is_refused() -> None:
    form, cache = FORMS["gqa"], Cache(FORMS["gqa"], None)
    biased = open_model(form, cache.past, ["bias"], storage=DENSE | Stride().attributes())
    feeds = feeds_of(form)
    step = {name: feeds[name][:, :1] for name in ("query", "key", "value", "valid")}
    with pytest.raises(Exception, match="takes no bias"):
        biased.run(step | {"bias": np.zeros((1, 1, 1, 1), F32)}, cache.past)
