"""The selection `retain` in float64, token by token, from docs/cached-attention.md."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from attention_feeds import angles
from attention_oracle import Form, rotate, split

from effc.ir.dialect.selections import RetainSelection


def retained(retain: RetainSelection, numbers: list[int], scores: np.ndarray, incoming: int) -> list[int]:
    """Which of the kept tokens stay before so many new ones come; scores by token."""
    if len(numbers) + incoming <= retain.budget:
        return numbers
    room = max(incoming, retain.block)
    top = max(0, retain.budget - retain.sinks - retain.recent - room)
    stays = set(sorted(numbers, key=lambda n: (-scores[n], -n))[:top])
    stays |= {n for n in numbers if n < retain.sinks}
    for number in reversed(numbers):
        if len(stays) < retain.budget - room:
            stays.add(number)
    return sorted(stays)


@dataclass
class RowOracle:
    """One row without padding in front of it."""

    form: Form
    retain: RetainSelection
    dtype: np.dtype
    numbers: list[int] = field(default_factory=list)
    keys: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    done: int = 0

    def step(self, feeds: dict[str, np.ndarray], valid: np.ndarray) -> np.ndarray:
        """The result [S, H * E] of new tokens [1, S, ..], of which `valid` [S] says which count."""
        form = self.form
        q, k, v = (
            split(feeds[name], heads)[0]
            for name, heads in (("query", form.heads), ("key", form.kv_heads), ("value", form.kv_heads))
        )
        fresh = np.flatnonzero(valid)
        self._keep(retained(self.retain, self.numbers, feeds["scores"][0], len(fresh)))
        old = len(self.numbers)
        keys = np.array([*self.keys, *(k[:, i] for i in fresh)]).reshape(-1, form.kv_heads, form.head_size)
        values = [*self.values, *(v[:, i] for i in fresh)]
        turned = self._turned(keys.transpose(1, 0, 2), np.arange(len(keys)))
        result = np.zeros((len(valid), form.heads * form.value_size))
        for i, place in enumerate(old + np.cumsum(valid) - valid):  # padding sees what is before it
            query = self._turned(q[:, i : i + 1], np.array([min(place, self.retain.budget - 1)]))[:, 0]
            if seen := int(place + valid[i]):
                result[i] = self._attend(query, turned[:, :seen], np.array(values[:seen]))
        self.numbers += [self.done + int(i) for i in fresh]
        self.keys += [self._stored(k[:, i]) for i in fresh]
        self.values += [self._stored(v[:, i]) for i in fresh]
        self.done += len(valid)
        return result

    def _keep(self, numbers: list[int]) -> None:
        places = [self.numbers.index(number) for number in numbers]
        self.numbers = numbers
        self.keys, self.values = ([tokens[place] for place in places] for tokens in (self.keys, self.values))

    def _stored(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32).astype(self.dtype).astype(np.float64)

    def _turned(self, x: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Rows [heads, n, D] at their places."""
        cos, sin = angles(self.form, places[None])
        return rotate(x[None], cos, sin, self.form)[0]

    def _attend(self, query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """[H * E] of queries [H, D], keys [K, n, D] and values [n, K, E]."""
        form, results = self.form, []
        for h in range(form.heads):
            head = h // (form.heads // form.kv_heads)
            scores = keys[head] @ query[h] * form.scale
            if form.softcap:
                scores = form.softcap * np.tanh(scores / form.softcap)
            weights = np.exp(scores - scores.max())
            results.append(weights / weights.sum() @ values[:, head])
        return np.concatenate(results)
