"""The padded inputs of prompts that are read and continued together, and their cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from effc.errors import EngineError, UsageError
from effc.runtime import limits

if TYPE_CHECKING:
    from effc.runtime.kv_state import KvState
    from effc.runtime.prefix import Prefix
    from effc.runtime.session import Engine

LOGITS = "logits"
LOGITS_LIMIT = 256 << 20
"""Bytes of logits one prefill run may produce; a single long prompt is split to stay below."""


class Batch:
    """Rows of token ids, padded on the left, and the cache they fill.

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
        _check_interface(engine, prompts)
        self.width = max(map(len, prompts))
        total = (prefix.length if prefix else 0) + self.width + steps - 1
        self._pad = limits.pad_id(engine.manifest.config, engine.assets)
        self._ids = np.full((len(prompts), self.width), self._pad, np.int64)
        self._mask = np.ones((len(prompts), total), np.int64)
        for row, prompt in enumerate(prompts):
            start = self.width - len(prompt)
            self._ids[row, start:] = prompt
            self._mask[row, :start] = 0
        self._starts = np.array([[self.width - len(prompt)] for prompt in prompts], np.int64)
        self._dtypes = {port.name: np.dtype(port.dtype) for port in engine.manifest.inputs}
        self.state: KvState = engine.new_state(len(prompts), max_length=total)
        if prefix is not None:
            self.state.restore(prefix.tensors, prefix.length, prefix.clusters)

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
        start, end = self.state.length, self.state.length + ids.shape[1]
        feeds = {
            "input_ids": ids,
            "attention_mask": self._mask[:, :end],
            # Padding gets position 0; a row counts from its own first token.
            "position_ids": np.maximum(np.arange(start, end)[None, :] - self._starts, 0) * running,
        }
        taken = {name: feeds[name].astype(dtype, copy=False) for name, dtype in self._dtypes.items()}
        outputs = self.state.run(taken, [LOGITS] if wanted else [], num_logits=1)
        return outputs[LOGITS][:, -1] if wanted else np.empty(0)


def check_task(engine: Engine) -> None:
    """Refuse an engine that does not generate.

    Raises:
        UsageError: Its task is another one.
    """
    if engine.task != "causal-lm":
        raise UsageError(f"{engine.folder}: its task is {engine.task}, only causal-lm engines generate text.")


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
