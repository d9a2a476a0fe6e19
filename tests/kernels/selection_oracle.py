"""Which tokens a step reads with blocks or single tokens, in float64, from docs/cached-attention.md, "Selection"."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from attention_oracle import Form
from selected_cache import Reads
from stored_tokens import RowTokens, StoredTokens

from effc.ir.dialect.cache_storage import HeadSizes, PageStorage
from effc.ir.dialect.selections import PageSelection, TopKSelection

Blocks = PageSelection | TopKSelection


def block_of(selection: Blocks) -> int:
    """Tokens of a block."""
    return selection.block if isinstance(selection, PageSelection) else 1


def blocks_of(selection: Blocks, tokens: int) -> int:
    """Blocks to choose from, of so many cached tokens."""
    return max(0, tokens - selection.sinks - selection.recent) // block_of(selection)


def wanted_of(selection: Blocks, blocks: int) -> int:
    """Blocks that are read."""
    return max(1, selection.budget // block_of(selection), math.ceil(float(np.float32(selection.share)) * blocks))


def expected_reads(stored: StoredTokens) -> Reads:
    """What every row and key head reads in the next step."""
    form, reads = stored.cache.form, {}
    for row, of in enumerate(stored.rows):
        for head in range(form.kv_heads):
            reads[row, head] = np.flatnonzero(_read(stored, of, row, head))
    return reads


def _read(stored: StoredTokens, of: RowTokens, row: int, head: int) -> np.ndarray:
    """Bool [n]."""
    form, selection = stored.cache.form, stored.cache.selection
    assert isinstance(selection, Blocks)
    total = len(of.valid)
    blocks = blocks_of(selection, total - 1)
    if total - 1 < selection.dense_below or wanted_of(selection, blocks) >= blocks:
        return np.ones(total, bool)
    if isinstance(selection, TopKSelection):
        middle = slice(selection.sinks, selection.sinks + blocks)
        given = votes(form, of.queries, of.keys[:, middle], of.valid[middle])
        chosen = np.sort(np.lexsort((np.arange(blocks), -given))[: wanted_of(selection, blocks)])
    else:
        group = form.heads // form.kv_heads
        own = of.queries[head * group : (head + 1) * group]
        chosen = chosen_blocks(form, selection, own, _bounds(stored, of, row, head, blocks))
    return read_slots(selection, chosen, blocks, total)


def _bounds(stored: StoredTokens, of: RowTokens, row: int, head: int, blocks: int) -> np.ndarray:
    """Of each block, [blocks, any, 2 * D]; means are bounds that have no width."""
    cache, selection = stored.cache, stored.cache.selection
    assert isinstance(selection, PageSelection)
    if not isinstance(cache.kept_as, PageStorage):
        return dense_bounds(selection, of.keys[head], blocks, stored.cache.past[2].dtype)[:, None]
    sizes = HeadSizes(cache.form.kv_heads, cache.form.head_size, cache.form.value_size)
    return np.stack([page_bounds(cache.kept_as, sizes, page.tobytes()) for page in cache.past[2][row, head, :blocks]])


def dense_bounds(selection: PageSelection, keys: np.ndarray, blocks: int, dtype: np.dtype) -> np.ndarray:
    """Minima and maxima [blocks, 2 * D] of keys [tokens, D] as the cache has them, or their mean twice."""
    first = selection.sinks
    parts = keys[first : first + blocks * selection.block].reshape(blocks, selection.block, -1)
    found = [parts.min(axis=1), parts.max(axis=1)] if selection.reach else [parts.mean(axis=1)] * 2
    return np.concatenate(found, axis=1).astype(dtype)


@lru_cache(maxsize=4096)
def page_bounds(storage: PageStorage, sizes: HeadSizes, page: bytes) -> np.ndarray:
    """Least and largest value that any group of a channel can have, [groups, 2 * D], from the parameters of a page."""
    found, at = [], 0
    tokens = (storage.salient, storage.page - storage.salient)
    for name, length in storage.page_parts(sizes).items():
        if name.startswith("key parameters"):
            index = int(name[-1])
            groups = math.ceil(tokens[index] / storage.key_group) if storage.key_group else 1
            unit = float(np.frombuffer(page, np.float32, 1, at)[0])
            count = sizes.head_size * groups
            both = np.frombuffer(page, np.float16, 2 * count, at + 4).astype(np.float64) * unit
            scale, least = both[:count].reshape(-1, groups).T, both[count:].reshape(-1, groups).T
            found.append(np.concatenate([least, least + scale * (2 ** storage.key_bits[index] - 1)], axis=1))
        at += length
    return np.concatenate(found)


def block_scores(query: np.ndarray, bounds: np.ndarray, reach: float) -> np.ndarray:
    """From the middle of dot(query [D], key) for keys between bounds [.., 2 * D] towards its largest value."""
    least, most = np.split(bounds.astype(np.float64), 2, axis=-1)
    middle, half = (least + most) / 2, (most - least) / 2
    return np.asarray(middle @ query + reach * (half @ np.abs(query)))


def chosen_blocks(form: Form, selection: PageSelection, queries: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The blocks that a key head reads.

    Args:
        form: Of the attention.
        selection: How many.
        queries: [G, D], rotated.
        bounds: [blocks, any, 2 * D].
    """
    reach = float(np.float32(selection.reach))
    most = np.array([block_scores(q, bounds, reach).max(axis=1) for q in queries]) * form.scale
    top = most.max(axis=1, keepdims=True)
    ranks = (most - top - np.log(np.exp(most - top).sum(axis=1, keepdims=True))).max(axis=0)
    order = np.lexsort((np.arange(len(bounds)), -ranks))
    return np.sort(order[: wanted_of(selection, len(bounds))])


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


def read_slots(selection: Blocks, chosen: np.ndarray, blocks: int, total: int) -> np.ndarray:
    """Bool [total]: what is read."""
    read, block = np.zeros(total, bool), block_of(selection)
    read[: selection.sinks] = True
    read[selection.sinks + blocks * block :] = True
    for begin in selection.sinks + chosen * block:
        read[begin : begin + block] = True
    return read
