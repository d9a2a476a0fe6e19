"""Perplexity of two engines over one text at several context lengths, and where in a context they lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effc.errors import UsageError
from effc.runtime.limits import token_limit
from effc.runtime.session import Engine
from effc.verify.metrics import finite, negative_log_likelihood
from effc.verify.steps import CHUNK
from effc.verify.text import Predictions, begin_token, common_tokenizer, perplexity, predictions, text_ids, windows

FIRST_EDGE = 128
"""Positions below this one share a bucket; each later bucket is as long as all before it together."""

Progress = Callable[[str, int, int], None]


def check_lengths(what: str, lengths: Sequence[int], engine: Engine, reference: Engine, least: int = 2) -> None:
    """Refuse lengths the engines cannot take.

    Raises:
        UsageError: The task is not causal-lm, a length is too small, or beyond the positions of the model.
    """
    if engine.task != "causal-lm":
        raise UsageError(f"{engine.folder}: its task is {engine.task}; {what} measures causal-lm engines only.")
    limits = [token_limit(one.manifest) for one in (engine, reference)]
    limit = min((one for one in limits if one is not None), default=None)
    for length in lengths:
        if length < least:
            raise UsageError(f"{what} {length}: give at least {least} tokens.")
        if limit is not None and length > limit:
            raise UsageError(f"{what} {length}: the model has positions for {limit} tokens. Give at most {limit}.")


def measure_contexts(
    engine: Engine,
    reference: Engine,
    contexts: Sequence[int],
    *,
    text: str | Path | None = None,
    tokens: int = 8192,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure perplexity at each context length over the same tokens.

    The text is cut to whole windows of the longest context, then into windows of each length that do not overlap (see
    `effc.verify.text.windows`).

    Args:
        engine: The engine in question, a causal language model.
        reference: What it is compared with.
        contexts: Tokens in one window, each length once.
        text: Text or a UTF-8 file; None for the topics of Python's own help.
        tokens: Most tokens of it to use, raised to the longest context where that is more.
        chunk: Tokens of a window read in one run.
        progress: Called with a line before each length, and zeros.

    Returns:
        One object per length, in the order given: `context`, perplexities `source`, `engine` and their `ratio` (null is
        infinite), `tokens` predicted, and `positions`: mean losses in nats `source`, `engine` of the `tokens` at
        positions `begin` up to, not including, `end` of a window.

    Raises:
        UsageError: A length the engines cannot take, or a text shorter than the longest.
        InputError: The text cannot be read.
    """
    if not contexts:
        return []
    check_lengths("context", contexts, engine, reference)
    longest, bos = max(contexts), begin_token(engine, reference)
    config = {**engine.manifest.config, **reference.manifest.config}
    ids = text_ids(text, max(tokens, longest), common_tokenizer(engine, reference), config)
    ids = _whole_windows(ids, longest, bos)
    figures = []
    for context in contexts:
        if progress is not None:
            progress(f"perplexity at a context of {context} tokens", 0, 0)
        losses = _Losses.empty(context)
        for window in windows(ids, context, bos):
            for found in predictions(engine, reference, window, chunk=chunk):
                losses.add(found)
        figures.append({"context": context, **losses.figures()})
    return figures


def _whole_windows(ids: list[int], longest: int, bos: int | None) -> list[int]:
    """The tokens that fill windows of the longest context, without a BOS of their own."""
    ids = ids[1:] if bos is not None and ids[:1] == [bos] else ids
    width = longest - (bos is not None)
    if len(ids) < width:
        raise UsageError(
            f"the text has {len(ids)} tokens, a context of {longest} needs {width}. Give a longer text with --text, or "
            "shorter contexts."
        )
    return ids[: len(ids) // width * width]


@dataclass
class _Losses:
    """Sums of losses by the position of the token that was predicted.

    Attributes:
        edges: Where buckets of positions begin, and the end of the last.
        sums: Nats, [2 sides, buckets].
        counts: Tokens of each bucket.
    """

    edges: np.ndarray
    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def empty(cls, context: int) -> _Losses:
        """Buckets for one context length."""
        edges, edge = [0], FIRST_EDGE
        while edge < context:
            edges.append(edge)
            edge *= 2
        return cls(np.array([*edges, context]), np.zeros((2, len(edges))), np.zeros(len(edges), np.int64))

    def add(self, found: Predictions) -> None:
        """Take in what both sides predict."""
        places = found.place + np.arange(len(found.targets))
        bucket = np.searchsorted(self.edges, places, side="right") - 1
        for side, logits in enumerate((found.expected, found.logits)):
            np.add.at(self.sums[side], bucket, negative_log_likelihood(logits, found.targets))
        np.add.at(self.counts, bucket, 1)

    def figures(self) -> dict[str, Any]:
        """JSON figures of the whole and of each bucket that has tokens."""
        count = int(self.counts.sum())
        source, engine = (perplexity(math.fsum(side) / count) for side in self.sums)
        positions = [
            {
                "begin": int(self.edges[index]),
                "end": int(self.edges[index + 1]),
                "tokens": int(self.counts[index]),
                "source": finite(self.sums[0, index] / self.counts[index]),
                "engine": finite(self.sums[1, index] / self.counts[index]),
            }
            for index in np.flatnonzero(self.counts)
        ]
        ratio = finite(engine / source)
        return {
            "source": finite(source),
            "engine": finite(engine),
            "ratio": ratio,
            "tokens": count,
            "positions": positions,
        }
