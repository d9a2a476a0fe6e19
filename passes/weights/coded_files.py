"""Tensors of a coded weight in one file of the store: an 8-byte header length, a JSON header, the bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from effc.errors import OutputError
from effc.ir.store import Store
from effc.ir.weights import file_tensor

FORMAT_VERSION = 1
"""Part of every key: raise it when the bytes of a layout change."""


def save_tensors(store: Store, key: str, arrays: Sequence[np.ndarray]) -> Path:
    """Write arrays under a key.

    Returns:
        The file.

    Raises:
        OutputError: The store cannot be written.
    """
    entries = [{"dtype": array.dtype.name, "shape": list(array.shape)} for array in arrays]
    header = json.dumps(entries).encode("ascii")
    with store.writing(key) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for array in arrays:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    path = store.find(key)
    if path is None:
        raise OutputError(f"{store.folder}: the cache entry {key} vanished. Is another process clearing the cache?")
    return path


def load_tensors(path: Path, names: Sequence[str]) -> list[ir.LazyTensor]:
    """The arrays of a file as lazy tensors with the given names, in order."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    offset = 8 + length
    tensors = []
    for name, entry in zip(names, entries, strict=True):
        dtype = ir.DataType.from_numpy(np.dtype(entry["dtype"]))
        shape = tuple(entry["shape"])
        tensors.append(file_tensor(path, offset, dtype, shape, name))
        offset += int(np.prod(shape, dtype=np.int64)) * np.dtype(entry["dtype"]).itemsize
    return tensors
