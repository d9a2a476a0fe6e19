"""Shortens long prompts to the tokens that matter, before the model reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from effc.errors import EngineError
from effc.runtime.bundle import CachePort, Manifest, Port
from effc.runtime.kv_state import port_shape
from effc.runtime.tensors import storage_dtype, to_ort

SCORES = "prompt_scores"
TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")


def choose_tokens(scores: np.ndarray, keep: int, forced: int) -> np.ndarray:
    """Places of the tokens that stay, ascending: `keep` of them, or all where there are fewer.

    Those forced come first, then the best scores; of equal ones the earlier.

    Args:
        scores: Float [tokens].
        keep: How many stay.
        forced: Tokens at the end that stay, fewer than `keep`, and then the first one too; 0: none.
    """
    count = len(scores)
    if count <= keep:
        return np.arange(count)
    order = np.argsort(-scores, kind="stable")
    if forced:
        fixed = np.array([0, *range(count - forced, count)])
        order = np.concatenate([fixed, order[~np.isin(order, fixed)]])
    return np.sort(order[:keep])


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
        known = {port.name for port in self._inputs} | {port.input for port in self._cache}
        if names != known or [value.name for value in session.get_outputs()] != [SCORES]:
            raise EngineError(
                f"{folder / self.entry.model}: is not the filter of this engine, its inputs or outputs are others. "
                "Build the engine again."
            )
        self._options = ort.RunOptions()
        # What a long prompt took is not needed again while its answer is generated.
        self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def shortened(self, ids: Sequence[int]) -> list[int]:
        """The tokens of a prompt that stay, in their order; the prompt itself where it has no more than `keep`."""
        if len(ids) <= self.entry.keep:
            return list(ids)
        return [ids[place] for place in choose_tokens(self.scores(ids), self.entry.keep, self.entry.forced)]

    def scores(self, ids: Sequence[int]) -> np.ndarray:
        """Float32 [tokens]: how much each token of a prompt matters to the last one.

        Raises:
            EngineError: onnxruntime refused the run.
        """
        count = len(ids)
        tokens: Mapping[str, np.ndarray] = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, count), np.int64),
            "position_ids": np.arange(count, dtype=np.int64)[None],
        }
        feeds = {port.name: to_ort(tokens[port.name].astype(port.dtype), port.dtype) for port in self._inputs}
        for port in self._cache:
            feeds[port.input] = to_ort(np.zeros(port_shape(port, 1, 0), storage_dtype(port.dtype)), port.dtype)
        try:
            (result,) = self._session.run_with_ort_values([SCORES], feeds, self._options)
        except Exception as error:  # onnxruntime's errors have no common base of their own
            raise EngineError(f"{self._folder}: the filter failed on {count} tokens: {error}") from error
        return np.array(result.numpy()[0])
