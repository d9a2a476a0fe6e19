"""Continues prompts with a causal language model, greedily or by sampling, in left-padded batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from effc.errors import EngineError, UsageError
from effc.runtime import limits
from effc.runtime.detokenize import Detokenizer, StopFilter
from effc.runtime.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from effc.runtime.kv_state import KvState
    from effc.runtime.session import Engine

Prompts = str | Sequence[str] | Sequence[Sequence[int]]
Stream = Callable[[int, str], None]

LOGITS = "logits"
LOGITS_LIMIT = 256 << 20
"""Bytes of logits one prefill run may produce; a single long prompt is split to stay below."""


@dataclass(frozen=True)
class Generation:
    """One continued prompt.

    Attributes:
        text: What follows the prompt; ends before the stop string, has no special tokens.
        token_ids: The generated ids, the one that ended it (EOS, or the end of a stop string) included.
        finish_reason: `eos`, `stop` (a stop string came) or `length` (max_new_tokens, or the model's limit).
        prompt_tokens: Tokens of the prompt, without padding.
        kept_tokens: Tokens of it that the model read; fewer where the engine shortens prompts.
        prefill_seconds: Time the batch took to shorten and read its prompts, up to the first logits.
        decode_seconds: Time from there to the end of this row.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    kept_tokens: int
    prefill_seconds: float
    decode_seconds: float


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
        chat: Take each text as a user's message and put it into the model's chat template.
        prefill_chunk: Tokens of the prompt read in one run; None reads all at once, but splits a single long
            prompt so that its logits stay below `LOGITS_LIMIT`.
        filter_prompt: Shorten long prompts where the engine has a filter (the pass `prompt-filter`), row by row; else
            they are read whole.

    Returns:
        One `Generation` a prompt, in order.

    Raises:
        UsageError: An option is out of its range, a prompt is empty or too long, or the task does not generate.
        EngineError: The engine has no tokenizer where one is needed, no cache, or fails while running.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    _check_request(engine, max_new_tokens, stop, prefill_chunk, seed)
    prompt_ids = _prompt_ids(engine, prompts, chat)
    if not prompt_ids:
        return []
    needs_text = engine.has_tokenizer or bool(stop) or stream is not None
    decode = engine.tokenizer.decode if needs_text else _no_text
    limit = limits.position_limit(engine.manifest.config)
    eos = limits.eos_ids(engine.manifest.config, engine.assets)
    _check_lengths(prompt_ids, limit)
    begun = time.perf_counter()
    rows = []
    for index, ids in enumerate(prompt_ids):
        kept = engine.shortened(ids) if filter_prompt else ids
        steps = _steps(len(kept), max_new_tokens, limit)
        rows.append(_Row(index, len(ids), kept, steps, eos, Detokenizer(decode, ids), StopFilter(stop), stream))
    _decode(engine, rows, Sampler(sampling, prompt_ids, seed), prefill_chunk, begun)
    return [row.generation() for row in rows]


def _check_request(
    engine: Engine, max_new_tokens: int, stop: Sequence[str], prefill_chunk: int | None, seed: int | None
) -> None:
    if engine.task != "causal-lm":
        raise UsageError(f"{engine.folder}: its task is {engine.task}, only causal-lm engines generate text.")
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


def _prompt_ids(engine: Engine, prompts: Prompts, chat: bool) -> list[list[int]]:
    items: list[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else [*prompts]
    return [_encode(engine, index, item, chat) for index, item in enumerate(items)]


def _encode(engine: Engine, index: int, prompt: str | Sequence[int], chat: bool) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise UsageError(f"prompt {index} is empty. To start from nothing, give the ids to start with.")
        tokenizer = engine.tokenizer
        ids = tokenizer.chat_prompt([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
        if not ids:
            raise UsageError(f"prompt {index}: the tokenizer makes no tokens of {prompt!r}.")
        return ids
    if chat:
        raise UsageError(f"prompt {index} is a list of ids; chat takes texts.")
    return _checked_ids(engine, index, prompt)


def _checked_ids(engine: Engine, index: int, prompt: object) -> list[int]:
    if not isinstance(prompt, Sequence | np.ndarray):
        raise UsageError(f"prompt {index} is a {type(prompt).__name__}; give texts, or a list of ids for each prompt.")
    try:
        array = np.asarray(prompt)
    except ValueError as error:
        raise UsageError(f"prompt {index}: is no flat list of ids.") from error
    if array.size == 0:
        raise UsageError(f"prompt {index} is empty. Give at least one id.")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError(f"prompt {index}: holds something other than whole numbers. Give a flat list of ids.")
    vocabulary = limits.text_config(engine.manifest.config).get("vocab_size")
    if array.min() < 0 or (isinstance(vocabulary, int) and array.max() >= vocabulary):
        raise UsageError(f"prompt {index}: an id is outside the vocabulary of {vocabulary} tokens.")
    return [int(item) for item in array]


def _check_lengths(prompts: Sequence[Sequence[int]], limit: int | None) -> None:
    for index, ids in enumerate(prompts):
        if limit is not None and len(ids) > limit:
            raise UsageError(f"prompt {index} has {len(ids)} tokens, the model takes at most {limit}. Shorten it.")


def _steps(read: int, max_new_tokens: int, limit: int | None) -> int:
    """Tokens a row may get. The last one is not fed again, so a prompt at the limit still gets one."""
    return max_new_tokens if limit is None else min(max_new_tokens, limit - read + 1)


def _no_text(ids: Sequence[int]) -> str:
    """Stands for a tokenizer where there is none: no text."""
    return ""


@dataclass
class _Row:
    """One prompt in progress; `prompt` is what the model reads of its tokens."""

    index: int
    prompt_tokens: int
    prompt: list[int]
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

    def generation(self) -> Generation:
        """The result."""
        text = "".join(self.pieces)
        seconds = (self.prefill_seconds, self.decode_seconds)
        return Generation(text, self.ids, self.finish_reason, self.prompt_tokens, len(self.prompt), *seconds)


class _Batch:
    """The padded inputs of a batch, and its cache.

    Args:
        engine: The engine.
        prompts: Ids of every row.
        steps: Most tokens any row gets.
    """

    def __init__(self, engine: Engine, prompts: Sequence[Sequence[int]], steps: int) -> None:
        self.width = max(map(len, prompts))
        total = self.width + steps - 1
        self._pad = limits.pad_id(engine.manifest.config, engine.assets)
        self._ids = np.full((len(prompts), self.width), self._pad, np.int64)
        self._mask = np.ones((len(prompts), total), np.int64)
        for row, prompt in enumerate(prompts):
            start = self.width - len(prompt)
            self._ids[row, start:] = prompt
            self._mask[row, :start] = 0
        self._starts = np.array([[self.width - len(prompt)] for prompt in prompts], np.int64)
        self._dtypes = {port.name: np.dtype(port.dtype) for port in engine.manifest.inputs}
        self._state: KvState = engine.new_state(len(prompts), max_length=total)

    def prefill(self, chunk: int) -> np.ndarray:
        """Read the prompts, `chunk` tokens in a run; logits [batch, vocabulary] after their last tokens."""
        logits = np.empty(0)
        for start in range(0, self.width, chunk):
            last = start + chunk >= self.width
            logits = self._run(self._ids[:, start : start + chunk], 1, wanted=last)
        return logits

    def step(self, tokens: Sequence[int | None]) -> np.ndarray:
        """Append one token to every row, padding where it is None; logits [batch, vocabulary]."""
        column = [[self._pad if token is None else token] for token in tokens]
        # A row that has ended no longer counts on: it could pass the model's last position.
        running = np.array([[token is not None] for token in tokens], np.int64)
        return self._run(np.array(column, np.int64), running, wanted=True)

    def _run(self, ids: np.ndarray, running: np.ndarray | int, *, wanted: bool) -> np.ndarray:
        start, end = self._state.length, self._state.length + ids.shape[1]
        feeds = {
            "input_ids": ids,
            "attention_mask": self._mask[:, :end],
            # Padding gets position 0; a row counts from its own first token.
            "position_ids": np.maximum(np.arange(start, end)[None, :] - self._starts, 0) * running,
        }
        taken = {name: feeds[name].astype(dtype, copy=False) for name, dtype in self._dtypes.items()}
        outputs = self._state.run(taken, [LOGITS] if wanted else [], num_logits=1)
        return outputs[LOGITS][:, -1] if wanted else np.empty(0)


def _decode(engine: Engine, rows: Sequence[_Row], sampler: Sampler, prefill_chunk: int | None, begun: float) -> None:
    """Run all rows to their ends; `begun` is when work on the prompts began."""
    _check_interface(engine, [row.prompt for row in rows])
    batch = _Batch(engine, [row.prompt for row in rows], max(row.steps for row in rows))
    logits = batch.prefill(prefill_chunk or prompt_chunk(engine, len(rows), batch.width))
    read = time.perf_counter()
    while True:
        for row in rows:
            if not row.finish_reason:
                row.accept(sampler.choose(row.index, logits[row.index]))
                row.prefill_seconds, row.decode_seconds = read - begun, time.perf_counter() - read
        if all(row.finish_reason for row in rows):
            return
        logits = batch.step([None if row.finish_reason else row.ids[-1] for row in rows])


def _check_interface(engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
    known = {"input_ids", "attention_mask", "position_ids"}
    inputs = {port.name for port in engine.manifest.inputs}
    outputs = {port.name for port in engine.manifest.outputs}
    if "input_ids" not in inputs or not inputs <= known or LOGITS not in outputs:
        raise EngineError(
            f"{engine.folder}: takes {', '.join(sorted(inputs))} and gives {', '.join(sorted(outputs))}; "
            f"generation needs input_ids, optionally attention_mask and position_ids, and {LOGITS}. Use `run`."
        )
    if len({len(prompt) for prompt in prompts}) > 1 and inputs != known:
        raise EngineError(
            f"{engine.folder}: takes no {' and no '.join(sorted(known - inputs))}, so prompts of unequal length cannot "
            "share a batch. Generate them one at a time."
        )


def prompt_chunk(engine: Engine, batch: int, width: int) -> int:
    """Tokens of prompts padded to `width` that are read in one run: all, or as many as keep the logits small."""
    shape = next(port.shape for port in engine.manifest.outputs if port.name == LOGITS)
    vocabulary = shape[-1] if isinstance(shape[-1], int) else 1
    if shape[1] == 1 or engine.chooses_logits:
        return width
    return min(width, max(16, LOGITS_LIMIT // (4 * vocabulary * batch)))
