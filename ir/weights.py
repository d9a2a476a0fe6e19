"""Lazy weights: tensors that read their bytes from a file each time they are asked, and keep nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from effc.errors import InputError


def file_tensor(path: Path, offset: int, dtype: ir.DataType, shape: tuple[int, ...], name: str) -> ir.LazyTensor:
    """A weight that lies in a file as raw little-endian bytes.

    Args:
        path: The file.
        offset: First byte of the tensor in the file.
        dtype: Its element type; 4-bit types are packed two a byte.
        shape: Its shape.
        name: Its name, used in errors.

    Returns:
        A tensor that reads the file at every access, so no page of it stays mapped or cached here.

    Raises:
        InputError: On access, when the file ends before the tensor does.
    """
    count = int(np.prod(shape, dtype=np.int64))
    nbytes = (count * dtype.bitwidth + 7) // 8

    def read() -> ir.TensorProtocol:
        with path.open("rb") as file:
            file.seek(offset)
            data = np.fromfile(file, dtype=np.uint8, count=nbytes)
        if data.nbytes != nbytes:
            raise InputError(
                f"{path}: tensor {name!r} needs {nbytes} bytes at offset {offset}, the file has {data.nbytes}. "
                "The file is truncated: download or export it again."
            )
        return _as_tensor(data, dtype, shape, name)

    return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=name)


def computed_tensor(
    compute: Callable[[], np.ndarray], dtype: ir.DataType, shape: tuple[int, ...], name: str
) -> ir.LazyTensor:
    """A weight that is computed from others each time it is asked for (dequantised, permuted, cast).

    Args:
        compute: Returns an array of exactly `shape` and the numpy form of `dtype`.
        dtype: Element type.
        shape: Shape.
        name: Name.
    """

    def evaluate() -> ir.Tensor:
        array = np.ascontiguousarray(compute())
        if array.shape != shape or array.dtype != dtype.numpy():
            raise InputError(
                f"weight {name!r}: expected {dtype.name}{list(shape)}, its source gave "
                f"{array.dtype}{list(array.shape)}. "
                "The checkpoint does not fit the configuration."
            )
        return ir.Tensor(array, dtype=dtype, shape=ir.Shape(shape), name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name)


def _as_tensor(data: np.ndarray, dtype: ir.DataType, shape: tuple[int, ...], name: str) -> ir.TensorProtocol:
    if dtype.bitwidth < 8:
        return ir.PackedTensor(data, dtype, shape=ir.Shape(shape), name=name)
    return ir.Tensor(data.view(dtype.numpy()).reshape(shape), dtype=dtype, shape=ir.Shape(shape), name=name)


def tensor_shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a tensor as plain ints."""
    return tuple(dim for dim in tensor.shape if isinstance(dim, int))


def is_weight(value: ir.Value | None) -> bool:
    """Whether the value is an initializer with a known tensor and not also a graph input."""
    return value is not None and value.is_initializer() and value.const_value is not None
