"""Finds the first inner value where two versions of a program part."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from effc.verify.inputs import FeedShape
from effc.verify.snapshot import Snapshot

SAMPLE = 4096


@dataclass(frozen=True)
class Sketch:
    """What is kept of a value: enough to compare it, a few kilobytes however large it is.

    Attributes:
        shape: Of the value.
        dtype: Of the value.
        digest: SHA-256 of its bytes.
        sample: At most `SAMPLE` evenly spaced elements, float64.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    digest: bytes
    sample: np.ndarray

    @classmethod
    def of(cls, value: np.ndarray) -> Sketch:
        """Sketch an array of numbers."""
        flat = np.ascontiguousarray(value).reshape(-1)
        step = max(1, math.ceil(flat.size / SAMPLE))
        digest = hashlib.sha256(flat.view(np.uint8).data if flat.size else b"").digest()
        return cls(value.shape, value.dtype, digest, flat[::step].astype(np.float64))

    def distance(self, other: Sketch) -> float:
        """Largest difference in the sample over this one's root mean square; infinite where one is NaN or infinite."""
        if self.digest == other.digest:
            return 0.0
        both = np.isfinite(self.sample) & np.isfinite(other.sample)
        same = (self.sample == other.sample) | (np.isnan(self.sample) & np.isnan(other.sample))
        if np.any(~both & ~same):
            return math.inf
        gap = float(np.max(np.abs(self.sample[both] - other.sample[both]), initial=0.0))
        scale = math.sqrt(float(np.mean(np.square(self.sample[both])))) if both.any() else 0.0
        return 0.0 if gap == 0 else (gap / scale if scale else math.inf)


def first_difference(before: Snapshot, after: Snapshot, shape: FeedShape, tolerance: float) -> str | None:
    """The first value, in the order of the later graph, that has a namesake in the earlier one and is off.

    Args:
        before: The reference.
        after: The program in question.
        shape: Where both are run again.
        tolerance: Relative distance that is still fine; 0 asks for equal bits.

    Returns:
        `'name' (Op 'node'): …`, or None when no common value is off by more.
    """
    sketches: dict[str, Sketch] = {}

    def remember(_: int, name: str, value: np.ndarray) -> None:
        if value.dtype.kind not in "OSU":
            sketches[name] = Sketch.of(value)

    found: list[tuple[str, float]] = []

    def judge(_: int, name: str, value: np.ndarray) -> None:
        known = sketches.get(name)
        if found or known is None or (known.shape, known.dtype) != (value.shape, value.dtype):
            return
        now = Sketch.of(value)
        distance = known.distance(now)
        if distance > tolerance or (tolerance == 0 and known.digest != now.digest):
            found.append((name, distance))

    before.observe(shape, remember)
    after.observe(shape, judge)
    return _describe(after, *found[0]) if found else None


def _describe(after: Snapshot, name: str, distance: float) -> str:
    for node in after.model.graph:
        if any(value.name == name for value in node.outputs):
            return f"{name!r} ({node.op_type} {node.name!r}), relative difference {distance:.3g}"
    return f"{name!r}, relative difference {distance:.3g}"
