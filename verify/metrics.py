"""Figures of how far two sets of outputs are apart. Everything non-finite is counted, never averaged away."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Difference:
    """How far an array is from its reference.

    Attributes:
        bitwise: Same shape, dtype and bits, NaN payloads included.
        max_abs: Largest absolute difference; infinite when `mismatched` is not 0.
        max_rel: `max_abs` over the root mean square of the finite reference values, so that values near zero do
            not make it explode. 0 when equal; infinite when the reference is all zero and the value is not.
        mismatched: Elements where one side is NaN or infinite and the other is not the same.
        top1: Share of rows (last axis) whose largest element is at the same place; None where rows have no
            such meaning.
        rows: Number of rows behind `top1`.
    """

    bitwise: bool = True
    max_abs: float = 0.0
    max_rel: float = 0.0
    mismatched: int = 0
    top1: float | None = None
    rows: int = 0

    def to_json(self) -> dict[str, Any]:
        """Figures as JSON; null for infinite, with `mismatched` then saying how many elements are the reason."""
        figures: dict[str, Any] = {
            "bitwise": self.bitwise,
            "max_abs": finite(self.max_abs),
            "max_rel": finite(self.max_rel),
            "top1": self.top1,
        }
        if self.mismatched:
            figures["mismatched"] = self.mismatched
        return figures


def finite(number: float | None) -> float | None:
    """The number, None when it is infinite or NaN: JSON has neither."""
    return float(number) if number is not None and math.isfinite(number) else None


def same_bits(reference: np.ndarray, value: np.ndarray) -> bool:
    """Whether two arrays have the same shape, dtype and bits."""
    if reference.shape != value.shape or reference.dtype != value.dtype:
        return False
    if reference.dtype.kind in "OSU":
        return bool(np.array_equal(reference, value))
    bits = np.dtype(f"u{reference.dtype.itemsize}")
    return bool(np.array_equal(np.ascontiguousarray(reference).view(bits), np.ascontiguousarray(value).view(bits)))


def compare(
    reference: np.ndarray, value: np.ndarray, *, valid: np.ndarray | None = None, classes: bool = False
) -> Difference:
    """Compare an array with its reference.

    Args:
        reference: Any dtype; floats are compared in float64, in blocks.
        value: Of the same shape; another shape counts as one mismatch per element of the reference.
        valid: Bool over the leading axes: where the content has a meaning. The figures cover these elements
            only, `bitwise` covers all.
        classes: The last axis is a distribution (logits): measure `top1`.
    """
    bitwise = same_bits(reference, value)
    if reference.shape != value.shape:
        return Difference(False, math.inf, math.inf, max(reference.size, 1))
    if valid is not None:
        reference, value = reference[valid], value[valid]
    if reference.dtype.kind in "OSU":
        wrong = int(np.count_nonzero(reference != value))
        return Difference(bitwise, math.inf if wrong else 0.0, math.inf if wrong else 0.0, wrong)
    figures = [_block(*pair) for pair in _blocks(reference, value)]
    largest = max((block.largest for block in figures), default=0.0)
    squares, count = sum(block.squares for block in figures), sum(block.count for block in figures)
    mismatched = sum(block.mismatched for block in figures)
    scale = math.sqrt(squares / count) if count else 0.0
    max_abs = math.inf if mismatched else largest
    max_rel = 0.0 if max_abs == 0 else (max_abs / scale if scale else math.inf)
    top1, rows_compared = _top1(reference, value) if classes else (None, 0)
    return Difference(bitwise, max_abs, max_rel, mismatched, top1, rows_compared)


@dataclass(frozen=True)
class _Block:
    largest: float
    mismatched: int
    squares: float
    count: int


BLOCK = 1 << 20


def _blocks(reference: np.ndarray, value: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    flat_reference, flat_value = reference.reshape(-1), value.reshape(-1)
    for start in range(0, flat_reference.size, BLOCK):
        yield flat_reference[start : start + BLOCK], flat_value[start : start + BLOCK]


def _block(reference: np.ndarray, value: np.ndarray) -> _Block:
    if reference.dtype.kind in "bui" and value.dtype == reference.dtype:
        return _integers(reference, value)
    a, b = reference.astype(np.float64), value.astype(np.float64)
    both = np.isfinite(a) & np.isfinite(b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    a, b = a[both], b[both]
    largest = float(np.max(np.abs(a - b), initial=0.0))
    return _Block(largest, int(np.count_nonzero(~both & ~same)), float(np.sum(a * a)), a.size)


def _integers(reference: np.ndarray, value: np.ndarray) -> _Block:
    """Exact differences: 64-bit integers lose their low bits in float64, so those become Python integers."""
    different = reference != value
    wide = np.dtype(object) if reference.dtype.itemsize == 8 else np.dtype(np.int64)
    gaps = np.abs(reference[different].astype(wide) - value[different].astype(wide))
    squares = float(np.sum(np.square(reference.astype(np.float64))))
    return _Block(float(gaps.max()) if gaps.size else 0.0, 0, squares, reference.size)


def _top1(reference: np.ndarray, value: np.ndarray) -> tuple[float | None, int]:
    rows = int(np.prod(reference.shape[:-1], dtype=np.int64))
    if rows == 0 or reference.shape[-1] == 0:
        return None, 0
    return float(np.mean(reference.argmax(axis=-1) == value.argmax(axis=-1))), rows


def merge(differences: Iterable[Difference]) -> Difference:
    """The worst of several differences; `top1` is the mean over all rows."""
    items = list(differences)
    rows = sum(item.rows for item in items)
    agreed = sum(item.top1 * item.rows for item in items if item.top1 is not None)
    return Difference(
        bitwise=all(item.bitwise for item in items),
        max_abs=max((item.max_abs for item in items), default=0.0),
        max_rel=max((item.max_rel for item in items), default=0.0),
        mismatched=sum(item.mismatched for item in items),
        top1=agreed / rows if rows else None,
        rows=rows,
    )


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """Ln Σ exp over the last axis, float64 [...]; exponentials in the dtype given, sums in float64."""
    top = logits.max(axis=-1, keepdims=True)
    sums = np.exp(logits - top).sum(axis=-1, dtype=np.float64)
    return np.asarray(top[..., 0].astype(np.float64) + np.log(sums))


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-ln p(target) in nats for logits [rows, vocab] and ids [rows], float64 [rows]."""
    losses = np.empty(len(targets), np.float64)
    for row, target in enumerate(targets):
        losses[row] = log_sum_exp(logits[row]) - np.float64(logits[row, target])
    return losses


