"""Coded weights that the sessions of one engine read from one place in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from effc.errors import EngineError
from effc.runtime.bundle import Manifest, SharedWeight
from effc.runtime.tensors import storage_dtype, to_ort


class SharedWeights:
    """Maps weight files once and hands the tensors in them to every session that is opened.

    Our kernels keep one copy of a weight for all sessions that read it at the same address.

    Args:
        folder: The engine folder.
        weights: The tensors; empty for an engine with one session.
        files: Names of the files the manifest has a hash for.

    Raises:
        EngineError: A tensor lies in none of the files, or beyond the end of its file.
    """

    def __init__(self, folder: Path, weights: Sequence[SharedWeight], files: Sequence[str]) -> None:
        self._maps: dict[str, np.memmap] = {}
        self._values: dict[str, ort.OrtValue] = {}
        for weight in weights:
            if weight.file not in files:
                raise EngineError(f"{folder}: weight {weight.name!r} lies in {weight.file!r}, which is no file of it.")
            if weight.file not in self._maps:
                self._maps[weight.file] = np.memmap(folder / weight.file, np.uint8, mode="c")
            self._values[weight.name] = _tensor(folder, self._maps[weight.file], weight)

    @classmethod
    def of(cls, folder: Path, manifest: Manifest) -> SharedWeights:
        """Those an engine needs: none without a filter."""
        weights = manifest.prompt_filter.weights if manifest.prompt_filter is not None else []
        return cls(folder, weights, list(manifest.files))

    def add_to(self, options: ort.SessionOptions) -> None:
        """Let a session that is opened with these options use them; they must outlive it."""
        for name, value in self._values.items():
            options.add_initializer(name, value)


def _tensor(folder: Path, content: np.memmap, weight: SharedWeight) -> ort.OrtValue:
    dtype = storage_dtype(weight.dtype)
    end = weight.offset + dtype.itemsize * int(np.prod(weight.shape, dtype=np.int64))
    if end > len(content):
        raise EngineError(f"{folder / weight.file}: ends before weight {weight.name!r}. Build the engine again.")
    array = content[weight.offset : end].view(np.ndarray).view(dtype).reshape(weight.shape)
    return to_ort(array, weight.dtype)
