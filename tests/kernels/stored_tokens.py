"""The tokens that a cache holds, in float64, and attention of the next token over any of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from attention_feeds import angles, part
from attention_oracle import Form, rotate, split
from lowrank_oracle import Prefix, keys_of
from paged_cache_oracle import PageCodec
from selected_cache import Cache, Reads

from effc.ir.dialect.cache_storage import PageStorage
from effc.ir.dialect.selections import LowRankSelection

NONE = np.zeros(0, int)


@dataclass
class RowTokens:
    """A row as its next token finds it, that token included, from its first valid one.

    Attributes:
        queries: [H, D] of the next token.
        keys: [K, n, D], rotated where the op rotates them by their positions.
        values: [K, n, E].
        valid: [n].
    """

    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    valid: np.ndarray


class StoredTokens:
    """All rows of a cache before a step of one token.

    A dense cache without a ring, and a coded one, are read back. Of a cache that loses or moves tokens, those of the
    text are rounded as the cache rounds them.
    """

    def __init__(self, cache: Cache, feeds: dict[str, np.ndarray]) -> None:
        self.cache = cache
        self.rows = [self._row(feeds, row) for row in range(len(feeds["valid"]))]

    def _row(self, feeds: dict[str, np.ndarray], row: int) -> RowTokens:
        valid = feeds["valid"][row]
        start, at = int(np.argmax(valid)), self.cache.tokens
        own = {name: array[row : row + 1] for name, array in feeds.items()}
        q, k, v = self._operands(part(own, at, at + 1))
        if isinstance(self.cache.kept_as, PageStorage):
            keys, values = self._decoded(self.cache.kept_as, row, at - start)
        elif self.cache.places:
            _, *both = self._operands(part(own, 0, at))
            dtype = self.cache.past[0].dtype
            keys, values = (x[:, start:].astype(np.float32).astype(dtype).astype(np.float64) for x in both)
        else:
            keys, values = (self.cache.past[i][row, :, start:at].astype(np.float64) for i in (0, 1))
            if isinstance(self.cache.selection, LowRankSelection):
                keys, values = self._with_prefix(keys, values)
        joined = (np.concatenate(pair, axis=1) for pair in ((keys, k), (values, v)))
        return RowTokens(q[:, 0], *joined, valid[start : at + 1])

    def _operands(self, step: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries [H, S, D], keys and values [K, S, ..] of a step of one row."""
        form = self.cache.form
        q, k = split(step["query"], form.heads), split(step["key"], form.kv_heads)
        if self.cache.optional:
            q, k = (rotate(x, step["cos"], step["sin"], form) for x in (q, k))
        return q[0], k[0], split(step["value"], form.kv_heads)[0]

    def _with_prefix(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """With what inputs stand for in the first places."""
        inputs = {name: array for name, array in self.cache.constants.items() if not name.startswith("far")}
        prefix = Prefix(**inputs)
        keys = np.concatenate([keys_of(self.cache.form, prefix), keys[:, prefix.count :]], axis=1)
        return keys, np.concatenate([prefix.values[0].astype(np.float64), values[:, prefix.count :]], axis=1)

    def _decoded(self, storage: PageStorage, row: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        form, past = self.cache.form, self.cache.past
        count = max(0, tokens - storage.sinks - storage.recent) // storage.page
        pages = [[decoded(form, storage, page.tobytes()) for page in head[:count]] for head in past[2][row]]
        both = []
        for which, size in enumerate((form.head_size, form.value_size)):
            exact = past[which][row].astype(np.float64)
            middle = np.array([[page[which] for page in head] for head in pages], np.float64)
            middle = middle.reshape(form.kv_heads, count * storage.page, size)
            end = max(storage.sinks, tokens - count * storage.page)
            parts = [exact[:, : storage.sinks], middle, exact[:, storage.sinks : end]]
            both.append(np.concatenate(parts, axis=1)[:, :tokens])
        return both[0], both[1]

    def attention(self, reads: Reads) -> np.ndarray:
        """Results [B, H * E] over what rows and key heads read; 0 where that is nothing."""
        form = self.cache.form
        return np.stack(
            [
                np.concatenate([self._attend(row, head, reads.get((row, head), NONE)) for head in range(form.kv_heads)])
                for row in range(len(self.rows))
            ]
        )

    def everything(self) -> Reads:
        """Reads of all tokens."""
        heads = range(self.cache.form.kv_heads)
        return {(row, head): np.arange(len(one.valid)) for row, one in enumerate(self.rows) for head in heads}

    def _attend(self, row: int, head: int, tokens: np.ndarray) -> np.ndarray:
        """[G * E]."""
        form, of = self.cache.form, self.rows[row]
        read = tokens[of.valid[tokens]]
        group = form.heads // form.kv_heads
        if not len(read):
            return np.zeros(group * form.value_size)
        queries, keys = of.queries[head * group : (head + 1) * group], of.keys[head, read]
        if self.cache.selection.turns_by_place:
            queries, keys = turned(form, queries, keys)
        scores = queries @ keys.T * form.scale
        if form.softcap:
            scores = form.softcap * np.tanh(scores / form.softcap)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=1, keepdims=True) @ of.values[head, read]).ravel()


def queries_of(form: Form, feeds: dict[str, np.ndarray], at: int) -> np.ndarray:
    """Rotated queries [H, D] of one token of the first row."""
    new = part(feeds, at, at + 1)
    q = split(new["query"], form.heads)
    return np.asarray((rotate(q, new["cos"], new["sin"], form) if "cos" in new else q)[0, :, 0])


@lru_cache(maxsize=4096)
def decoded(form: Form, storage: PageStorage, page: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of a page in the order of its tokens."""
    return PageCodec(form, storage).decode(np.frombuffer(page, np.uint8))


def turned(form: Form, queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys [n, D] by their places, and queries [G, D] by that of the last one."""
    cos, sin = angles(form, np.arange(len(keys))[None])
    keys = rotate(keys[None, None], cos, sin, form)[0, 0]
    return rotate(queries[None, :, None], cos[:, -1:], sin[:, -1:], form)[0, :, 0], keys
