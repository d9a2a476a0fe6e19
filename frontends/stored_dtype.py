"""The dtype weights are stored in: the source's own, or the one the user asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from effc.errors import UsageError
from effc.frontends.binding import Weights
from effc.ir.weights import computed_tensor

FLOATS = {
    "float32": ir.DataType.FLOAT,
    "bfloat16": ir.DataType.BFLOAT16,
    "float16": ir.DataType.FLOAT16,
}


def parse(dtype: str | None) -> ir.DataType | None:
    """The element type a user names.

    Raises:
        UsageError: It is none of `float32`, `bfloat16`, `float16`.
    """
    if dtype is None:
        return None
    if dtype not in FLOATS:
        choices = ", ".join(FLOATS)
        raise UsageError(f"dtype {dtype!r} is unknown; choose {choices}, or leave it out to keep the source's.")
    return FLOATS[dtype]


def keep_or_cast(weights: Weights, dtype: ir.DataType | None) -> tuple[Weights, tuple[str, ...]]:
    """The weights as they are, or every float matrix and vector rounded to `dtype` when it is read."""
    if dtype is None:
        return weights, ()
    tensors = {name: cast(tensor, dtype) for name, tensor in weights.tensors.items()}
    changed = sum(tensors[name] is not tensor for name, tensor in weights.tensors.items())
    notes = (f"{changed} weights are stored as {dtype.name.lower()} as asked (rounded to nearest even).",)
    return replace(weights, tensors=tensors), notes if changed else ()


def cast(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """The tensor in another float type, converted when it is read; itself when there is nothing to do."""
    if tensor.dtype not in (*FLOATS.values(), ir.DataType.DOUBLE) or tensor.dtype == dtype:
        return tensor
    shape = tuple(int(size) for size in tensor.shape)  # type: ignore[arg-type]

    def convert() -> np.ndarray:
        return tensor.numpy().astype(dtype.numpy())

    return computed_tensor(convert, dtype, shape, tensor.name or "")
