"""Coded weights that the sessions of one engine read from one place in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from effc.errors import EngineError
from effc.runtime.bundle import Manifest, SharedWeight
from effc.runtime.tensors import storage_dtype, to_ort


def weight_array(folder: Path, weight: SharedWeight) -> np.ndarray:
    """A weight where it lies in its file, which is only read.

    Raises:
        EngineError: It lies beyond the end of the file.
    """
    return _array(folder, np.memmap(folder / weight.file, np.uint8, mode="r"), weight)


class SharedWeights:
    """Maps weight files once and hands the tensors in them to every session that is opened.

    Our kernels keep one copy of a weight for all sessions that read it at the same address.

    Args:
        folder: The engine folder.
        weights: The tensors; empty for an engine with one session.

    Raises:
        EngineError: A tensor lies beyond the end of its file.
    """

    def __init__(self, folder: Path, weights: Sequence[SharedWeight]) -> None:
        self._maps: dict[str, np.memmap] = {}
        self._values: dict[str, ort.OrtValue] = {}
        for weight in weights:
            if weight.file not in self._maps:
                self._maps[weight.file] = np.memmap(folder / weight.file, np.uint8, mode="c")
            self._values[weight.name] = to_ort(_array(folder, self._maps[weight.file], weight), weight.dtype)

    @classmethod
    def of(cls, folder: Path, manifest: Manifest) -> SharedWeights:
        """Those an engine needs: none without a filter."""
        weights = manifest.prompt_filter.weights if manifest.prompt_filter is not None else []
        return cls(folder, weights)

    def add_to(self, options: ort.SessionOptions) -> None:
        """Let a session that is opened with these options use them; they must outlive it."""
        for name, value in self._values.items():
            options.add_initializer(name, value)


def _array(folder: Path, content: np.memmap, weight: SharedWeight) -> np.ndarray:
    dtype = storage_dtype(weight.dtype)
    end = weight.offset + dtype.itemsize * int(np.prod(weight.shape, dtype=np.int64))
    if end > len(content):
        raise EngineError(f"{folder / weight.file}: ends before weight {weight.name!r}. Build the engine again.")
    return content[weight.offset : end].view(np.ndarray).view(dtype).reshape(weight.shape)
