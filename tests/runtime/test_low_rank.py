"""What a prefix of low rank is made of, against numpy's own decomposition."""

from __future__ import annotations

import numpy as np
import pytest

from effc.runtime.low_rank import factors, unlike, unrotated


def random_keys(heads: int, tokens: int, size: int, rank: int | None = None, seed: int = 1) -> np.ndarray:
    """Keys [heads, tokens, size], of all heads together of a rank."""
    rng = np.random.default_rng(seed)
    together = rng.standard_normal((tokens, heads * size))
    if rank is not None:
        together = rng.standard_normal((tokens, rank)) @ rng.standard_normal((rank, heads * size))
    return np.ascontiguousarray(together.reshape(tokens, heads, size).transpose(1, 0, 2), np.float32)


def rebuilt(keys: np.ndarray, rank: int) -> np.ndarray:
    coefficients, basis = factors(keys, rank)
    return np.einsum("tr,hdr->htd", coefficients.astype(np.float64), basis.astype(np.float64))


@pytest.mark.parametrize(("heads", "tokens", "size"), [(2, 64, 16), (3, 5000, 8), (1, 7, 16), (4, 1, 8)])
def test_what_is_lost_is_the_smallest_singular_values(heads: int, tokens: int, size: int) -> None:
    """Eckart and Young (1936): no product of that rank is nearer."""
    keys = random_keys(heads, tokens, size)
    singular = np.linalg.svd(keys.transpose(1, 0, 2).reshape(tokens, -1).astype(np.float64), compute_uv=False)
    for rank in (1, 5, heads * size):
        lost = ((rebuilt(keys, rank) - keys) ** 2).sum()
        np.testing.assert_allclose(lost, (singular[rank:] ** 2).sum(), rtol=1e-4, atol=1e-6 * (singular**2).sum())


def test_keys_of_that_rank_are_rebuilt() -> None:
    keys = random_keys(2, 300, 16, rank=12)
    np.testing.assert_allclose(rebuilt(keys, 12), keys, atol=1e-4)
    assert np.abs(rebuilt(keys, 11) - keys).max() > 0.1


def test_a_rank_beyond_the_elements_or_tokens_is_theirs() -> None:
    assert factors(random_keys(2, 50, 4), 99)[0].shape == (50, 8)
    assert factors(random_keys(2, 3, 4), 99)[1].shape == (2, 4, 3)


def test_zeros_stay_zeros() -> None:
    np.testing.assert_array_equal(rebuilt(np.zeros((2, 9, 4), np.float32), 3), 0)


@pytest.mark.parametrize("rotary", ["half", "interleaved", "none"])
@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("turned", [16, 10])
def test_a_rotation_is_undone(rotary: str, scale: float, turned: int) -> None:
    keys, angles = random_keys(2, 40, 16), np.arange(40)[:, None] * np.linspace(1, 0.01, turned // 2)
    cosines, sines = (scale * function(angles).astype(np.float32) for function in (np.cos, np.sin))
    first = {"half": slice(0, turned // 2), "interleaved": slice(0, turned, 2), "none": slice(0, 0)}[rotary]
    second = {"half": slice(turned // 2, turned), "interleaved": slice(1, turned, 2), "none": slice(0, 0)}[rotary]
    rotated = keys.copy()
    if rotary != "none":
        rotated[..., first] = keys[..., first] * cosines - keys[..., second] * sines
        rotated[..., second] = keys[..., second] * cosines + keys[..., first] * sines
    np.testing.assert_allclose(unrotated(rotated, rotary, cosines, sines), keys, atol=1e-5)


def test_chunks_with_a_key_unlike_the_others() -> None:
    keys = np.ones((2, 6, 4, 8), np.float32)
    keys[0, 4, 2] = -1
    keys[0, 1, 0, :4] = 0
    keys[1, 5, 3] = 0  # has no direction
    assert unlike(keys, keys.mean(axis=2), 2).tolist() == [[1, 4], [0, 5]]
    assert unlike(keys, keys.mean(axis=2), 0).shape == (2, 0)
    assert unlike(keys, keys.mean(axis=2), 6).tolist() == [list(range(6))] * 2
