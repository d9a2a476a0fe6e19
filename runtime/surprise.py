"""What every token of a text is worth to a cache that keeps the most surprising ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TOKEN_SCORES = "token_scores"
"""Input of an engine whose cache keeps tokens by their scores: float32 [batch, total]."""
FIRST_CAPACITY = 256


class TokenScores:
    """The surprise of every token of a batch: `-ln P(token | tokens before)`, from the logits before it.

    SirLLM (Yao et al. 2024, arXiv 2405.12528, section 3.1), which calls it token entropy. The first token of a row
    follows nothing: it is worth as much as the most surprising token of its turn, which ends with the first `decay`.

    Args:
        starts: Slot of the first token of each row; padding before it is worth nothing.
    """

    def __init__(self, starts: Sequence[int]) -> None:
        self._starts = list(starts)
        self._values = np.zeros((len(self._starts), FIRST_CAPACITY), np.float32)
        self._length = 0
        self._last: np.ndarray | None = None
        self._first_turn = True

    def values(self, total: int) -> np.ndarray:
        """Scores float32 [batch, total]; 0 for tokens that were not added yet. A copy."""
        known = self._values[:, : min(total, self._length)]
        return np.pad(known, ((0, 0), (0, total - known.shape[1])))

    def add(self, ids: np.ndarray, logits: np.ndarray) -> None:
        """Score tokens once they were read.

        Args:
            ids: int[batch, seq], the tokens after those added before.
            logits: float[batch, seq, vocabulary] after each of them.
        """
        begin, end = self._length, self._length + ids.shape[1]
        if ids.shape[1] == 0:
            return
        self._grow(end)
        for row, start in enumerate(self._starts):
            for slot in range(max(begin, start + 1), end):
                before = self._last[row] if slot == begin and self._last is not None else logits[row, slot - begin - 1]
                self._values[row, slot] = surprise(before, int(ids[row, slot - begin]))
            if self._first_turn and end > start + 1:
                self._values[row, start] = self._values[row, start + 1 : end].max()
        self._last = np.array(logits[:, -1])
        self._length = end

    def decay(self, factor: float) -> None:
        """Multiply all scores: a turn begins."""
        self._values[:, : self._length] *= np.float32(factor)
        self._first_turn = False

    def _grow(self, total: int) -> None:
        if total > self._values.shape[1]:
            room = np.zeros((len(self._starts), 2 * total), np.float32)
            room[:, : self._length] = self._values[:, : self._length]
            self._values = room


def surprise(logits: np.ndarray, token: int) -> float:
    """`-ln softmax(logits)[token]` of float[vocabulary], in nats; at most as large as float32 allows."""
    most = float(logits.max())
    total = float(np.exp(logits - np.float32(most)).sum(dtype=np.float64))
    return float(min(np.log(total) + most - float(logits[token]), np.finfo(np.float32).max))
