"""Sampling against a slow oracle that sorts everything, and its frequencies against the probabilities."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from effc.errors import EngineError
from effc.runtime.sampling import Sampler, Sampling, candidates, draw, nucleus, penalized

FINITE = st.floats(-50, 50, width=32)
LOGITS = hnp.arrays(np.float32, st.integers(1, 700), elements=FINITE)
# Few distinct values: many ties.
TIED = hnp.arrays(np.float32, st.integers(1, 40), elements=st.sampled_from([-2.0, 0.0, 1.0, 1.5]))


def oracle_top_k(logits: np.ndarray, top_k: int) -> list[int]:
    """All tokens not worse than the k-th best, best first, equals by id."""
    order = sorted(range(len(logits)), key=lambda index: (-logits[index], index))
    if top_k == 0 or top_k >= len(order):
        return order
    return [index for index in order if logits[index] >= logits[order[top_k - 1]]]


def oracle_probabilities(logits: np.ndarray, tokens: list[int], temperature: float) -> np.ndarray:
    scaled = logits[tokens].astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


@settings(deadline=None, max_examples=200)
@given(st.one_of(LOGITS, TIED), st.integers(0, 50), st.floats(0.05, 1.0), st.floats(0.2, 5.0))
def test_candidates_are_those_of_a_full_sort(logits: np.ndarray, top_k: int, top_p: float, temperature: float) -> None:
    ranked = oracle_top_k(logits, top_k)
    probabilities = oracle_probabilities(logits, ranked, temperature)
    tokens, weights = candidates(logits, Sampling(temperature, top_k, top_p))
    assert tokens.tolist() == sorted(tokens)
    best_first = np.argsort(-weights, kind="stable")
    tokens, weights = tokens[best_first], weights[best_first]
    count = len(tokens)
    # Weights that float32 rounds to the same value may change places; the sets' probabilities may not differ.
    assert len(set(tokens.tolist())) == count
    assert set(tokens.tolist()) <= set(ranked)
    by_token = dict(zip(ranked, probabilities))
    kept = np.array([by_token[int(token)] for token in tokens])
    np.testing.assert_allclose(kept, probabilities[:count], atol=1e-6)
    np.testing.assert_allclose(weights / weights.sum(), kept / kept.sum(), rtol=2e-4, atol=1e-12)
    if top_p == 1.0:
        assert count == len(ranked)
    else:
        assert kept.sum() >= top_p - 1e-5
        assert count == 1 or kept[:-1].sum() < top_p + 1e-5


@pytest.mark.parametrize("size", [1, 255, 256, 257, 4095, 4096, 4097, 70000])
def test_nucleus_of_flat_and_steep_distributions(size: int) -> None:
    flat = np.ones(size, np.float32)
    assert nucleus(flat, 0.5).tolist() == list(range((size + 1) // 2))
    steep = np.exp(-np.arange(size, dtype=np.float32))
    assert nucleus(steep, 0.5).tolist() == [0]
    assert nucleus(flat, 1.0).size == size
    rng = np.random.default_rng(size)
    weights = rng.random(size).astype(np.float32)
    order = np.argsort(-weights, kind="stable")
    total = np.cumsum(weights[order], dtype=np.float64)
    expected = order[: int(np.searchsorted(total, 0.9 * weights.sum(dtype=np.float64))) + 1]
    np.testing.assert_array_equal(nucleus(weights, 0.9), np.sort(expected))


@settings(deadline=None, max_examples=100)
@given(LOGITS, st.floats(0.1, 3.0), st.data())
def test_penalty_changes_present_tokens_only(logits: np.ndarray, penalty: float, data: st.DataObject) -> None:
    present = np.array(sorted(data.draw(st.sets(st.integers(0, len(logits) - 1)))), np.int64)
    before = logits.copy()
    result = penalized(logits, present, penalty)
    np.testing.assert_array_equal(logits, before)
    for token in range(len(logits)):
        value = np.float64(before[token])
        if token in present:
            value = value / penalty if value > 0 else value * penalty
        np.testing.assert_allclose(result[token], value, rtol=1e-5, atol=np.finfo(np.float32).smallest_subnormal)


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.8), Sampling(2.0, top_k=7, top_p=0.9)]
)
@pytest.mark.parametrize("size", [9, 1500])
def test_frequencies_follow_the_probabilities(sampling: Sampling, size: int) -> None:
    logits = np.random.default_rng(0).standard_normal(size).astype(np.float32) * 2
    logits[3] = -np.inf
    ranked = oracle_top_k(logits, sampling.top_k)
    probabilities = oracle_probabilities(logits, ranked, sampling.temperature)
    keep = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p - 1e-9)) + 1
    expected = np.zeros(size)
    expected[ranked[:keep]] = probabilities[:keep] / probabilities[:keep].sum()
    generator, count = np.random.default_rng(1), 20000
    counts = np.bincount([draw(logits, sampling, generator) for _ in range(count)], minlength=size)
    assert counts[expected == 0].sum() == 0
    # Five standard deviations of a binomial, for each token.
    assert np.all(np.abs(counts - count * expected) <= 5 * np.sqrt(count * expected) + 5)


def test_greedy_is_argmax_with_the_first_of_equals() -> None:
    sampler = Sampler(Sampling(), [[0], [0]], None)
    assert sampler.choose(0, np.array([1, 3, 3, 2], np.float32)) == 1
    assert sampler.choose(1, np.array([-np.inf, -5, -np.inf], np.float32)) == 1


def test_penalty_counts_the_prompt_and_what_was_chosen() -> None:
    sampler = Sampler(Sampling(repetition_penalty=100.0), [[2]], None)
    logits = np.array([1.0, 2.0, 3.0, -1.0], np.float32)
    assert [sampler.choose(0, logits) for _ in range(3)] == [1, 0, 2]


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]])
def test_logits_without_a_finite_best_are_an_error(bad: list[float]) -> None:
    with pytest.raises(EngineError, match="not finite"):
        Sampler(Sampling(), [[0]], None).choose(0, np.array(bad, np.float32))


@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(0.7, top_k=50, top_p=0.9), Sampling(1e-6)])
def test_masked_tokens_are_never_drawn(sampling: Sampling) -> None:
    logits = np.full(2000, -np.inf, np.float32)
    logits[[5, 600, 1999]] = [1.0, 2.0, 0.5]
    generator = np.random.default_rng(0)
    assert {draw(logits, sampling, generator) for _ in range(200)} <= {5, 600, 1999}


def _quickest(action: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs."""
    spent = []
    for _ in range(20):
        begun = time.perf_counter()
        action()
        spent.append(time.perf_counter() - begun)
    return min(spent)


def test_a_large_vocabulary_is_never_sorted_whole() -> None:
    logits = np.random.default_rng(0).standard_normal(262144).astype(np.float32) * 3
    sorting = _quickest(lambda: np.argsort(logits, kind="stable"))
    shares = {Sampling(): 0.01, Sampling(0.7): 0.4, Sampling(0.7, top_k=50): 0.4, Sampling(1.0, top_p=0.95): 1.5}
    for sampling, share in shares.items():
        sampler = Sampler(sampling, [[1]], 0)
        assert _quickest(lambda sampler=sampler: sampler.choose(0, logits)) < share * sorting, sampling
