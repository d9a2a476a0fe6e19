"""k-means in NumPy, for keys of a prefix."""

from __future__ import annotations

import numpy as np

ITERATIONS = 25
ROWS = 8192
"""Points whose distances to all centres are computed at once."""


def kmeans(points: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Label of every point, from 0 to `count - 1`; a label may have no points.

    Lloyd's iterations from the start of k-means++ (Arthur and Vassilvitskii 2007), until no label changes, 25 at most.

    Args:
        points: float32 [n, d], n >= 1.
        count: Labels, at least 1.
        seed: Of the start.
    """
    centres = _first_centres(points, count, np.random.default_rng(seed))
    labels = np.full(len(points), -1)
    for _ in range(ITERATIONS):
        nearest = _nearest(points, centres)
        if np.array_equal(nearest, labels):
            break
        labels = nearest
        sums, counts = sums_by_label(points, labels, count)
        centres = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centres)
    return labels


def unit_rows(points: np.ndarray) -> np.ndarray:
    """Rows divided by their L2 norm; a row of zeros stays."""
    norms = np.linalg.norm(points, axis=1, keepdims=True)
    return np.asarray(points / np.where(norms == 0, 1, norms))


def sums_by_label(points: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums [count, d] of the points of each label, zeros where there are none, and their numbers [count] as float32."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=count)
    found = counts > 0
    sums = np.zeros((count, points.shape[1]), np.float32)
    starts = np.cumsum(counts) - counts
    sums[found] = np.add.reduceat(points[order], starts[found], axis=0)
    return sums, counts.astype(np.float32)


def _first_centres(points: np.ndarray, count: int, draw: np.random.Generator) -> np.ndarray:
    """Points drawn one after the other, each with a probability as its squared distance to the nearest before it."""
    chosen = [int(draw.integers(len(points)))]
    norms = np.einsum("nd,nd->n", points, points)
    distances = np.full(len(points), np.inf, np.float32)
    while len(chosen) < count:
        last = chosen[-1]
        new = norms - 2 * (points @ points[last]) + norms[last]
        distances = np.minimum(distances, np.maximum(new, 0))
        total = np.cumsum(distances, dtype=np.float64)
        if total[-1] > 0:
            place = np.searchsorted(total, draw.random() * total[-1], side="right")
            chosen.append(int(min(place, len(points) - 1)))
        else:
            chosen.append(int(draw.integers(len(points))))
    return points[chosen]


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index of the nearest centre of every point; of several, the first."""
    half = np.einsum("cd,cd->c", centres, centres) / 2
    parts = [
        np.argmax(points[start : start + ROWS] @ centres.T - half, axis=1) for start in range(0, len(points), ROWS)
    ]
    return np.concatenate(parts)
