"""A paged cache, token by token, from docs/cached-attention.md; only the bytes of a page come from the kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from attention_oracle import Form, probabilities, rotate, split, visible

from effc.kernels import kv_page


@dataclass(frozen=True)
class Pages:
    """Attributes of the storage."""

    sinks: int = 4
    recent: int = 12
    page: int = 32
    key_scheme: str = "channel"
    value_scheme: str = "token"
    key_bits: tuple[int, int] = (8, 8)
    value_bits: tuple[int, int] = (8, 8)
    key_group: int = 0
    value_group: int = 0
    salient: int = 32
    importance: str = "none"

    @property
    def two_classes(self) -> bool:
        return 0 < self.salient < self.page

    @property
    def statistics(self) -> bool:
        return self.salient < self.page or self.key_scheme == "balanced"

    @property
    def places(self) -> int:
        return self.sinks + self.recent + self.page

    def pages(self, tokens: int) -> int:
        return max(0, (tokens - self.sinks - self.recent) // self.page)


class PageCodec:
    """Encodes and decodes single pages."""

    def __init__(self, form: Form, pages: Pages) -> None:
        names = ("page", "key_bits", "value_bits", "salient", "key_scheme", "value_scheme", "key_group", "value_group")
        parts = {name: getattr(pages, name) for name in names}
        self.pages = pages
        self.spec = kv_page.PageSpec(form.head_size, form.value_size, **parts)
        self.bytes = kv_page.page_bytes(self.spec)

    def encode(
        self, keys: np.ndarray, values: np.ndarray, valid: np.ndarray, importance: np.ndarray, query_max: np.ndarray
    ) -> np.ndarray:
        floats = [a.astype(np.float32)[None] for a in (keys, values, importance)]
        return kv_page.encode(self.spec, floats[0], floats[1], valid[None], floats[2], query_max.astype(np.float32))[0]

    def decode(self, page: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values in the order of the tokens."""
        keys, values = (array[0] for array in kv_page.decode(self.spec, page[None]))
        if self.pages.two_classes:
            marks = np.unpackbits(page, bitorder="little")[: self.pages.page].astype(bool)
            order = np.argsort(np.concatenate([np.flatnonzero(marks), np.flatnonzero(~marks)]))
            keys, values = keys[order], values[order]
        return keys, values


