"""Chooses the next token from logits: repetition penalty, temperature, top-k, top-p, seeded per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from effc.errors import EngineError, UsageError

FIRST_NUCLEUS = 256
"""Candidates looked at first for top-p; most nuclei are smaller."""
LEAST_PENALTY = 1e-6
"""Dividing by less would take logits out of the range of float32."""
BLOCK = 512
"""Vocabulary entries summed together when a whole vocabulary is sampled from."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the largest logit (greedy) and ignores top_k and top_p.
        top_k: Keep tokens no worse than the k-th best, so ties may make them more; 0 keeps all.
        top_p: Keep the smallest set of best tokens whose probability reaches top_p (nucleus sampling, Holtzman
            et al. 2020); 1 keeps all. Applies to what top_k left.
        repetition_penalty: Divides positive and multiplies negative logits of tokens already present (Keskar
            et al. 2019, CTRL, section 4.1); 1 changes nothing.

    Raises:
        UsageError: A value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}; give a finite number of at least 0 (0 is greedy).")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}; give a whole number of at least 0 (0 keeps all tokens).")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top_p is {self.top_p}; give a number above 0 and at most 1 (1 keeps all tokens).")
        if not LEAST_PENALTY <= self.repetition_penalty < float("inf"):
            raise UsageError(
                f"repetition_penalty is {self.repetition_penalty}; give a finite number of at least {LEAST_PENALTY}."
            )


class Sampler:
    """Chooses tokens for the rows of one generation.

    Args:
        sampling: How.
        prompts: Token ids of every row's prompt; they count as present for the repetition penalty.
        seed: Row r draws from a generator seeded with (seed, r); None seeds from the system.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], seed: int | None) -> None:
        self._sampling = sampling
        seeds = [None if seed is None else (seed, row) for row in range(len(prompts))]
        self._generators = [np.random.default_rng(item) for item in seeds]
        self._present = [np.unique(np.asarray(prompt, np.int64)) for prompt in prompts]

    def add(self, row: int, ids: Sequence[int]) -> None:
        """Let further tokens of a row count as present."""
        self._present[row] = np.union1d(self._present[row], np.asarray(ids, np.int64))

    def choose(self, row: int, logits: np.ndarray) -> int:
        """The next token of a row, which then counts as present.

        Args:
            row: Index of the row.
            logits: float[vocabulary]; not changed.

        Raises:
            EngineError: The logits hold NaN, or no finite value is the largest.
        """
        sampling = self._sampling
        if sampling.repetition_penalty != 1.0:
            logits = penalized(logits, self._present[row], sampling.repetition_penalty)
        best = int(logits.argmax())
        # argmax stops at the first NaN, so one look finds NaN, +inf and a row of -inf.
        if not np.isfinite(logits[best]):
            raise EngineError(
                f"row {row}: the logits are not finite ({logits[best]} at token {best}). "
                "The engine computes garbage: run `effc verify` on it."
            )
        token = best if sampling.temperature == 0.0 else draw(logits, sampling, self._generators[row])
        if sampling.repetition_penalty != 1.0:
            self._present[row] = np.union1d(self._present[row], [token])
        return token


def penalized(logits: np.ndarray, present: np.ndarray, penalty: float) -> np.ndarray:
    """Logits with those of the `present` ids divided (positive) or multiplied (negative) by `penalty`; a copy."""
    result = logits.copy()
    values = result[present]
    result[present] = np.where(values > 0, values / penalty, values * penalty)
    return result


def draw(logits: np.ndarray, sampling: Sampling, generator: np.random.Generator) -> int:
    """One token at random; one uniform number is taken from the generator."""
    uniform = generator.random()
    if (sampling.top_k == 0 or sampling.top_k >= logits.size) and sampling.top_p == 1.0:
        return _draw_from_all(_weights(logits, sampling.temperature), uniform)
    tokens, weights = candidates(logits, sampling)
    return int(tokens[_position(np.cumsum(weights), uniform)])


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that temperature, top-k and top-p leave, in order of id, and their weights.

    Args:
        logits: float[vocabulary].
        sampling: Temperature above 0.

    Returns:
        Token ids int64[n] and unnormalised probabilities float64[n], n at least 1.
    """
    tokens = np.arange(logits.size)
    if 0 < sampling.top_k < logits.size:
        tokens = np.flatnonzero(logits >= _value_of_rank(logits, sampling.top_k))
    weights = _weights(logits[tokens] if tokens.size < logits.size else logits, sampling.temperature)
    if sampling.top_p < 1.0:
        kept = nucleus(weights, sampling.top_p)
        tokens, weights = tokens[kept], weights[kept]
    return tokens, weights.astype(np.float64)


def nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices, ascending, of the smallest set of largest weights that makes up `top_p` of their sum.

    Of equal weights at the border the first are taken. Looks at the best few hundred only, and at more when they
    are not enough; only values are sorted, which is much faster than sorting indices.
    """
    target = top_p * weights.sum(dtype=np.float64)
    rank = FIRST_NUCLEUS
    while True:
        complete = rank >= weights.size
        best = weights if complete else weights[weights >= _value_of_rank(weights, rank)]
        descending = np.sort(best)[::-1]
        cumulative = np.cumsum(descending, dtype=np.float64)
        if complete or cumulative[-1] >= target:
            break
        rank *= 16
    count = min(int(np.searchsorted(cumulative, target)) + 1, descending.size)
    border = descending[count - 1]
    above = np.flatnonzero(weights > border)
    equal = np.flatnonzero(weights == border)[: count - above.size]
    return np.sort(np.concatenate([above, equal]))


def _value_of_rank(values: np.ndarray, rank: int) -> np.floating:
    """The rank-th largest value."""
    return np.partition(values, values.size - rank)[values.size - rank]


def _weights(logits: np.ndarray, temperature: float) -> np.ndarray:
    """exp((logits - max) / temperature), the probabilities up to a common factor."""
    # Subtracting first keeps a tiny temperature from overflowing; the largest weight is exactly 1.
    with np.errstate(over="ignore", under="ignore"):
        return np.exp((logits - logits.max()) / np.float32(max(temperature, 1e-30)))


def _draw_from_all(weights: np.ndarray, uniform: float) -> int:
    """Inverse of the cumulative sum at `uniform`, block by block: a cumulative sum of everything is slow."""
    starts = np.arange(0, weights.size, BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    block = _position(blocks, uniform)
    before = blocks[block - 1] if block else 0.0
    inside = np.cumsum(weights[starts[block] : starts[block] + BLOCK], dtype=np.float64)
    rest = (uniform * blocks[-1] - before) / inside[-1]
    return int(starts[block]) + _position(inside, min(rest, 1.0))


def _position(cumulative: np.ndarray, uniform: float) -> int:
    """First index whose cumulative weight exceeds `uniform` of the whole; never one of zero weight."""
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return min(index, int(np.searchsorted(cumulative, cumulative[-1])))