NEGLIGIBLE = 32.0
"""Tokens this many nats below the most likely one on both sides are left out of a divergence: together at most
`vocab * exp(-32)`, a few billionths of the probability."""


def kl_divergence(reference: np.ndarray, value: np.ndarray) -> np.ndarray:
    """KL(reference ‖ value) in nats of each row of logits [rows, vocab], float64 [rows].

    Infinite where the reference allows a token that the other rules out; NaN for logits that are NaN.
    """
    divergences = np.empty(len(reference), np.float64)
    for row, (a, b) in enumerate(zip(reference, value, strict=True)):
        tops = a.max(), b.max()
        if np.isnan(tops).any():
            divergences[row] = np.nan
            continue
        kept = (a >= tops[0] - NEGLIGIBLE) | (b >= tops[1] - NEGLIGIBLE)
        divergences[row] = _divergence(a[kept].astype(np.float64), b[kept].astype(np.float64))
    return divergences


def _divergence(a: np.ndarray, b: np.ndarray) -> float:
    """Σ p (a - b) - (lse(a) - lse(b)): where a and b are close, only their difference is rounded."""
    total_a, total_b = log_sum_exp(a), log_sum_exp(b)
    p = np.exp(a - total_a)
    # Impossible tokens of the reference add nothing, whatever the other says of them.
    gap = np.subtract(a, b, where=p > 0, out=np.zeros(a.shape))
    return float(np.maximum((p * gap).sum() - (total_a - total_b), 0.0))