def splitmix64(x: int) -> int:
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def probes(count: int, past: int) -> list[int]:
    """Which of the new tokens of a row probe."""
    if count <= 32:
        return list(range(count))
    share = -(-count // 20)
    rest = count - share
    chosen = []
    for i in range(share):
        begin, end = i * rest // share, (i + 1) * rest // share
        chosen.append(begin + splitmix64(count * 2**32 + past + i) % (end - begin))
    return chosen + list(range(rest, count))


@dataclass
class Row:
    """All tokens of a row as the cache gives them back, and its statistics."""

    keys: np.ndarray
    values: np.ndarray
    sums: np.ndarray
    counts: np.ndarray
    query_max: np.ndarray
    pages: list[list[np.ndarray]] = field(default_factory=list)


class PagedCache:
    """A cache of several rows that grows by steps."""

    def __init__(self, form: Form, pages: Pages, dtype: np.dtype, batch: int) -> None:
        self.form, self.pages, self.dtype = form, pages, dtype
        self.codec = PageCodec(form, pages)
        heads = form.kv_heads
        self.rows = [
            Row(
                np.zeros((heads, 0, form.head_size)),
                np.zeros((heads, 0, form.value_size)),
                np.zeros((heads, 0)),
                np.zeros((heads, 0)),
                np.zeros((heads, form.head_size)),
            )
            for _ in range(batch)
        ]

    def step(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """Attention of a step [B, S, H * E]; the cache follows."""
        results = [self._step(b, {name: a[b : b + 1] for name, a in feeds.items()}) for b in range(len(self.rows))]
        return np.concatenate(results)

    def _step(self, b: int, feeds: dict[str, np.ndarray]) -> np.ndarray:
        form, row = self.form, self.rows[b]
        valid, seq = feeds["valid"], feeds["query"].shape[1]
        total = valid.shape[1]
        start = int(np.argmax(valid[0])) if valid.any() else total
        q, k, v = (
            split(feeds["query"], form.heads),
            split(feeds["key"], form.kv_heads),
            split(feeds["value"], form.kv_heads),
        )
        if "cos" in feeds:
            q, k = rotate(q, feeds["cos"], feeds["sin"], form), rotate(k, feeds["cos"], feeds["sin"], form)
        own = min(seq, total - start)
        padding = [np.zeros((form.kv_heads, start, a.shape[2])) for a in (row.keys, row.values)]
        new = slice(seq - own, seq)
        keys = np.concatenate([padding[0], row.keys, k[0][:, new]], axis=1)
        values = np.concatenate([padding[1], row.values, v[0][:, new]], axis=1)
        weights = probabilities(form, q, keys[None], valid, feeds.get("bias"))
        result = weights @ np.repeat(values, form.heads // form.kv_heads, axis=0)[None]
        self._count(row, q, weights, visible(form, valid, seq)[0], valid[0], start, own)
        self._store(row, keys[:, start:], values[:, start:], valid[0, start:], own)
        return result.transpose(0, 2, 1, 3).reshape(1, seq, form.heads * form.value_size)

    def _count(
        self, row: Row, q: np.ndarray, weights: np.ndarray, seen: np.ndarray, valid: np.ndarray, start: int, own: int
    ) -> None:
        seq, total = seen.shape
        heads = self.form.kv_heads
        tokens = total - start
        for name in ("sums", "counts"):
            grown = np.zeros((heads, tokens))
            grown[:, : tokens - own] = getattr(row, name)
            setattr(row, name, grown)
        usable = valid[total - seq :]
        if usable.any():
            most = np.abs(q[0][:, usable]).max(axis=1).reshape(heads, -1, q.shape[3]).max(axis=1)
            row.query_max = np.maximum(row.query_max, most)
        for probe in probes(own, tokens - own):
            i = seq - own + probe
            if usable[i]:
                row.sums += weights[0, :, i, start:].reshape(heads, -1, tokens).sum(axis=1)
                row.counts += seen[i, start:]

    def _store(self, row: Row, keys: np.ndarray, values: np.ndarray, valid: np.ndarray, own: int) -> None:
        pages, tokens = self.pages, keys.shape[1]
        old, count = pages.pages(tokens - own), pages.pages(tokens)
        for p in range(old, count):
            span = slice(pages.sinks + p * pages.page, pages.sinks + (p + 1) * pages.page)
            made = []
            for head in range(self.form.kv_heads):
                importance = self._importance(row, head, span, tokens)
                page = self.codec.encode(
                    keys[head, span], values[head, span], valid[span], importance, row.query_max[head]
                )
                made.append(page)
            row.pages.append(made)
        exact = np.arange(tokens)
        rounded = exact >= tokens - own
        keys[:, rounded] = keys[:, rounded].astype(np.float32).astype(self.dtype)
        values[:, rounded] = values[:, rounded].astype(np.float32).astype(self.dtype)
        for p in range(old, count):
            span = slice(pages.sinks + p * pages.page, pages.sinks + (p + 1) * pages.page)
            for head in range(self.form.kv_heads):
                keys[head, span], values[head, span] = self.codec.decode(row.pages[p][head])
        row.keys, row.values = keys, values

    def _importance(self, row: Row, head: int, span: slice, tokens: int) -> np.ndarray:
        sums, counts = row.sums[head, span].astype(np.float32), row.counts[head, span].astype(np.float32)
        if self.pages.importance == "normalised":
            return np.where(counts > 0, sums / np.maximum(counts, 1), 0)
        if self.pages.importance == "causal-count":
            return sums / (tokens - np.arange(span.start, span.stop)).astype(np.float32)
        return sums

    def places(self, b: int) -> np.ndarray:
        """The token at each used place of the exact buffer."""
        tokens = self.rows[b].keys.shape[1]
        after = self.pages.sinks + self.pages.pages(tokens) * self.pages.page
        return np.array([*range(min(self.pages.sinks, tokens)), *range(after, tokens)], int)

    def empty(self, capacity: int = 0) -> list[np.ndarray]:
        """Tensors of the past before the first step, with room for some pages."""
        form, pages, batch = self.form, self.pages, len(self.rows)
        if form.window:
            capacity = form.window // pages.page + 2
        tensors = [
            np.zeros((batch, form.kv_heads, pages.places, form.head_size), self.dtype),
            np.zeros((batch, form.kv_heads, pages.places, form.value_size), self.dtype),
            np.zeros((batch, form.kv_heads, capacity, self.codec.bytes), np.uint8),
        ]
        if pages.statistics:
            tensors.append(np.zeros((batch, form.kv_heads, 2 * pages.places + form.head_size), np.float32))
        return tensors
