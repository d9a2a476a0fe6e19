"""Pass key retrieval: whether an engine still finds a number that was stated anywhere in a long text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effc.errors import UsageError
from effc.runtime.session import Engine
from effc.verify.long_context import Progress, check_lengths
from effc.verify.metrics import finite, log_sum_exp
from effc.verify.passkey_prompt import PasskeyTask, Prompt, make_prompt
from effc.verify.steps import CHUNK, token_feed
from effc.verify.text import begin_token

SIDES = ("source", "engine")
SINGLE = 16
"""Tokens at the end of a prompt that are read one by one, as decoding does: some engines read them differently."""


@dataclass(frozen=True)
class Answer:
    """How an engine answers one prompt.

    Attributes:
        exact: Greedy decoding gives the right tokens. As long as it does, it sees what is fed here, so this is the
            case when each right token is the most likely one after the right ones before it.
        log_probability: Mean of ln p of the right tokens, each after the right ones before it.
        rank: Mean of their ranks; 1 is the most likely token, ties count against it.
    """

    exact: bool
    log_probability: float
    rank: float


def check_passkey(task: PasskeyTask, engine: Engine, reference: Engine) -> None:
    """Refuse a task the engines cannot do, before anything runs.

    Raises:
        UsageError: No causal language model, no tokenizer, or a length beyond its positions or too short to ask.
    """
    check_lengths("passkey", task.lengths, engine, reference)
    if not (engine.has_tokenizer or reference.has_tokenizer):
        raise UsageError(f"{engine.folder}: has no tokenizer, so it cannot be asked for a pass key.")
    _make(task, engine, reference, min(task.lengths), 0, 0)


def measure_passkey(
    engine: Engine,
    reference: Engine,
    task: PasskeyTask,
    *,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Ask both engines for the keys of the same prompts.

    Args:
        engine: The engine in question.
        reference: What it is compared with.
        task: Lengths, depths and samples.
        chunk: Tokens of a prompt read in one run; its end and the answer are read token by token.
        progress: Called with a line before each length and depth, and zeros.

    Returns:
        `lengths`, `depths`, `samples`, `keys`, `seed`, `chunk`; `tokens`: mean tokens of a prompt by length; `source`
        and `engine`: share of exact answers, one list per length, in it one figure per depth; `log_probability` and
        `rank` with `source` and `engine` in the same form, means over samples (see `Answer`; null where logits are
        not finite); `score`: share of exact answers over all.

    Raises:
        UsageError: A task the engines cannot do.
        EngineError: An engine carries no cache.
    """
    check_passkey(task, engine, reference)
    shape = (len(task.lengths), len(task.depths), task.samples)
    found = {side: _Grid(*(np.zeros(shape) for _ in range(3))) for side in SIDES}
    tokens = np.zeros(shape)
    for length, depth, sample in np.ndindex(shape):
        if progress is not None and sample == 0:
            progress(f"pass key in {task.lengths[length]} tokens, {task.depths[depth]} % deep", 0, 0)
        prompt = _make(task, engine, reference, task.lengths[length], task.depths[depth], sample)
        tokens[length, depth, sample] = len(prompt.ids) + len(prompt.answer)
        for side, one in zip(SIDES, (reference, engine), strict=True):
            found[side].put((length, depth, sample), answer(one, prompt, chunk=chunk))
    return {
        "lengths": list(task.lengths),
        "depths": list(task.depths),
        "samples": task.samples,
        "keys": task.keys,
        "seed": task.seed,
        "chunk": chunk,
        "tokens": [float(mean) for mean in tokens.mean(axis=(1, 2))],
        **{side: _means(found[side].exact) for side in SIDES},
        "log_probability": {side: _means(found[side].log_probability) for side in SIDES},
        "rank": {side: _means(found[side].rank) for side in SIDES},
        "score": {side: float(found[side].exact.mean()) for side in SIDES},
    }


def _make(task: PasskeyTask, engine: Engine, reference: Engine, length: int, depth: int, sample: int) -> Prompt:
    tokenizer = (reference if reference.has_tokenizer else engine).tokenizer

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return make_prompt(encode, begin_token(engine, reference), task, length, depth, sample)


def answer(engine: Engine, prompt: Prompt, *, chunk: int = CHUNK) -> Answer:
    """Read a prompt, its last `SINGLE` tokens one by one, and so the tokens of the right answer.

    An engine that shortens prompts reads what its filter keeps, as in generation.

    Logits are kept for one token at a time where the engine computes only those that are asked for, else for `chunk`.
    """
    kept = engine.shortened(prompt.ids)
    ids = np.array([[*kept, *prompt.answer[:-1]]], np.int64)
    state = engine.new_state(1, max_length=ids.shape[1])
    last = len(kept)
    single = max(0, last - SINGLE)
    starts = [*range(0, single, chunk), *range(single, ids.shape[1])]
    rows: list[tuple[bool, float, int]] = []
    for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
        wanted = ["logits"] if end >= last else []
        outputs = state.run(token_feed(engine, ids[:, start:end], start), wanted, num_logits=1)
        if wanted:
            rows.append(_row(outputs["logits"][0, -1], prompt.answer[len(rows)]))
    exact, log_probabilities, ranks = zip(*rows, strict=True)
    return Answer(all(exact), float(np.mean(log_probabilities)), float(np.mean(ranks)))


def _row(logits: np.ndarray, target: int) -> tuple[bool, float, int]:
    """Whether the target is the most likely token, its ln p and its rank: the last one among NaN."""
    if not np.isfinite(logits[target]) or np.isnan(logits).any():
        return False, np.nan, logits.size
    rank = logits.size - int(np.count_nonzero(logits < logits[target]))
    return int(logits.argmax()) == target, float(logits[target] - log_sum_exp(logits)), rank


@dataclass(frozen=True)
class _Grid:
    """Answers of one engine, [lengths, depths, samples] each."""

    exact: np.ndarray
    log_probability: np.ndarray
    rank: np.ndarray

    def put(self, place: tuple[int, int, int], one: Answer) -> None:
        self.exact[place] = one.exact
        self.log_probability[place] = one.log_probability
        self.rank[place] = one.rank


def _means(figures: np.ndarray) -> list[Sequence[float | None]]:
    """Means over samples, one list per length; null where a figure is not finite."""
    return [[finite(mean) for mean in row] for row in figures.mean(axis=-1)]
