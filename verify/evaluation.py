"""Compares an engine with a reference engine: outputs at hard shapes, perplexity over text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from effc.errors import ContractError, UsageError
from effc.runtime.limits import position_limit
from effc.runtime.session import Engine
from effc.verify.budget import Budget
from effc.verify.compare import OutputDifferences, compare_outputs
from effc.verify.inputs import FeedShape, Interface, attention_mask, hard_shapes, manifest_interface
from effc.verify.metrics import finite, kl_divergence, negative_log_likelihood
from effc.verify.steps import CHUNK, run_at
from effc.verify.text import Predictions, begin_token, common_tokenizer, perplexity, predictions, text_ids, windows


def verify_engine(
    engine: Engine,
    reference: Engine,
    *,
    text: str | Path | None = None,
    tokens: int = 8192,
    context: int = 512,
    chunk: int = CHUNK,
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
        chunk: Tokens of a window read in one run.
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
    _check_request(engine, reference, tokens, context, chunk)
    tokenizer = common_tokenizer(engine, reference)
    config = {**engine.manifest.config, **reference.manifest.config}
    sides = [replace(manifest_interface(one.manifest, tokenizer), config=config) for one in (reference, engine)]
    chosen = tuple(shapes) if shapes is not None else hard_shapes(sides[0])
    found = {shape: _compare_at(engine, reference, sides, shape, seed) for shape in chosen}
    overall = OutputDifferences.merge(found.values())
    result: dict[str, Any] = {**overall.overall().to_json(), "kl": None, "perplexity": None}
    result["shapes"] = [_shape_figures(shape, differences) for shape, differences in found.items()]
    if engine.task == "causal-lm":
        ids = text_ids(text, tokens, tokenizer, config)
        bos = begin_token(engine, reference)
        result.update(_measure_text(engine, reference, ids, _context(context, config), bos, chunk))
    return result


def enforce_budget(result: dict[str, Any], budget: Budget) -> None:
    """Compare what was measured with a budget; the limit of perplexity holds at every context.

    Args:
        result: What `verify_engine` returned, perhaps with the `contexts` of `effc.verify.long_context`.
        budget: The limits.

    Raises:
        ContractError: Lists every limit that is not kept.
    """
    figures = {name: result.get(name) for name in ("max_abs", "max_rel", "top1", "kl")}
    measured = [text for text in (result.get("perplexity"), *(result.get("contexts") or ())) if text]
    if measured:
        ratios = [text["ratio"] for text in measured]
        figures["perplexity"] = None if None in ratios else max(ratios)
    missing = {name for name in ("top1", "kl") if figures[name] is None}
    problems = budget.broken({name: figure for name, figure in figures.items() if name not in missing})
    if problems:
        raise ContractError(f"the engine misses the budget: {'; '.join(problems)}. Use milder passes.")


def _check_request(engine: Engine, reference: Engine, tokens: int, context: int, chunk: int) -> None:
    if engine.task != reference.task:
        raise UsageError(
            f"{engine.folder} has the task {engine.task}, {reference.folder} has {reference.task}. "
            "Compare engines of one model."
        )
    if context < 2 or tokens < 2:
        raise UsageError(f"tokens is {tokens} and context is {context}; both must be at least 2.")
    if chunk < 1:
        raise UsageError(f"chunk is {chunk}; give at least 1.")


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


def _context(context: int, config: dict[str, Any]) -> int:
    limit = position_limit(config)
    return context if limit is None else min(context, limit)


@dataclass
class _TextFigures:
    """Sums over the predicted tokens."""

    losses: dict[str, list[float]] = field(default_factory=lambda: {"source": [], "engine": []})
    divergence: float = 0.0
    agreed: int = 0
    count: int = 0

    def add(self, found: Predictions) -> None:
        """Take in what both sides predict."""
        _, targets, expected, logits = found
        self.losses["source"].append(math.fsum(negative_log_likelihood(expected, targets)))
        self.losses["engine"].append(math.fsum(negative_log_likelihood(logits, targets)))
        if not np.array_equal(expected, logits):
            self.divergence += math.fsum(kl_divergence(expected, logits))
        self.agreed += int(np.count_nonzero(expected.argmax(axis=-1) == logits.argmax(axis=-1)))
        self.count += len(targets)

    def perplexity(self, side: str) -> float:
        """Perplexity of a side."""
        return perplexity(math.fsum(self.losses[side]) / self.count)


def _measure_text(
    engine: Engine, reference: Engine, ids: Sequence[int], context: int, bos: int | None, chunk: int
) -> dict[str, Any]:
    figures = _TextFigures()
    for window in windows(ids, context, bos):
        for found in predictions(engine, reference, window, chunk=chunk):
            figures.add(found)
    source, measured = figures.perplexity("source"), figures.perplexity("engine")
    text = {
        "source": finite(source),
        "engine": finite(measured),
        "ratio": finite(measured / source),
        "tokens": figures.count,
        "context": context,
    }
    top1, kl = figures.agreed / figures.count, figures.divergence / figures.count
    return {"top1": top1, "kl": finite(kl), "perplexity": text}
