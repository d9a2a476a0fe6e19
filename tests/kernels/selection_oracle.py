"""Which tokens a step reads, in float64, from docs/cached-attention.md, section "Selection"."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from attention_oracle import Form

from effc.ir.dialect.cache_storage import HeadSizes, PageStorage


@dataclass(frozen=True)
class Selection:
    """Attributes of a selection of blocks, or of tokens: blocks of one."""

    kind: str = "pages"
    sinks: int = 4
    recent: int = 12
    block: int = 16
    budget: int = 0
    share: float = 0.0
    dense_below: int = 0
    refresh: int = 0
    similarity: float = 0.0
    reach: float = 0.6

    def attributes(self) -> dict[str, object]:
        names = ("sinks", "recent", "block", "budget", "share", "refresh", "similarity", "reach")
        return {
            "selection": self.kind,
            "dense_below": self.dense_below,
            **{f"select_{name}": getattr(self, name) for name in names},
        }

    def blocks(self, tokens: int) -> int:
        return max(0, tokens - self.sinks - self.recent) // self.block

    def wanted(self, blocks: int) -> int:
        return max(1, self.budget // self.block, math.ceil(float(np.float32(self.share)) * blocks))


def dense_bounds(selection: Selection, keys: np.ndarray, blocks: int) -> np.ndarray:
    """Minima and maxima [K, blocks, 2 * D] of keys [K, tokens, D] as the cache has them."""
    heads, _, size = keys.shape
    first = selection.sinks
    parts = keys[:, first : first + blocks * selection.block].reshape(heads, blocks, selection.block, size)
    return np.concatenate([parts.min(axis=2), parts.max(axis=2)], axis=2)


def page_bounds(storage: PageStorage, sizes: HeadSizes, page: np.ndarray) -> np.ndarray:
    """Least and largest value that any group of a channel can have, [groups, 2 * D], from the parameters of a page."""
    found, at = [], 0
    tokens = (storage.salient, storage.page - storage.salient)
    for name, length in storage.page_parts(sizes).items():
        if name.startswith("key parameters"):
            index = int(name[-1])
            groups = math.ceil(tokens[index] / storage.key_group) if storage.key_group else 1
            unit = float(page[at : at + 4].view(np.float32)[0])
            count = sizes.head_size * groups
            both = page[at + 4 : at + 4 + 4 * count].view(np.float16).astype(np.float64) * unit
            scale, least = both[:count].reshape(-1, groups).T, both[count:].reshape(-1, groups).T
            found.append(np.concatenate([least, least + scale * (2 ** storage.key_bits[index] - 1)], axis=1))
        at += length
    return np.concatenate(found)


def block_scores(query: np.ndarray, bounds: np.ndarray, reach: float) -> np.ndarray:
    """From the middle of dot(query [D], key) for keys between bounds [.., 2 * D] towards its largest value."""
    least, most = np.split(bounds.astype(np.float64), 2, axis=-1)
    middle, half = (least + most) / 2, (most - least) / 2
    return np.asarray(middle @ query + reach * (half @ np.abs(query)))


def chosen_blocks(form: Form, selection: Selection, queries: np.ndarray, bounds: list[np.ndarray]) -> np.ndarray:
    """The blocks that a key head reads.

    Args:
        form: Of the attention.
        selection: How many.
        queries: [G, D], rotated.
        bounds: Of each block, [any, 2 * D].
    """
    reach = float(np.float32(selection.reach))
    most = np.array([[block_scores(q, one, reach).max() for one in bounds] for q in queries]) * form.scale
    top = most.max(axis=1, keepdims=True)
    ranks = (most - top - np.log(np.exp(most - top).sum(axis=1, keepdims=True))).max(axis=0)
    order = np.lexsort((np.arange(len(bounds)), -ranks))
    return np.sort(order[: selection.wanted(len(bounds))])


def votes(form: Form, queries: np.ndarray, keys: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """What all heads together give each token: the sum of their softmaxes.

    Args:
        form: Of the attention.
        queries: [H, D], rotated.
        keys: [K, tokens, D] of the tokens to choose from.
        valid: [tokens].
    """
    total = np.zeros(keys.shape[1])
    for head, query in enumerate(queries):
        scores = keys[head // (form.heads // form.kv_heads)] @ query * form.scale
        if form.softcap:
            scores = form.softcap * np.tanh(scores / form.softcap)
        shares = np.where(valid, np.exp(scores - scores[valid].max()), 0)
        total += shares / shares.sum()
    return total


def read_slots(selection: Selection, chosen: np.ndarray, blocks: int, start: int, total: int) -> np.ndarray:
    """Bool [total]: what is read."""
    slots = np.zeros(total, bool)
    middle = start + selection.sinks
    slots[start:middle] = True
    slots[middle + blocks * selection.block :] = True
    for block in chosen:
        slots[middle + block * selection.block : middle + (block + 1) * selection.block] = True
    return slots
