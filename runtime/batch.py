"""Rows of tokens that an engine reads step by step, and their cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from effc.errors import EngineError, UsageError
from effc.runtime import limits
from effc.runtime.surprise import TOKEN_SCORES, TokenScores

if TYPE_CHECKING:
    from effc.runtime.kv_state import KvState
    from effc.runtime.prefix import Prefix
    from effc.runtime.session import Engine

LOGITS = "logits"
TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
LOGITS_LIMIT = 256 << 20
"""Bytes of logits one prefill run may produce; a single long prompt is split to stay below."""


READ_PARTS = 8
"""A prompt whose tokens compete by their surprise is read in parts of one in so many of what a run may have at most:
what a part leaves behind is chosen before the next one is known."""


class TokenRows:
    """Rows of token ids of one length, and the cache they fill.

    Args:
        engine: The engine.
        starts: Slot of the first token of each row; what is before it is padding.
        most: Most tokens a row will have, padding included; None for no bound.

    Attributes:
        state: The cache.
        scores: What the tokens are worth, where the engine asks for it.
    """

    def __init__(self, engine: Engine, starts: Sequence[int], most: int | None) -> None:
        self._starts = np.array(starts, np.int64)[:, None]
        self._dtypes = {port.name: np.dtype(port.dtype) for port in engine.manifest.inputs}
        self.state: KvState = engine.new_state(len(starts), max_length=most)
        self.scores = TokenScores(starts) if TOKEN_SCORES in self._dtypes else None

    def read(self, ids: np.ndarray, *, running: np.ndarray | int = 1, wanted: bool = True) -> np.ndarray:
        """Append tokens; logits [batch, vocabulary] after the last ones.

        Args:
            ids: int64[batch, seq].
            running: 0 in a row that has ended: [batch, 1].
            wanted: Whether there are to be logits.
        """
        start, end = self.state.length, self.state.length + ids.shape[1]
        slots = np.arange(end)[None, :]
        feeds = {
            "input_ids": ids,
            "attention_mask": (slots >= self._starts).astype(np.int64),
            # Padding gets position 0; a row counts from its own first token.
            "position_ids": np.maximum(slots[:, start:] - self._starts, 0) * running,
        }
        if self.scores is not None:
            feeds[TOKEN_SCORES] = self.scores.values(end)
        taken = {name: feeds[name].astype(dtype, copy=False) for name, dtype in self._dtypes.items()}
        if self.scores is None:
            outputs = self.state.run(taken, [LOGITS] if wanted else [], num_logits=1)
        else:
            outputs = self.state.run(taken, [LOGITS])
            self.scores.add(ids, outputs[LOGITS])
        return outputs[LOGITS][:, -1] if wanted else np.empty(0)


class Batch:
    """Prompts, padded on the left, that are read and continued together.

    Args:
        engine: The engine.
        prompts: Ids of every row; after a prefix, all of one length.
        steps: Most tokens any row gets.
        prefix: What the cache of every row begins with.

    Raises:
        EngineError: The engine has inputs that are not made from tokens, or lacks those that padding needs.

    Attributes:
        width: Tokens of every padded prompt.
        state: The cache.
    """

    def __init__(
        self, engine: Engine, prompts: Sequence[Sequence[int]], steps: int, prefix: Prefix | None = None
    ) -> None:
        check_interface(engine)
        _check_padding(engine, prompts)
        self.width = max(map(len, prompts))
        total = (prefix.length if prefix else 0) + self.width + steps - 1
        self._pad = limits.pad_id(engine.manifest.config, engine.assets)
        self._ids = np.full((len(prompts), self.width), self._pad, np.int64)
        for row, prompt in enumerate(prompts):
            start = self.width - len(prompt)
            self._ids[row, start:] = prompt
        self._rows = TokenRows(engine, [self.width - len(prompt) for prompt in prompts], total)
        self.state = self._rows.state
        if prefix is not None:
            self.state.restore(prefix.tensors, prefix.length, prefix.inputs)

    def prefill(self, chunk: int) -> np.ndarray:
        """Read the prompts, `chunk` tokens in a run; logits [batch, vocabulary] after their last tokens."""
        logits = np.empty(0)
        for start in range(0, self.width, chunk):
            last = start + chunk >= self.width
            logits = self._rows.read(self._ids[:, start : start + chunk], wanted=last)
        return logits

    def step(self, tokens: Sequence[int | None]) -> np.ndarray:
        """Append one token to every row, padding where it is None; logits [batch, vocabulary]."""
        column = [[self._pad if token is None else token] for token in tokens]
        # A row that has ended no longer counts on: it could pass the model's last position.
        running = np.array([[token is not None] for token in tokens], np.int64)
        return self._rows.read(np.array(column, np.int64), running=running)


def check_task(engine: Engine) -> None:
    """Refuse an engine that does not generate.

    Raises:
        UsageError: Its task is another one.
    """
    if engine.task != "causal-lm":
        raise UsageError(f"{engine.folder}: its task is {engine.task}, only causal-lm engines generate text.")


def check_interface(engine: Engine) -> None:
    """Refuse an engine that takes more than tokens, or gives no logits.

    Raises:
        EngineError: It has other inputs, or outputs.
    """
    inputs = {port.name for port in engine.manifest.inputs}
    outputs = {port.name for port in engine.manifest.outputs}
    if "input_ids" not in inputs or not inputs <= {*TOKEN_INPUTS, TOKEN_SCORES} or LOGITS not in outputs:
        raise EngineError(
            f"{engine.folder}: takes {', '.join(sorted(inputs))} and gives {', '.join(sorted(outputs))}; "
            f"generation needs input_ids, optionally attention_mask and position_ids, and {LOGITS}. Use `run`."
        )


def _check_padding(engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
    missing = {*TOKEN_INPUTS} - {port.name for port in engine.manifest.inputs}
    if len({len(prompt) for prompt in prompts}) > 1 and missing:
        raise EngineError(
            f"{engine.folder}: takes no {' and no '.join(sorted(missing))}, so prompts of unequal length cannot "
            "share a batch. Generate them one at a time."
        )


def prompt_chunk(engine: Engine, batch: int, width: int) -> int:
    """Tokens of prompts padded to `width` that are read in one run.

    All, or as many as keep the logits small. With an engine that asks what tokens are worth, fewer than it takes, so
    that a part has been scored when the next one makes it compete.
    """
    shape = next(port.shape for port in engine.manifest.outputs if port.name == LOGITS)
    vocabulary = shape[-1] if isinstance(shape[-1], int) else 1
    small = max(16, LOGITS_LIMIT // (4 * vocabulary * batch))
    if takes_scores(engine):
        if shape[1] == 1 and not engine.chooses_logits:
            return 1
        most = engine.cache_layout().longest_step or width
        return min(width, small, max(1, most // READ_PARTS))
    if shape[1] == 1 or engine.chooses_logits:
        return width
    return min(width, small)


def takes_scores(engine: Engine) -> bool:
    """Whether the cache of an engine asks what tokens are worth."""
    return any(port.name == TOKEN_SCORES for port in engine.manifest.inputs)
