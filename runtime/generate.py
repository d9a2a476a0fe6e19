"""Continues prompts with a causal language model, greedily or by sampling, in left-padded batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from effc.errors import UsageError
from effc.runtime import limits
from effc.runtime.batch import Batch, check_task, prompt_chunk
from effc.runtime.continuation import (
    Continuation,
    Generation,
    Stream,
    check_lengths,
    check_seed,
    decoder,
    most_steps,
)
from effc.runtime.detokenize import Detokenizer, StopFilter
from effc.runtime.prefix import Prefix, start_from
from effc.runtime.prompts import Prompts, read_prompts
from effc.runtime.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from effc.runtime.session import Engine


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
            prompt so that its logits stay below `effc.runtime.batch.LOGITS_LIMIT`, and one whose tokens compete by
            their surprise.
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
    decode = decoder(engine, bool(stop) or stream is not None)
    limit = limits.token_limit(engine.manifest)
    eos = limits.eos_ids(engine.manifest.config, engine.assets)
    before = [] if start is None else start.token_ids
    rows = []
    for index, prompt in enumerate(given):
        steps = most_steps(len(before) + len(prompt.kept), max_new_tokens, limit)
        detokenizer = Detokenizer(decode, [*before, *prompt.ids])
        rows.append(Continuation(index, prompt, steps, eos, detokenizer, StopFilter(stop), stream))
    sampler = Sampler(sampling, [[*before, *prompt.ids] for prompt in given], seed)
    for together in [rows] if start is None else _by_length(rows):
        _decode(engine, together, sampler, prefill_chunk, start)
    return [row.generation(len(before)) for row in rows]


def _check_request(
    engine: Engine, max_new_tokens: int, stop: Sequence[str], prefill_chunk: int | None, seed: int | None
) -> None:
    check_task(engine)
    check_lengths(max_new_tokens, stop)
    if prefill_chunk is not None and prefill_chunk < 1:
        raise UsageError(f"prefill_chunk is {prefill_chunk}; give at least 1, or leave it out.")
    check_seed(seed)


def _by_length(rows: Sequence[Continuation]) -> list[list[Continuation]]:
    """Rows of whose prompts equally many tokens are read, together.

    Padding between a prefix and a prompt would count as tokens of the windows, pages and blocks of the cache.
    """
    groups: dict[int, list[Continuation]] = {}
    for row in rows:
        groups.setdefault(len(row.prompt.kept), []).append(row)
    return list(groups.values())


def _decode(
    engine: Engine, rows: Sequence[Continuation], sampler: Sampler, prefill_chunk: int | None, start: Prefix | None
) -> None:
    """Run rows that share a batch to their ends."""
    begun = time.perf_counter() - sum(row.prompt.seconds for row in rows)
    batch = Batch(engine, [row.prompt.kept for row in rows], max(row.steps for row in rows), start)
    chunk = prefill_chunk or prompt_chunk(engine, len(rows), batch.width)
    logits = batch.prefill(min(chunk, engine.cache_layout().longest_step or chunk))
    read = time.perf_counter()
    while True:
        for place, row in enumerate(rows):
            if not row.finish_reason:
                row.accept(sampler.choose(row.index, logits[place]))
                row.prefill_seconds, row.decode_seconds = read - begun, time.perf_counter() - read
        if all(row.finish_reason for row in rows):
            return
        logits = batch.step([None if row.finish_reason else row.ids[-1] for row in rows])
