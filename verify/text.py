"""Text for measuring language models: its ids, cut into windows, and the logits of two engines over them."""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effc.errors import InputError, UsageError
from effc.runtime.limits import text_config
from effc.runtime.session import Engine
from effc.verify.inputs import Tokenizer
from effc.verify.steps import CHUNK, window_logits


def text_ids(text: str | Path | None, tokens: int, tokenizer: Tokenizer | None, config: Mapping[str, Any]) -> list[int]:
    """The first ids of a text; its bytes within the vocabulary where there is no tokenizer.

    Args:
        text: Text, or the path of a UTF-8 file; None for the topics of Python's own help.
        tokens: Most ids wanted.
        tokenizer: Text -> ids.
        config: Model configuration, for the vocabulary.

    Raises:
        UsageError: Fewer than two ids.
        InputError: The file cannot be read.
    """
    content = _read_text(text)
    if tokenizer is None:
        vocabulary = int(text_config(config).get("vocab_size") or 256)
        ids = [byte % vocabulary for byte in content.encode("utf-8")[:tokens]]
    else:
        # A token is at most a few dozen characters; a tokenizer need not see megabytes for a few thousand ids.
        ids = list(tokenizer(content[: 64 * tokens]))[:tokens]
    if len(ids) < 2:
        raise UsageError(f"the text has {len(ids)} tokens; perplexity needs at least 2. Give a longer text.")
    return ids


def _read_text(text: str | Path | None) -> str:
    if text is None:
        return "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    if isinstance(text, str):
        return text
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{text}: cannot be read as UTF-8 text ({error}). Name a plain text file.") from error


def common_tokenizer(engine: Engine, reference: Engine) -> Tokenizer | None:
    """The tokenizer of either engine, with the special tokens it adds."""
    for one in (reference, engine):
        if one.has_tokenizer:
            return one.tokenizer.encode
    return None


def begin_token(engine: Engine, reference: Engine) -> int | None:
    """The id the tokenizer begins a text with, None when it adds none."""
    for one in (reference, engine):
        if one.has_tokenizer:
            bos = one.tokenizer.special_id("bos_token")
            return bos if bos is not None and one.tokenizer.encode("a")[:1] == [bos] else None
    return None


def windows(ids: Sequence[int], context: int, bos: int | None) -> Iterator[list[int]]:
    """Non-overlapping windows of at most `context` tokens, each begun with BOS where the model expects one.

    The first token of a window is not predicted; a rest too short to predict anything is left out.
    """
    start = 1 if bos is not None and list(ids[:1]) == [bos] else 0
    width = context - (bos is not None)
    for begin in range(start, len(ids), width):
        window = [*([bos] if bos is not None else []), *ids[begin : begin + width]]
        if len(window) >= 2:
            yield window


class Predictions(NamedTuple):
    """What both engines predict for consecutive tokens of a window.

    Attributes:
        place: Position of the first target in the window, counted from 0.
        targets: The tokens, int64 [rows].
        expected: Logits of the reference before each, [rows, vocab].
        logits: Logits of the engine.
    """

    place: int
    targets: np.ndarray
    expected: np.ndarray
    logits: np.ndarray


def predictions(
    engine: Engine, reference: Engine, window: Sequence[int], *, chunk: int = CHUNK
) -> Iterator[Predictions]:
    """Read a window with both engines, `chunk` tokens at a time; every token but the first is predicted."""
    place = 1
    both = zip(window_logits(reference, window, chunk), window_logits(engine, window, chunk), strict=True)
    for expected, logits in both:
        targets = np.asarray(window[place : place + len(expected)], np.int64)
        yield Predictions(place, targets, expected[: len(targets)], logits[: len(targets)])
        place += len(expected)


def perplexity(mean: float) -> float:
    """`exp` of a mean loss in nats; infinite beyond the range of a float."""
    return math.exp(mean) if mean < 700 else math.inf if mean > 0 else math.nan
