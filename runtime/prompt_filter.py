"""Shortens long prompts to the tokens that matter, before the model reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from effc.errors import EngineError
from effc.runtime.bundle import CachePort, Manifest, Port
from effc.runtime.kv_state import port_shape
from effc.runtime.prefix_inputs import empty_input, prefix_ports
from effc.runtime.tensors import storage_dtype, to_ort

if TYPE_CHECKING:
    from effc.runtime.prefix import Prefix

SCORES = "prompt_scores"
TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")


def choose_tokens(scores: np.ndarray, keep: int, fixed: Sequence[int]) -> np.ndarray:
    """Places of the tokens that stay, ascending: `keep` of them, or all where there are fewer.

    Those at `fixed` places, at most `keep`, come first, then the best scores; of equal ones the earlier.

    Args:
        scores: Float [tokens].
        keep: How many stay.
        fixed: Places of tokens that stay in any case.
    """
    count = len(scores)
    if count <= keep:
        return np.arange(count)
    order = np.argsort(-scores, kind="stable")
    first = np.array(fixed, order.dtype)
    return np.sort(np.concatenate([first, order[~np.isin(order, first)]])[:keep])


def fixed_places(count: int, forced: int, begins: bool) -> list[int]:
    """Places of tokens that stay whatever their scores: the last `forced`, and with any of them the first.

    Args:
        count: Tokens of the prompt, more than `forced`.
        forced: How many at its end; 0: none at all.
        begins: Whether the prompt is the beginning of the text. After a prefix its first token is one like others.
    """
    return [*([0] if forced and begins else []), *range(count - forced, count)]


class PromptFilter:
    """The graph that scores the tokens of a prompt.

    Args:
        folder: The engine folder.
        manifest: Its manifest, with a filter.
        session: Of the filter's graph.

    Raises:
        EngineError: The graph is not one that scores a prompt of this engine.
    """

    def __init__(self, folder: Path, manifest: Manifest, session: ort.InferenceSession) -> None:
        assert manifest.prompt_filter is not None
        self.entry = manifest.prompt_filter
        self._folder = folder
        self._session = session
        names = {value.name for value in session.get_inputs()}
        self._inputs: list[Port] = [port for port in manifest.inputs if port.name in names & {*TOKEN_INPUTS}]
        cache = manifest.cache.ports if manifest.cache is not None else []
        self._cache: list[CachePort] = [port for port in cache if port.input in names]
        ports = prefix_ports(manifest.cache) if manifest.cache is not None else []
        self._prefix_inputs: list[Port] = [port for port in ports if port.name in names]
        known = {port.name for port in (*self._inputs, *self._prefix_inputs)} | {port.input for port in self._cache}
        if names != known or [value.name for value in session.get_outputs()] != [SCORES]:
            raise EngineError(
                f"{folder / self.entry.model}: is not the filter of this engine, its inputs or outputs are others. "
                "Build the engine again."
            )
        self._options = ort.RunOptions()
        # What a long prompt took is not needed again while its answer is generated.
        self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def shortened(self, ids: Sequence[int], prefix: Prefix | None = None) -> list[int]:
        """The tokens of a prompt that stay, in their order; the prompt itself where it has no more than `keep`.

        Args:
            ids: The prompt.
            prefix: What it follows, of which everything stays.
        """
        keep, count = self.entry.keep, len(ids)
        if count <= keep:
            return list(ids)
        fixed = fixed_places(count, self.entry.forced, prefix is None)
        return [ids[place] for place in choose_tokens(self.scores(ids, prefix), keep, fixed)]

    def scores(self, ids: Sequence[int], prefix: Prefix | None = None) -> np.ndarray:
        """Float32 [tokens]: how much each token of a prompt matters to the last one.

        Args:
            ids: The prompt.
            prefix: What it follows; the layers read its cache.

        Raises:
            EngineError: onnxruntime refused the run.
        """
        past = 0 if prefix is None else prefix.length
        total = past + len(ids)
        tokens: Mapping[str, np.ndarray] = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total, dtype=np.int64)[None],
        }
        feeds = {port.name: to_ort(tokens[port.name].astype(port.dtype), port.dtype) for port in self._inputs}
        for port in self._cache:
            feeds[port.input] = to_ort(_past(port, prefix), port.dtype)
        for empty in self._prefix_inputs:  # several tokens read everything
            feeds[empty.name] = to_ort(empty_input(empty), empty.dtype)
        try:
            (result,) = self._session.run_with_ort_values([SCORES], feeds, self._options)
        except Exception as error:  # onnxruntime's errors have no common base of their own
            raise EngineError(f"{self._folder}: the filter failed on {len(ids)} tokens: {error}") from error
        return np.array(result.numpy()[0])


def _past(port: CachePort, prefix: Prefix | None) -> np.ndarray:
    """What the cache of one row holds before the prompt."""
    if prefix is None:
        return np.zeros(port_shape(port, 1, 0), storage_dtype(port.dtype))
    return np.ascontiguousarray(prefix.tensors[port.input])
