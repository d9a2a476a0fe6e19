"""Float64 attention with a cache, written from docs/cached-attention.md with numpy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Form:
    """Attributes that do not depend on the storage."""

    heads: int = 1
    kv_heads: int = 1
    head_size: int = 4
    value_size: int = 4
    scale: float = 1.0
    softcap: float = 0.0
    causal: int = 1
    window: int = 0
    rotary: str = "none"
    rotary_size: int = 0


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, form: Form) -> np.ndarray:
    """Rotate the new tokens of x [B, heads, S, D]; cos and sin are [B or 1, S, R / 2]."""
    if form.rotary == "none":
        return x
    size = form.rotary_size
    first = slice(0, size // 2) if form.rotary == "half" else slice(0, size, 2)
    second = slice(size // 2, size) if form.rotary == "half" else slice(1, size, 2)
    out = x.copy()
    c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    out[..., first] = x[..., first] * c - x[..., second] * s
    out[..., second] = x[..., second] * c + x[..., first] * s
    return out


def split(x: np.ndarray, heads: int) -> np.ndarray:
    """[B, S, heads * size] to float64 [B, heads, S, size]."""
    batch, seq, width = x.shape
    return x.reshape(batch, seq, heads, width // heads).transpose(0, 2, 1, 3).astype(np.float64)


def visible(form: Form, valid: np.ndarray, seq: int) -> np.ndarray:
    """Which slots each query sees, bool [B, S, T]."""
    total = valid.shape[1]
    i = (total - seq + np.arange(seq))[:, None]
    j = np.arange(total)[None, :]
    seen = np.ones((seq, total), bool)
    if form.causal:
        seen &= j <= i
    if form.window:
        seen &= i - j < form.window
    return seen[None] & valid[:, None, :]


def probabilities(
    form: Form, query: np.ndarray, keys: np.ndarray, valid: np.ndarray, bias: np.ndarray | None
) -> np.ndarray:
    """Softmax [B, H, S, T] of rotated queries [B, H, S, D] and keys [B, K, T, D]; rows that see nothing are 0."""
    keys = np.repeat(keys, form.heads // form.kv_heads, axis=1)
    scores = query @ keys.transpose(0, 1, 3, 2) * form.scale
    if form.softcap:
        scores = form.softcap * np.tanh(scores / form.softcap)
    if bias is not None:
        scores = scores + bias.astype(np.float64)
    scores = np.where(visible(form, valid, query.shape[2])[:, None], scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isinf(top), 0, top))
    total = weights.sum(axis=-1, keepdims=True)
    return np.asarray(weights / np.where(total == 0, 1, total))


def attend(
    form: Form,
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    valid: np.ndarray,
    past: tuple[np.ndarray, np.ndarray],
    bias: np.ndarray | None = None,
    cos: np.ndarray | None = None,
    sin: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Result [B, S, H * E] and the tokens so far [B, K, T, ..] of one step, all float64."""
    q, k, v = split(query, form.heads), split(key, form.kv_heads), split(value, form.kv_heads)
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin, form), rotate(k, cos, sin, form)
    keys = np.concatenate([past[0].astype(np.float64), k], axis=2)
    values = np.concatenate([past[1].astype(np.float64), v], axis=2)
    weights = probabilities(form, q, keys, valid, bias)
    result = weights @ np.repeat(values, form.heads // form.kv_heads, axis=1)
    batch, seq = query.shape[:2]
    return result.transpose(0, 2, 1, 3).reshape(batch, seq, form.heads * form.value_size), keys, values
