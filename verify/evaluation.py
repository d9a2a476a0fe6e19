"""Compares an engine with a reference engine: outputs at hard shapes, perplexity over text."""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from effc.errors import ContractError, InputError, UsageError
from effc.runtime.limits import position_limit, text_config
from effc.runtime.session import Engine
from effc.verify.budget import Budget
from effc.verify.compare import OutputDifferences, compare_outputs
from effc.verify.inputs import FeedShape, Interface, Tokenizer, attention_mask, hard_shapes, manifest_interface
from effc.verify.metrics import finite, kl_divergence, negative_log_likelihood
from effc.verify.steps import run_at, window_logits


def verify_engine(
    engine: Engine,
    reference: Engine,
    *,
    text: str | Path | None = None,
    tokens: int = 8192,
    context: int = 512,
    shapes: Sequence[FeedShape] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure how far an engine is from a reference.

    Args:
        engine: The engine in question.
        reference: What it is compared with, usually the source exported plainly.
        text: Text, or the path of a UTF-8 file, for perplexity; None for the topics of Python's own help.
        tokens: Most tokens of text to use.
        context: Tokens in one window; windows do not overlap and each starts from an empty cache.
        shapes: Where outputs are compared; None for `hard_shapes` of the reference.
        seed: Of random inputs.

    Returns:
        The JSON object of `effc verify`: `bitwise`, `max_abs`, `max_rel` over all outputs and shapes (see
        `effc.verify.metrics.Difference`; null is infinite); `top1` over the text for causal language models, over
        the shapes for other models with logits, else null; `kl`, mean nats over the text, or null; `perplexity` with
        `source`, `engine`, `ratio`, and `tokens` and `context` behind them, null for other tasks; `shapes`.

    Raises:
        UsageError: Wrong figures, an empty text, or engines of different tasks.
        InputError: The text cannot be read.
    """
    _check_request(engine, reference, tokens, context)
    tokenizer = _common_tokenizer(engine, reference)
    config = {**engine.manifest.config, **reference.manifest.config}
    sides = [replace(manifest_interface(one.manifest, tokenizer), config=config) for one in (reference, engine)]
    chosen = tuple(shapes) if shapes is not None else hard_shapes(sides[0])
    found = {shape: _compare_at(engine, reference, sides, shape, seed) for shape in chosen}
    overall = OutputDifferences.merge(found.values())
    result: dict[str, Any] = {**overall.overall().to_json(), "kl": None, "perplexity": None}
    result["shapes"] = [_shape_figures(shape, differences) for shape, differences in found.items()]
    if engine.task == "causal-lm":
        ids = _text_ids(text, tokens, tokenizer, config)
        result.update(_measure_text(engine, reference, ids, _context(context, config), _bos(engine, reference)))
    return result


def enforce_budget(result: dict[str, Any], budget: Budget) -> None:
    """Compare what `verify_engine` returned with a budget.

    Raises:
        ContractError: Lists every limit that is not kept.
    """
    figures = {name: result.get(name) for name in ("max_abs", "max_rel", "top1", "kl")}
    if result.get("perplexity"):
        figures["perplexity"] = result["perplexity"]["ratio"]
    missing = {name for name in ("top1", "kl") if figures[name] is None}
    problems = budget.broken({name: figure for name, figure in figures.items() if name not in missing})
    if problems:
        raise ContractError(f"the engine misses the budget: {'; '.join(problems)}. Use milder passes.")


def _check_request(engine: Engine, reference: Engine, tokens: int, context: int) -> None:
    if engine.task != reference.task:
        raise UsageError(
            f"{engine.folder} has the task {engine.task}, {reference.folder} has {reference.task}. "
            "Compare engines of one model."
        )
    if context < 2 or tokens < 2:
        raise UsageError(f"tokens is {tokens} and context is {context}; both must be at least 2.")


def _common_tokenizer(engine: Engine, reference: Engine) -> Tokenizer | None:
    for one in (reference, engine):
        if one.has_tokenizer:
            return one.tokenizer.encode
    return None


def _compare_at(
    engine: Engine, reference: Engine, sides: Sequence[Interface], shape: FeedShape, seed: int
) -> OutputDifferences:
    expected = run_at(reference, sides[0], shape, seed=seed)
    outputs = run_at(engine, sides[1], shape, seed=seed)
    found = compare_outputs(expected, outputs, shape, attention_mask(sides[0], shape))
    if found.missing:
        raise ContractError(
            f"{engine.folder}: at {shape} the outputs {', '.join(found.missing)} are gone or have another shape or "
            f"dtype than in {reference.folder}. Build both from the same model."
        )
    return found


def _shape_figures(shape: FeedShape, differences: OutputDifferences) -> dict[str, Any]:
    worst = differences.overall()
    figures = {"batch": shape.batch, "seq": shape.seq, "past": shape.past, "padded": shape.padded}
    return {**figures, "bitwise": worst.bitwise, "max_abs": finite(worst.max_abs), "max_rel": finite(worst.max_rel)}


def _text_ids(text: str | Path | None, tokens: int, tokenizer: Tokenizer | None, config: dict[str, Any]) -> list[int]:
    """Ids of the text without special tokens of ours; bytes within the vocabulary where there is no tokenizer."""
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


def _context(context: int, config: dict[str, Any]) -> int:
    limit = position_limit(config)
    return context if limit is None else min(context, limit)


def _bos(engine: Engine, reference: Engine) -> int | None:
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


@dataclass
class _TextFigures:
    """Sums over the predicted tokens."""

    losses: dict[str, list[float]] = field(default_factory=lambda: {"source": [], "engine": []})
    divergence: float = 0.0
    agreed: int = 0
    count: int = 0

    def add(self, expected: np.ndarray, logits: np.ndarray, targets: np.ndarray) -> None:
        """Take in the logits [rows, vocab] of both sides before each target."""
        self.losses["source"].append(math.fsum(negative_log_likelihood(expected, targets)))
        self.losses["engine"].append(math.fsum(negative_log_likelihood(logits, targets)))
        if not np.array_equal(expected, logits):
            self.divergence += math.fsum(kl_divergence(expected, logits))
        self.agreed += int(np.count_nonzero(expected.argmax(axis=-1) == logits.argmax(axis=-1)))
        self.count += len(targets)

    def perplexity(self, side: str) -> float:
        """`exp` of the mean loss; infinite beyond the range of a float."""
        mean = math.fsum(self.losses[side]) / self.count
        return math.exp(mean) if mean < 700 else math.inf if mean > 0 else math.nan


def _measure_text(
    engine: Engine, reference: Engine, ids: Sequence[int], context: int, bos: int | None
) -> dict[str, Any]:
    figures = _TextFigures()
    for window in windows(ids, context, bos):
        read = 0
        for expected, logits in zip(window_logits(reference, window), window_logits(engine, window), strict=True):
            targets = np.asarray(window[read + 1 : read + 1 + len(expected)], np.int64)
            figures.add(expected[: len(targets)], logits[: len(targets)], targets)
            read += len(expected)
    source, measured = figures.perplexity("source"), figures.perplexity("engine")
    perplexity = {
        "source": finite(source),
        "engine": finite(measured),
        "ratio": finite(measured / source),
        "tokens": figures.count,
        "context": context,
    }
    top1, kl = figures.agreed / figures.count, figures.divergence / figures.count
    return {"top1": top1, "kl": finite(kl), "perplexity": perplexity}
