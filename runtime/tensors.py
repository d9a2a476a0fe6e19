"""Arrays to and from onnxruntime, and the checks on what a caller feeds."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnxruntime as ort

from effc.errors import EngineError, UsageError
from effc.runtime.bundle import Port

WITHOUT_NUMPY = {"bfloat16": (np.uint16, 16), "float8_e4m3fn": (np.uint8, 17), "float8_e5m2": (np.uint8, 19)}
"""Element types numpy lacks: the type that carries their bits, and their number in ONNX's TensorProto.DataType."""


def storage_dtype(name: str) -> np.dtype:
    """The numpy dtype whose bytes hold an element type given by name.

    Raises:
        EngineError: The name is no element type.
    """
    try:
        return np.dtype(WITHOUT_NUMPY[name][0] if name in WITHOUT_NUMPY else name)
    except TypeError as error:
        raise EngineError(f"the manifest names the element type {name!r}, which is unknown. Upgrade effc.") from error


def to_ort(array: np.ndarray, dtype: str, device: str = "cpu") -> ort.OrtValue:
    """An OrtValue of the element type `dtype`; on the CPU it shares the array's memory.

    The OrtValue keeps the array alive, but an array made from it with `.numpy()` does not.
    """
    if dtype in WITHOUT_NUMPY:
        carrier, number = WITHOUT_NUMPY[dtype]
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(carrier), number)
    return ort.OrtValue.ortvalue_from_numpy(array, device)


def to_numpy(value: ort.OrtValue, dtype: str) -> np.ndarray:
    """The tensor as an array in its storage dtype.

    Nothing is copied from memory onnxruntime allocated, and the array keeps that alive. An array of an OrtValue made by
    `to_ort` lives only as long as that OrtValue.
    """
    if dtype not in WITHOUT_NUMPY:
        return value.numpy()
    carrier = np.dtype(WITHOUT_NUMPY[dtype][0])
    buffer = (ctypes.c_byte * value.tensor_size_in_bytes()).from_address(value.data_ptr())
    return np.frombuffer(buffer, carrier).reshape(value.shape()).copy()


def to_floats(array: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 of what a tensor of an element type holds; bfloat16 is carried as integers."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def to_stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 as a tensor of an element type holds it: to nearest, halves to even."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(array).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return array.astype(dtype)


def check_feeds(ports: Sequence[Port], feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Check names, dtypes, ranks and sizes of arrays against the inputs they are meant for.

    Args:
        ports: Inputs that must be fed, all of them.
        feeds: Input name -> array.

    Returns:
        Symbol name -> its size in these feeds.

    Raises:
        UsageError: A name is missing or unknown, or an array does not fit its port.
    """
    names = [port.name for port in ports]
    _check_names(names, feeds)
    symbols: dict[str, int] = {}
    origin: dict[str, str] = {}
    for port in ports:
        array = feeds[port.name]
        _check_array(port, array)
        for axis, (expected, size) in enumerate(zip(port.shape, array.shape)):
            if isinstance(expected, int):
                if size != expected:
                    raise UsageError(f"input {port.name!r}: axis {axis} is {size}, the engine takes {expected}.")
            elif symbols.setdefault(expected, size) != size:
                raise UsageError(
                    f"input {port.name!r}: axis {axis} ({expected}) is {size}, "
                    f"but {expected} is {symbols[expected]} in {origin[expected]!r}. Feed arrays that agree."
                )
            else:
                origin.setdefault(expected, port.name)
    return symbols


def _check_names(names: Sequence[str], feeds: Iterable[str]) -> None:
    unknown = sorted(set(feeds) - set(names))
    missing = [name for name in names if name not in set(feeds)]
    if unknown:
        raise UsageError(f"unknown input {', '.join(map(repr, unknown))}. The engine takes {', '.join(names)}.")
    if missing:
        raise UsageError(f"input {', '.join(map(repr, missing))} is missing. The engine takes {', '.join(names)}.")


def _check_array(port: Port, array: object) -> None:
    if not isinstance(array, np.ndarray):
        raise UsageError(f"input {port.name!r}: is a {type(array).__name__}, not a numpy array.")
    if array.dtype.name not in (port.dtype, storage_dtype(port.dtype).name):
        raise UsageError(
            f"input {port.name!r}: has dtype {array.dtype}, the engine takes {port.dtype}. "
            f"Convert it with .astype({port.dtype!r})."
        )
    if array.ndim != len(port.shape):
        shape = ", ".join(map(str, port.shape))
        raise UsageError(f"input {port.name!r}: has {array.ndim} axes, the engine takes [{shape}].")
