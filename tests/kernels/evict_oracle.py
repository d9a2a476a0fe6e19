"""The selection `evict` in float64, token by token, from docs/cached-attention.md."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from attention_oracle import Form, rotate, split

from effc.ir.dialect.selections import EvictSelection


@dataclass
class Kept:
    """A token that a key head keeps."""

    number: int
    key: np.ndarray
    value: np.ndarray


@dataclass
class RowOracle:
    """One row without padding in front of it: what every key head keeps, and all of its queries."""

    form: Form
    evict: EvictSelection
    dtype: np.dtype
    kept: list[list[Kept]] = field(default_factory=list)
    queries: list[np.ndarray | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kept = [[] for _ in range(self.form.kv_heads)]

    def step(self, feeds: dict[str, np.ndarray], valid: np.ndarray) -> np.ndarray:
        """The result [S, H * E] of new tokens [1, S, ..], of which `valid` [S] says which count."""
        form, before = self.form, len(self.queries)
        q, k, v = (
            split(feeds[name], heads)[0]
            for name, heads in (("query", form.heads), ("key", form.kv_heads), ("value", form.kv_heads))
        )
        if form.rotary != "none":
            q, k = (rotate(x[None], feeds["cos"], feeds["sin"], form)[0] for x in (q, k))
        self.queries += [q[:, i] if valid[i] else None for i in range(len(valid))]
        fresh = [
            [Kept(before + i, k[head, i], v[head, i]) for i in np.flatnonzero(valid)] for head in range(form.kv_heads)
        ]
        result = self._attend(q, before, fresh)
        for head, new in enumerate(fresh):
            candidates = self.kept[head] + new
            if len(candidates) > self.evict.budget + self.evict.block:
                candidates = [candidates[i] for i in self._chosen(head, candidates)]
            self.kept[head] = [Kept(one.number, self._stored(one.key), self._stored(one.value)) for one in candidates]
        return result

    def _stored(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32).astype(self.dtype).astype(np.float64)

    def _probabilities(self, query: np.ndarray, number: int, tokens: list[Kept]) -> np.ndarray:
        """Of every token, those after `number` get none."""
        form = self.form
        scores = np.array([one.key @ query for one in tokens]) * form.scale
        if form.softcap:
            scores = form.softcap * np.tanh(scores / form.softcap)
        seen = np.array([one.number <= number for one in tokens])
        weights = np.where(seen, np.exp(scores - scores[seen].max(initial=-1e9)), 0)
        return np.asarray(weights / max(weights.sum(), 1e-300))

    def _attend(self, q: np.ndarray, before: int, fresh: list[list[Kept]]) -> np.ndarray:
        form = self.form
        group, count = form.heads // form.kv_heads, q.shape[1]
        result = np.zeros((count, form.heads, form.value_size))
        for i, h in np.ndindex(count, form.heads):
            tokens = self.kept[h // group] + fresh[h // group]
            if not tokens:
                continue
            weights = self._probabilities(q[h, i], before + i, tokens)
            result[i, h] = weights @ np.array([one.value for one in tokens])
        return result.reshape(count, form.heads * form.value_size)

    def _chosen(self, head: int, candidates: list[Kept]) -> list[int]:
        form, evict, total = self.form, self.evict, len(self.queries)
        group = form.heads // form.kv_heads
        votes = np.zeros(len(candidates))
        for number in range(max(0, total - evict.recent), total):
            query = self.queries[number]
            if query is not None:
                for one in query[head * group : (head + 1) * group]:
                    votes += self._probabilities(one, number, candidates) / group
        numbers = np.array([one.number for one in candidates])
        votes = votes[numbers < total - evict.recent]
        half = evict.pool // 2
        padded = np.pad(votes, half)
        pooled = np.array([padded[i : i + evict.pool].mean() for i in range(len(votes))])
        forced = [i for i, n in enumerate(numbers) if n < evict.sinks or n >= total - evict.recent]
        others = [i for i in range(len(candidates)) if i not in forced]
        best = sorted(others, key=lambda i: (-pooled[i], i))[: evict.budget - len(forced)]
        return sorted(forced + best)
