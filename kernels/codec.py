"""Lossless coding of weight matrices: raw, huffman (disk), rank4 and rank3 (memory).

The byte layouts are specified in `docs/coded-weights.md`.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from effc.kernels import load

__all__ = [
    "CHUNK",
    "LAYOUTS",
    "CodedWeight",
    "CorruptWeightError",
    "Layout",
    "Prediction",
    "decode",
    "dtype_name",
    "encode",
    "exponent_histogram",
    "huffman_lengths",
    "is_bf16",
    "matmul",
    "predict",
    "tensor_names",
    "transcode",
    "widen",
]

Layout = Literal["raw", "huffman", "rank4", "rank3"]
DTypeName = Literal["float32", "float16", "bfloat16"]
Array = NDArray[Any]

LAYOUTS: tuple[Layout, ...] = ("raw", "huffman", "rank4", "rank3")
CHUNK = 16384
"""Symbols in one chunk of a Huffman stream."""

_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_TYPE_NUMBERS: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): 1,
    np.dtype(np.uint8): 2,
    np.dtype(np.uint16): 4,
    np.dtype(np.int32): 6,
    np.dtype(np.int64): 7,
    np.dtype(np.float16): 10,
    np.dtype(ml_dtypes.bfloat16): 16,
}
_NUMPY_TYPES = {number: dtype for dtype, number in _TYPE_NUMBERS.items()}


class CorruptWeightError(ValueError):
    """The tensors of a coded weight do not belong together or are damaged."""


@dataclass(frozen=True)
class CodedWeight:
    """A 2-D weight in one layout.

    Attributes:
        dtype: Element type of the original: `float32`, `float16` or `bfloat16`.
        shape: `(rows, columns)`.
        layout: One of `LAYOUTS`.
        tensors: The tensors in the order of `tensor_names(layout, dtype)`.
    """

    dtype: DTypeName
    shape: tuple[int, int]
    layout: Layout
    tensors: tuple[Array, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, overhead included; 0 for an empty weight."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def named(self) -> dict[str, Array]:
        """The tensors by name."""
        return dict(zip(tensor_names(self.layout, self.dtype), self.tensors, strict=True))


@dataclass(frozen=True)
class Prediction:
    """Bits per weight of a tensor, from its exponent histogram alone.

    Attributes:
        entropy_bits: Bits of information, exponents coded at their entropy.
        storage_bits: Layout huffman, overhead included (chunk padding at its mean).
        rank4_bits: Layout rank4, exact; infinite for float16, which has none.
        rank3_bits: Layout rank3, exact; infinite for float16.
    """

    entropy_bits: float
    storage_bits: float
    rank4_bits: float
    rank3_bits: float


class _Tensor(ctypes.Structure):
    """A tensor as the library sees it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 4),
    )


class _Memory:
    """Memory of the library that numpy arrays lean on; freed with the last of them."""

    def __init__(self, owner: int) -> None:
        self._owner = ctypes.c_void_p(owner)
        self._release: Callable[[ctypes.c_void_p], object] = load().effc_release_tensors

    def __del__(self) -> None:
        self._release(self._owner)


class _Region:
    """One tensor of a `_Memory`, readable through the array interface."""

    def __init__(self, memory: _Memory, address: int, nbytes: int) -> None:
        self._memory = memory
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (nbytes,), "data": (address, False)}


