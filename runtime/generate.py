"""Continues prompts with a causal language model, greedily or by sampling, in left-padded batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from effc.errors import UsageError
from effc.runtime import limits
from effc.runtime.batch import Batch, check_task, prompt_chunk
from effc.runtime.detokenize import Detokenizer, StopFilter
from effc.runtime.prefix import Prefix, start_from
from effc.runtime.prompts import Prompt, Prompts, read_prompts
from effc.runtime.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from effc.runtime.session import Engine

Stream = Callable[[int, str], None]


@dataclass(frozen=True)
class Generation:
    """One continued prompt.

    Attributes:
        text: What follows the prompt; ends before the stop string, has no special tokens.
        token_ids: The generated ids, the one that ended it (EOS, or the end of a stop string) included.
        finish_reason: `eos`, `stop` (a stop string came) or `length` (max_new_tokens, or the model's limit).
        prompt_tokens: Tokens of the prompt, without padding and prefix.
        kept_tokens: Tokens of it that the model read; fewer where the engine shortens prompts.
        prefill_seconds: Time the batch took to shorten and read its prompts, up to the first logits.
        decode_seconds: Time from there to the end of this row.
        prefix_tokens: Tokens before the prompt that came from a prefix.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    kept_tokens: int
    prefill_seconds: float
    decode_seconds: float
    prefix_tokens: int = 0


def generate(
    engine: Engine,
    prompts: Prompts,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    stream: Stream | None = None,
    chat: bool = False,
    prefill_chunk: int | None = None,
    prefix: str | Path | Prefix | None = None,
    filter_prompt: bool = True,
) -> list[Generation]:
    """Continue prompts.

    Decoding is greedy unless asked otherwise: the sampling values of a model's `generation_config.json` are not
    used, only its EOS ids. Rows of unequal length are padded on the left; a row comes out as it would alone.

    Args:
        engine: An engine of task `causal-lm`.
        prompts: A text, texts, or lists of token ids, which are taken as they are.
        max_new_tokens: Most tokens to generate for each prompt.
        temperature: 0 for greedy; see `Sampling` for this and the next three.
        top_k: Keep the k best tokens; 0 for all.
        top_p: Keep the best tokens of this total probability; 1 for all.
        repetition_penalty: 1 for none.
        seed: Makes sampling repeatable; row r draws from its own generator, seeded with (seed, r).
        stop: Strings that end a row.
        stream: Called with row and text as soon as text is certain. Joined, the texts of a row are its `text`.
        chat: Take each text as a user's message and put it into the model's chat template, after the system message
            of a prefix that was computed with `chat`.
        prefill_chunk: Tokens of the prompt read in one run; None reads all at once, but splits a single long
            prompt so that its logits stay below `effc.runtime.batch.LOGITS_LIMIT`.
        prefix: A prefix folder, or an open one: every prompt goes on from there, and its tokens are not read again.
            Prompts of one length then share a batch; other lengths follow one after the other.
        filter_prompt: Shorten long prompts where the engine has a filter (the pass `prompt-filter`), row by row; else
            they are read whole. A prefix is never shortened, what follows it is.

    Returns:
        One `Generation` a prompt, in order.

    Raises:
        UsageError: An option is out of its range, a prompt is empty, too long or does not continue the prefix, the
            prefix is of another engine, or the task does not generate.
        EngineError: The engine has no tokenizer where one is needed, no cache, or fails while running; the prefix is
            damaged.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    _check_request(engine, max_new_tokens, stop, prefill_chunk, seed)
    start = None if prefix is None else start_from(engine, prefix, chat=chat)
    given = read_prompts(engine, prompts, chat, start, filter_prompt)
    if not given:
        return []
    needs_text = engine.has_tokenizer or bool(stop) or stream is not None
    decode = engine.tokenizer.decode if needs_text else _no_text
    limit = limits.token_limit(engine.manifest)
    eos = limits.eos_ids(engine.manifest.config, engine.assets)
    before = [] if start is None else start.token_ids
    rows = []
    for index, prompt in enumerate(given):
        steps = _steps(len(before) + len(prompt.kept), max_new_tokens, limit)
        detokenizer = Detokenizer(decode, [*before, *prompt.ids])
        rows.append(_Row(index, prompt, steps, eos, detokenizer, StopFilter(stop), stream))
    sampler = Sampler(sampling, [[*before, *prompt.ids] for prompt in given], seed)
    for together in [rows] if start is None else _by_length(rows):
        _decode(engine, together, sampler, prefill_chunk, start)
    return [row.generation(len(before)) for row in rows]


def _check_request(
    engine: Engine, max_new_tokens: int, stop: Sequence[str], prefill_chunk: int | None, seed: int | None
) -> None:
    check_task(engine)
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}; give at least 1.")
    if isinstance(stop, str):
        raise UsageError("stop is a string; give a list of strings.")
    if not all(stop):
        raise UsageError("stop holds an empty string; it would end every text at once. Leave it out.")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise UsageError(f"prefill_chunk is {prefill_chunk}; give at least 1, or leave it out.")
    if seed is not None and seed < 0:
        raise UsageError(f"seed is {seed}; give at least 0.")


def _steps(tokens: int, max_new_tokens: int, limit: int | None) -> int:
    """Tokens a row may get after so many. The last one is not fed again, so a prompt at the limit still gets one."""
    return max_new_tokens if limit is None else min(max_new_tokens, limit - tokens + 1)


def _by_length(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Rows of whose prompts equally many tokens are read, together.

    Padding between a prefix and a prompt would count as tokens of the windows, pages and blocks of the cache.
    """
    groups: dict[int, list[_Row]] = {}
    for row in rows:
        groups.setdefault(len(row.prompt.kept), []).append(row)
    return list(groups.values())


def _no_text(ids: Sequence[int]) -> str:
    """Stands for a tokenizer where there is none: no text."""
    return ""


@dataclass
class _Row:
    """One prompt in progress."""

    index: int
    prompt: Prompt
    steps: int
    eos: frozenset[int]
    detokenizer: Detokenizer
    stop: StopFilter
    stream: Stream | None
    finish_reason: str = ""
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def accept(self, token: int) -> None:
        """Take the next token and see whether the row ends with it."""
        self.ids.append(token)
        if token in self.eos:
            self.finish_reason = "eos"
        else:
            self._emit(self.stop.push(self.detokenizer.push(token)))
            if self.stop.stopped:
                self.finish_reason = "stop"
            elif len(self.ids) == self.steps:
                self.finish_reason = "length"
        if self.finish_reason in ("eos", "length"):
            self._finish_text()

    def _finish_text(self) -> None:
        """Give out what was held back; it may still complete a stop string."""
        self._emit(self.stop.push(self.detokenizer.flush()))
        if self.stop.stopped:
            self.finish_reason = "stop"
        self._emit(self.stop.flush())

    def _emit(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)
            if self.stream is not None:
                self.stream(self.index, piece)

    def generation(self, prefix_tokens: int) -> Generation:
        """The result."""
        text = "".join(self.pieces)
        counts, seconds = (len(self.prompt.ids), len(self.prompt.kept)), (self.prefill_seconds, self.decode_seconds)
        return Generation(text, self.ids, self.finish_reason, *counts, *seconds, prefix_tokens)


def _decode(
    engine: Engine, rows: Sequence[_Row], sampler: Sampler, prefill_chunk: int | None, start: Prefix | None
) -> None:
    """Run rows that share a batch to their ends."""
    begun = time.perf_counter() - sum(row.prompt.seconds for row in rows)
    batch = Batch(engine, [row.prompt.kept for row in rows], max(row.steps for row in rows), start)
    logits = batch.prefill(prefill_chunk or prompt_chunk(engine, len(rows), batch.width))
    read = time.perf_counter()
    while True:
        for place, row in enumerate(rows):
            if not row.finish_reason:
                row.accept(sampler.choose(row.index, logits[place]))
                row.prefill_seconds, row.decode_seconds = read - begun, time.perf_counter() - read
        if all(row.finish_reason for row in rows):
            return
        logits = batch.step([None if row.finish_reason else row.ids[-1] for row in rows])
