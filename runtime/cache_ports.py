"""Shapes of cache tensors, and what of them a number of tokens needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from effc.errors import EngineError
from effc.runtime.bundle import CacheLayout, CachePort
from effc.runtime.prefix_inputs import tokens_elsewhere
from effc.runtime.tensors import storage_dtype

BATCH, PAST = "batch", "past"
"""The symbols a cache shape may hold; `past // P` are whole pages of P tokens."""


def port_shape(port: CachePort, batch: int, past: int) -> tuple[int, ...]:
    """Shape of a cache tensor for a batch and a length.

    Raises:
        EngineError: The shape holds a symbol other than `batch`, `past` and `past // P`.
    """
    return tuple(_axis_size(port, axis, batch, past) for axis in range(len(port.shape)))


def cache_bytes(layout: CacheLayout, length: int, batch: int = 1) -> dict[str, int]:
    """Cache input name -> bytes it takes for a number of tokens, without spare capacity."""
    return {
        port.input: math.prod(port_shape(port, batch, length)) * storage_dtype(port.dtype).itemsize
        for port in layout.ports
    }


def check_snapshot(
    layout: CacheLayout,
    tensors: Mapping[str, np.ndarray],
    length: int,
    inputs: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> None:
    """Compare tensors with what the cache of one row holds after a number of tokens.

    Args:
        layout: Of the engine.
        tensors: Cache input name -> tensor.
        length: Tokens, those that inputs stand for included.
        inputs: What a prefix brings beside its cache.

    Raises:
        EngineError: A tensor is missing, unknown, or has another dtype or shape.
    """
    names = {port.input for port in layout.ports}
    if difference := ", ".join(sorted(names ^ set(tensors))):
        raise EngineError(f"the saved cache and that of the engine differ in {difference}. Compute it again.")
    elsewhere = tokens_elsewhere(layout, inputs)
    for port in layout.ports:
        array, shape = tensors[port.input], port_shape(port, 1, length - elsewhere.get(port.input, 0))
        if array.dtype != storage_dtype(port.dtype) or array.shape != shape:
            raise EngineError(
                f"the saved cache tensor {port.input!r} is {array.dtype}{list(array.shape)}, the engine has "
                f"{port.dtype}{list(shape)} after {length} tokens. Compute it again."
            )


def _axis_size(port: CachePort, axis: int, batch: int, past: int) -> int:
    size = port.shape[axis]
    if isinstance(size, int):
        return size
    if size == BATCH:
        return batch
    name, _, page = size.partition("//")
    if name.strip() != PAST or not (page.strip() or "1").isdigit() or page.strip() == "0":
        raise EngineError(
            f"cache input {port.input!r}: its shape has the unknown symbol {size!r}. Upgrade effc, or build it again."
        )
    return past // int(page or 1)


def growing_axis(port: CachePort) -> int | None:
    """The axis that grows with the tokens; None for a tensor of fixed size."""
    growing = [axis for axis, size in enumerate(port.shape) if isinstance(size, str) and size != BATCH]
    return growing[0] if growing else None


def kept_slices(port: CachePort, length: int) -> tuple[slice, ...]:
    """Index of what `length` tokens need of a tensor."""
    axis = growing_axis(port)
    return () if axis is None else (slice(None),) * axis + (slice(_axis_size(port, axis, 1, length)),)


def put_last(port: CachePort, array: np.ndarray, length: int, held: np.ndarray) -> None:
    """Write into every row what one row holds of the last of `length` tokens; memory of those before is not touched."""
    axis = growing_axis(port)
    if axis is None:
        array[:] = held
        return
    end = _axis_size(port, axis, 1, length)
    array[(slice(None),) * axis + (slice(end - held.shape[axis], end),)] = held


def held_cache(port: CachePort, batch: int, length: int, held: np.ndarray) -> np.ndarray:
    """The tensor after `length` tokens in every row, of which one row is given, where it lies if it will do."""
    shape = port_shape(port, batch, length)
    if held.shape[1:] == shape[1:]:
        return np.ascontiguousarray(np.broadcast_to(held, shape))
    array = np.zeros(shape, held.dtype)
    put_last(port, array, length, held)
    return array