def _pointer(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _message() -> str:
    return str(load().effc_last_error().decode())


def dtype_name(dtype: np.dtype[Any]) -> DTypeName:
    """The name of the element type of a weight; ValueError for a type that cannot be coded."""
    for name, candidate in _DTYPES.items():
        if candidate == dtype:
            return name  # type: ignore[return-value]
    raise ValueError(f"a weight must be float32, float16 or bfloat16, not {dtype}")


def _number(dtype: str) -> int:
    if dtype not in _DTYPES:
        raise ValueError(f"unknown weight type {dtype!r}; choose one of {', '.join(_DTYPES)}")
    return _TYPE_NUMBERS[_DTYPES[dtype]]


def _layout_number(layout: str) -> int:
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS.index(layout)


def _threads(threads: int | None) -> int:
    return threads if threads is not None else len(os.sched_getaffinity(0))


def _contiguous(tensors: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(np.ascontiguousarray(t).reshape(np.shape(t)) for t in tensors)


def _as_structs(tensors: Sequence[Array]) -> Any:
    structs = (_Tensor * max(1, len(tensors)))()
    for struct, tensor in zip(structs, tensors):
        if tensor.dtype not in _TYPE_NUMBERS or tensor.ndim > 4:
            raise CorruptWeightError(f"no weight has a tensor of type {tensor.dtype} and rank {tensor.ndim}")
        struct.data = tensor.ctypes.data
        struct.type = _TYPE_NUMBERS[tensor.dtype]
        struct.rank = tensor.ndim
        struct.dims[: tensor.ndim] = tensor.shape
    return structs


def _spec(coded: CodedWeight) -> tuple[ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32]:
    rows, columns = coded.shape
    return (
        ctypes.c_int32(_number(coded.dtype)),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        ctypes.c_int32(_layout_number(coded.layout)),
    )


def tensor_names(layout: Layout, dtype: DTypeName) -> tuple[str, ...]:
    """Names of the tensors of a layout, in order.

    Raises:
        ValueError: There is no such layout for this type.
    """
    _number(dtype)
    low = () if dtype == "bfloat16" else ("low",)
    if layout == "raw":
        return ("weight",)
    if layout == "huffman":
        return ("sign_mantissa", "code_lengths", "stream", "chunk_offsets", *low)
    _layout_number(layout)
    if dtype == "float16":
        raise ValueError("float16 weights have no rank layout; use raw or huffman")
    return ("sign_mantissa", "codes", "table", "escapes", "row_escapes", *low)


def exponent_histogram(words: Array, threads: int | None = None) -> NDArray[np.uint64]:
    """Count the exponents of a float32, float16 or bfloat16 array.

    Args:
        words: Array of any shape. Of float32 the 8-bit exponent counts, of float16 the 5-bit one.
        threads: Threads to use; all of the process by default.

    Returns:
        256 counts.

    Raises:
        ValueError: Another element type.
    """
    words = np.ascontiguousarray(words)
    counts = np.zeros(256, np.uint64)
    number = ctypes.c_int32(_number(dtype_name(words.dtype)))
    status = load().effc_histogram(
        _pointer(words), number, ctypes.c_int64(words.size), ctypes.c_int32(_threads(threads)), _pointer(counts)
    )
    if status != 0:
        raise ValueError(_message())
    return counts


def is_bf16(words: NDArray[np.float32]) -> bool:
    """Tell whether a float32 array is a widened bfloat16 array: all low halves are zero."""
    if words.dtype != np.float32:
        raise ValueError(f"is_bf16 takes float32, not {words.dtype}")
    words = np.ascontiguousarray(words)
    return bool(load().effc_is_bf16(_pointer(words), ctypes.c_int64(words.size)))


def huffman_lengths(histogram: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Optimal code lengths of at most 12 bits.

    Args:
        histogram: 256 counts.

    Returns:
        256 lengths; 0 for absent symbols, 1 for a lone symbol.
    """
    counts = np.ascontiguousarray(histogram, np.uint64)
    if counts.shape != (256,):
        raise ValueError(f"a histogram has 256 counts, not shape {counts.shape}")
    lengths = np.zeros(256, np.uint8)
    if load().effc_huffman_lengths(_pointer(counts), _pointer(lengths)) != 0:
        raise ValueError(_message())
    return lengths


def encode(weight: Array, layout: Layout, threads: int | None = None) -> CodedWeight:
    """Encode a weight.

    Args:
        weight: `[rows, columns]` in float32, float16 or bfloat16.
        layout: One of `LAYOUTS`; float16 has no rank layout.
        threads: Threads to use; all of the process by default.

    Raises:
        ValueError: Another type or rank, or a layout the type does not have.
    """
    if weight.ndim != 2:
        raise ValueError(f"a coded weight is a matrix, not of shape {weight.shape}")
    dtype = dtype_name(weight.dtype)
    tensor_names(layout, dtype)
    raw = CodedWeight(dtype, (weight.shape[0], weight.shape[1]), "raw", (weight,))
    return transcode(raw, layout, threads)


def transcode(coded: CodedWeight, layout: Layout, threads: int | None = None) -> CodedWeight:
    """Bring a coded weight into another layout; tensors that stay the same are shared.

    Raises:
        CorruptWeightError: The tensors are damaged.
        ValueError: A layout the type does not have.
    """
    tensor_names(layout, coded.dtype)
    tensors = _contiguous(coded.tensors)
    out = (_Tensor * 6)()
    shared = (ctypes.c_int32 * 6)()
    owner = ctypes.c_void_p()
    count = load().effc_transcode(
        *_spec(coded),
        _as_structs(tensors),
        ctypes.c_size_t(len(tensors)),
        ctypes.c_int32(_layout_number(layout)),
        ctypes.c_int32(_threads(threads)),
        out,
        shared,
        ctypes.byref(owner),
    )
    if count < 0:
        raise CorruptWeightError(_message())
    memory = _Memory(owner.value or 0)
    made = tuple(tensors[shared[i]] if shared[i] >= 0 else _wrap(out[i], memory) for i in range(count))
    return CodedWeight(coded.dtype, coded.shape, layout, made)


def _wrap(struct: _Tensor, memory: _Memory) -> Array:
    dtype = _NUMPY_TYPES[struct.type]
    shape = tuple(struct.dims[: struct.rank])
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return np.empty(shape, dtype)
    return np.asarray(_Region(memory, struct.data, nbytes)).view(dtype).reshape(shape)


def decode(coded: CodedWeight, threads: int | None = None) -> Array:
    """Decode a weight to its original words.

    Returns:
        `[rows, columns]` of the original type, every bit as it was.

    Raises:
        CorruptWeightError: The tensors are damaged.
    """
    tensors = _contiguous(coded.tensors)
    out = np.empty(coded.shape, _DTYPES[coded.dtype])
    status = load().effc_decode(
        *_spec(coded),
        _as_structs(tensors),
        ctypes.c_size_t(len(tensors)),
        _pointer(out),
        ctypes.c_int32(_threads(threads)),
    )
    if status != 0:
        raise CorruptWeightError(_message())
    return out


@contextmanager
def _opened(coded: CodedWeight) -> Iterator[ctypes.c_void_p]:
    library = load()
    library.effc_open_weight.restype = ctypes.c_void_p
    tensors = _contiguous(coded.tensors)
    handle = library.effc_open_weight(
        *_spec(coded), _as_structs(tensors), ctypes.c_size_t(len(tensors)), ctypes.c_int32(_threads(None))
    )
    if handle is None:
        raise CorruptWeightError(_message())
    weight = ctypes.c_void_p(handle)
    try:
        yield weight
    finally:
        library.effc_close_weight(weight)


def matmul(x: NDArray[np.float32], coded: CodedWeight, threads: int = 1) -> NDArray[np.float32]:
    """Multiply by a raw, rank4 or rank3 weight with the kernels of the active instruction set.

    Args:
        x: `[m, columns]` float32.
        coded: The weight.
        threads: Threads to use.

    Returns:
        `x @ weight.T`, `[m, rows]` float32.

    Raises:
        CorruptWeightError: The tensors are damaged, or the layout is huffman.
        ValueError: `x` does not fit.
    """
    x = np.ascontiguousarray(x, np.float32)
    if x.ndim != 2 or x.shape[1] != coded.shape[1]:
        raise ValueError(f"x has shape {x.shape}, the weight {coded.shape}")
    y = np.zeros((x.shape[0], coded.shape[0]), np.float32)
    with _opened(coded) as weight:
        status = load().effc_product(
            weight, _pointer(x), ctypes.c_int64(x.shape[0]), _pointer(y), ctypes.c_int32(threads)
        )
    if status != 0:
        raise ValueError(_message())
    return y


def widen(coded: CodedWeight, begin: int = 0, end: int | None = None) -> NDArray[np.float32]:
    """Rows `[begin, end)` of a raw, rank4 or rank3 weight as float32, through the active kernels.

    Raises:
        CorruptWeightError: The tensors are damaged, or the layout is huffman.
        ValueError: Rows out of range.
    """
    end = coded.shape[0] if end is None else end
    out = np.empty((max(0, end - begin), coded.shape[1]), np.float32)
    with _opened(coded) as weight:
        status = load().effc_widen(weight, ctypes.c_int64(begin), ctypes.c_int64(end), _pointer(out))
    if status != 0:
        raise ValueError(_message())
    return out


def predict(histogram: NDArray[np.uint64], dtype: DTypeName, shape: tuple[int, int]) -> Prediction:
    """Bits per weight of each layout, without encoding.

    Args:
        histogram: 256 exponent counts of the weight.
        dtype: Its element type.
        shape: Its `(rows, columns)`.

    Raises:
        ValueError: The counts do not add up to the size.
    """
    counts = np.asarray(histogram, np.float64)
    rows, columns = shape
    total = rows * columns
    if int(np.asarray(histogram, np.uint64).sum()) != total:
        raise ValueError(f"the histogram counts {int(counts.sum())} weights, shape {shape} has {total}")
    if total == 0:
        return Prediction(0.0, 0.0, 0.0, 0.0)
    rest = {"bfloat16": 8.0, "float32": 24.0, "float16": 8 + 8 * math.ceil(3 * columns / 8) / columns}[dtype]
    used = counts[counts > 0] / total
    entropy = float(-(used * np.log2(used)).sum()) + (11 if dtype == "float16" else rest)
    lengths = huffman_lengths(histogram).astype(np.float64)
    payload = float((counts * lengths).sum()) if used.size > 1 else 0.0
    chunks = math.ceil(total / CHUNK)
    padding = 3.5 * chunks if used.size > 1 else 0.0
    storage = rest + (payload + padding + 64 * (chunks + 1) + 256 * 8) / total
    if dtype == "float16":
        return Prediction(entropy, storage, math.inf, math.inf)
    escapes = np.sort(counts)[::-1]
    tail = 32 * (rows + 1)
    rank4 = rest + 8 * (rows * math.ceil(columns / 128) * 64 + 16 + escapes[15:].sum()) / total + tail / total
    rank3 = rest + 8 * (rows * math.ceil(columns / 64) * 24 + 8 + escapes[7:].sum()) / total + tail / total
    return Prediction(entropy, storage, float(rank4), float(rank3))
