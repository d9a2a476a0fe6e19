"""Streams the initializers of graphs into one external-data file, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from effc.backends.base import Progress
from effc.ir.weights import tensor_shape

FILE_NAME = "weights.bin"
INLINE_BELOW = 1024
"""Initializers smaller than this many bytes stay in the graph file."""
PAGE = 4096
LINE = 64


def write_external_weights(
    graphs: Sequence[ir.Graph],
    folder: Path,
    progress: Progress | None = None,
    *,
    always: Collection[ir.TensorProtocol] = (),
) -> int:
    """Move the initializers of graphs to `weights.bin` and let them point there.

    Large tensors start on a page, so that a runtime can map them; small ones on a cache line. Initializers
    that share a tensor share its bytes, also those of different graphs.

    Args:
        graphs: Their initializers are replaced by external tensors.
        folder: Where the file is written.
        progress: Called with the bytes written.
        always: Tensors to write however small they are.

    Returns:
        Bytes of weights written, padding not counted.
    """
    small = {id(tensor) for tensor in always if tensor.nbytes}
    every = [value for graph in graphs for value in graph.initializers.values()]
    values = [value for value in every if _is_external(value.const_value) or id(value.const_value) in small]
    total = sum(
        {id(value.const_value): value.const_value.nbytes for value in values if value.const_value is not None}.values()
    )
    done = 0
    placed: dict[int, ir.ExternalTensor] = {}
    with (folder / FILE_NAME).open("wb") as file:
        for value in _largest_last(values):
            tensor = value.const_value
            assert tensor is not None
            if id(tensor) not in placed:
                placed[id(tensor)] = _append(file, tensor, folder)
                done += tensor.nbytes
                if progress is not None:
                    progress("write", done, total)
            value.const_value = _renamed(placed[id(tensor)], value.name or "", folder)
    if not values:
        (folder / FILE_NAME).unlink()
    return done


def _is_external(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and tensor.nbytes >= INLINE_BELOW and tensor.dtype != ir.DataType.STRING


def _largest_last(values: Iterable[ir.Value]) -> list[ir.Value]:
    """Small tensors together at the front waste no pages between them; graph order within each class."""
    return sorted(values, key=lambda value: value.const_value is not None and value.const_value.nbytes >= PAGE)


def _append(file: BinaryIO, tensor: ir.TensorProtocol, folder: Path) -> ir.ExternalTensor:
    alignment = PAGE if tensor.nbytes >= PAGE else LINE
    file.write(b"\0" * (-file.tell() % alignment))
    offset = file.tell()
    file.write(_content(tensor))
    length = file.tell() - offset
    return ir.ExternalTensor(
        FILE_NAME, offset, length, tensor.dtype, shape=_shape(tensor), name=tensor.name or "", base_dir=folder
    )


def _content(tensor: ir.TensorProtocol) -> bytes | memoryview:
    """The bytes of a tensor. Not `tofile`: NumPy's does not say why a write failed."""
    if tensor.dtype.bitwidth < 8:
        return tensor.tobytes()
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data


def _renamed(tensor: ir.ExternalTensor, name: str, folder: Path) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        FILE_NAME, tensor.offset, tensor.length, tensor.dtype, shape=_shape(tensor), name=name, base_dir=folder
    )


def _shape(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape(tensor_shape(tensor))
