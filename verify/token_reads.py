"""Which cached tokens an engine reads as it decodes: how many of them, in each layer and head, and where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np

from effc.errors import UsageError
from effc.kernels.read_log import TokenReads, logged_reads
from effc.runtime.session import Engine
from effc.verify.steps import CHUNK, token_feed

STEPS = 32
"""Tokens at the end of the text that are read one by one."""
BINS = 128
"""Parts of the text whose reading is told apart."""


def measure_reads(
    engine: Engine,
    ids: Sequence[int],
    *,
    steps: int = STEPS,
    chunk: int = CHUNK,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Read a text, its last tokens one by one, and count which tokens these steps read.

    Args:
        engine: A causal language model whose attention our kernels compute.
        ids: The text; BOS where the model wants it.
        steps: Tokens read one by one.
        chunk: Tokens of the text read in one run before.
        progress: Called with a line, and zeros.

    Returns:
        `tokens` of the text, `steps`; `layers`: `node`, `heads` (for each key head the mean share of the tokens that
        were read), `least` and `most` (of any step and head) and `map`: the share of tokens that steps and heads read
        in each of at most `BINS` equal parts of the text.

    Raises:
        UsageError: A text of no more than `steps` tokens, or an engine whose attention is not ours.
        EngineError: The engine carries no cache.
    """
    if len(ids) <= steps:
        raise UsageError(f"reads: the text has {len(ids)} tokens, more than {steps} are needed.")
    if progress is not None:
        progress(f"tokens that are read at {len(ids)} tokens", 0, 0)
    array = np.asarray(ids, np.int64)[None]
    state = engine.new_state(1, max_length=len(ids))
    first = len(ids) - steps
    for start in range(0, first, chunk):
        end = min(first, start + chunk)
        state.run(token_feed(engine, array[:, start:end], start), [])
    with logged_reads() as found:
        for at in range(first, len(ids)):
            state.run(token_feed(engine, array[:, at : at + 1], at), [])
    if not found:
        raise UsageError(
            f"{engine.folder}: onnxruntime's own operators compute its attention, so what it reads is not known. "
            "Write a native engine with the pass cached-attention, kv-cache or sparse-attention."
        )
    found.sort(key=_layer_order(found))
    layers = [_layer(node, list(reads), len(ids)) for node, reads in groupby(found, attrgetter("node"))]
    return {"tokens": len(ids), "steps": steps, "layers": layers}


def _layer_order(found: Iterable[TokenReads]) -> Callable[[TokenReads], int]:
    """The order in which nodes ran first."""
    order = {node: place for place, node in enumerate(dict.fromkeys(one.node for one in found))}
    return lambda one: order[one.node]


def _layer(node: str, reads: Sequence[TokenReads], tokens: int) -> dict[str, Any]:
    shares: dict[int, list[float]] = {}
    for one in reads:
        shares.setdefault(one.head, []).append(one.read / one.tokens)
    every = [share for head in shares.values() for share in head]
    return {
        "node": node,
        "heads": [float(np.mean(shares[head])) for head in sorted(shares)],
        "least": min(every),
        "most": max(every),
        "map": _map(reads, tokens),
    }


def _map(reads: Sequence[TokenReads], tokens: int) -> list[float]:
    """How often each token was read of those times it was there, averaged over parts of the text."""
    read, there = np.zeros(tokens), np.zeros(tokens)
    for one in reads:
        there[: one.tokens] += 1
        for begin, end in one.runs:
            read[begin:end] += 1
    edges = np.linspace(0, tokens, min(BINS, tokens) + 1).astype(int)
    sums = (np.add.reduceat(array, edges[:-1]) for array in (read, there))
    return [float(part / whole) for part, whole in zip(*sums, strict=True)]
