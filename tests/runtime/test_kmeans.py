"""k-means: labels of points that lie in groups, and of points that do not."""

from __future__ import annotations

import numpy as np
import pytest

from effc.runtime.kmeans import kmeans, sums_by_label, unit_rows


def points(count: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)


def spread(rows: np.ndarray, labels: np.ndarray) -> float:
    """Sum of squared distances to the means, float64."""
    total = 0.0
    for label in np.unique(labels):
        own = rows[labels == label].astype(np.float64)
        total += float(((own - own.mean(axis=0)) ** 2).sum())
    return total


def test_groups_are_found() -> None:
    centres = 10 * points(7, seed=1)
    of = np.random.default_rng(2).integers(0, 7, 300)
    labels = kmeans(centres[of] + 0.1 * points(300), 7)
    pairs = set(zip(of.tolist(), labels.tolist()))
    assert len(pairs) == 7 == len({label for _, label in pairs})


@pytest.mark.parametrize(("count", "clusters"), [(1, 1), (5, 5), (100, 1), (301, 17), (9000, 3)])
def test_no_point_is_nearer_to_another_mean(count: int, clusters: int) -> None:
    rows = points(count)
    labels = kmeans(rows, clusters)
    assert labels.shape == (count,)
    assert labels.min() >= 0
    assert labels.max() < clusters
    sums, counts = sums_by_label(rows, labels, clusters)
    means = (sums / np.maximum(counts, 1)[:, None])[counts > 0]
    distances = ((rows[:, None] - means[None]) ** 2).sum(axis=2)
    better = distances.argmin(axis=1) != np.searchsorted(np.flatnonzero(counts > 0), labels)
    assert better.mean() < 0.05  # iterations are bounded
    if 1 < clusters < count:
        chance = np.random.default_rng(5).integers(0, clusters, count)
        assert spread(rows, labels) < 0.9 * spread(rows, chance)


def test_equal_points_leave_labels_empty() -> None:
    labels = kmeans(np.ones((10, 4), np.float32), 4)
    assert len(set(labels.tolist())) == 1
    two = np.repeat(points(2), 10, axis=0)
    assert len(set(kmeans(two, 6).tolist())) == 2


def test_the_same_labels_again() -> None:
    rows = points(500)
    assert np.array_equal(kmeans(rows, 20), kmeans(rows, 20))
    assert not np.array_equal(kmeans(rows, 20), kmeans(rows, 20, seed=1))


def test_sums_and_unit_rows() -> None:
    rows, labels = points(40), np.random.default_rng(3).integers(0, 5, 40) * 2
    sums, counts = sums_by_label(rows, labels, 11)
    for label in range(11):
        np.testing.assert_allclose(sums[label], rows[labels == label].sum(axis=0), atol=1e-5)
        assert counts[label] == (labels == label).sum()
    rows[3] = 0
    norms = np.linalg.norm(unit_rows(rows), axis=1)
    np.testing.assert_allclose(norms, np.where(np.arange(40) == 3, 0, 1), atol=1e-6)
