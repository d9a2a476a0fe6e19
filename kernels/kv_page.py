"""Pages of a quantized cache of keys and values, as `docs/cached-attention.md` specifies them.

For tests, tools and measurements; the op `effc.CachedAttention` reads and writes pages by itself.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from effc.kernels import load

__all__ = [
    "KeyScheme",
    "PageSpec",
    "ValueScheme",
    "decode",
    "encode",
    "linear_attention",
    "page_bytes",
    "scores",
    "values",
]

KeyScheme = Literal["channel", "balanced"]
ValueScheme = Literal["token", "separable"]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_KEY_SCHEMES: tuple[KeyScheme, ...] = ("channel", "balanced")
_VALUE_SCHEMES: tuple[ValueScheme, ...] = ("token", "separable")


@dataclass(frozen=True)
class PageSpec:
    """What the attributes of `effc.CachedAttention` say about a page.

    Attributes:
        head_size: Elements of a key.
        value_size: Elements of a value.
        page: Tokens of a page.
        key_bits: Bits of the keys of salient and of other tokens.
        value_bits: Bits of the values.
        salient: Tokens of the first class.
        key_scheme: `channel` or `balanced`.
        value_scheme: `token` or `separable`.
        key_group: Tokens that share parameters, 0: all.
        value_group: Channels that share parameters, 0: all.
    """

    head_size: int
    value_size: int
    page: int
    key_bits: tuple[int, int] = (8, 8)
    value_bits: tuple[int, int] = (8, 8)
    salient: int = 0
    key_scheme: KeyScheme = "channel"
    value_scheme: ValueScheme = "token"
    key_group: int = 0
    value_group: int = 0

    @property
    def two_classes(self) -> bool:
        """Whether a page holds tokens of both classes."""
        return 0 < self.salient < self.page


class _Spec(ctypes.Structure):
    """`effc::PageSpec`."""

    _fields_ = (
        ("head_size", ctypes.c_int64),
        ("value_size", ctypes.c_int64),
        ("page", ctypes.c_int64),
        ("key_bits", ctypes.c_int32 * 2),
        ("value_bits", ctypes.c_int32 * 2),
        ("salient", ctypes.c_int64),
        ("key_scheme", ctypes.c_int32),
        ("value_scheme", ctypes.c_int32),
        ("key_group", ctypes.c_int64),
        ("value_group", ctypes.c_int64),
    )


def _number(name: str, names: tuple[str, ...]) -> int:
    if name not in names:
        raise ValueError(f"unknown scheme {name!r} — choose one of: {', '.join(names)}")
    return names.index(name)


def _struct(spec: PageSpec) -> Any:
    return ctypes.byref(
        _Spec(
            spec.head_size,
            spec.value_size,
            spec.page,
            (ctypes.c_int32 * 2)(*spec.key_bits),
            (ctypes.c_int32 * 2)(*spec.value_bits),
            spec.salient,
            _number(spec.key_scheme, _KEY_SCHEMES),
            _number(spec.value_scheme, _VALUE_SCHEMES),
            spec.key_group,
            spec.value_group,
        )
    )


def _pointer(array: NDArray[Any] | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def _check(status: int) -> None:
    if status < 0:
        raise ValueError(load().effc_last_error().decode())


def _fit(name: str, array: NDArray[Any], shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape} — give {shape}")
    return np.ascontiguousarray(array, dtype)


def page_bytes(spec: PageSpec) -> int:
    """Bytes of a page.

    Raises:
        ValueError: No page can have this spec.
    """
    function = load().effc_page_bytes
    function.restype = ctypes.c_int64
    size = int(function(_struct(spec)))
    _check(size)
    return size


def encode(
    spec: PageSpec,
    keys: Floats,
    values: Floats,
    valid: NDArray[np.bool_] | None = None,
    importance: Floats | None = None,
    query_max: Floats | None = None,
) -> Bytes:
    """Encode pages with the kernels of the active instruction set.

    Args:
        spec: The page.
        keys: `[pages, page, head_size]` in token order.
        values: `[pages, page, value_size]`.
        valid: `[pages, page]`, false for tokens that nobody may see; all true by default.
        importance: `[pages, page]`, needed with two classes.
        query_max: `[head_size]`, the largest |q| of each channel, needed with balanced keys.

    Returns:
        `[pages, page_bytes(spec)]`.

    Raises:
        ValueError: A shape does not fit, an input is missing, or a valid token is not finite.
    """
    size = page_bytes(spec)
    count = keys.shape[0] if keys.ndim == 3 else -1
    keys = _fit("keys", keys, (count, spec.page, spec.head_size), np.float32)
    values = _fit("values", values, (count, spec.page, spec.value_size), np.float32)
    valid = np.ones((count, spec.page), bool) if valid is None else valid
    valid = _fit("valid", valid, (count, spec.page), np.bool_)
    if spec.two_classes:
        if importance is None:
            raise ValueError("a page of two classes needs the importance of its tokens")
        importance = _fit("importance", importance, (count, spec.page), np.float32)
    if spec.key_scheme == "balanced":
        if query_max is None:
            raise ValueError("balanced keys need query_max")
        query_max = _fit("query_max", query_max, (spec.head_size,), np.float32)
    pages = np.empty((count, size), np.uint8)
    status = load().effc_encode_pages(
        _struct(spec),
        ctypes.c_int64(count),
        _pointer(keys),
        _pointer(values),
        _pointer(valid),
        _pointer(importance),
        _pointer(query_max),
        _pointer(pages),
    )
    _check(status)
    return pages


def _fit_pages(spec: PageSpec, pages: Bytes) -> Bytes:
    count = pages.shape[0] if pages.ndim == 2 else -1
    return _fit("pages", pages, (count, page_bytes(spec)), np.uint8)


def decode(spec: PageSpec, pages: Bytes) -> tuple[Floats, Floats]:
    """Keys `[pages, page, head_size]` and values `[pages, page, value_size]` in stored order.

    Raises:
        ValueError: The pages do not fit the spec.
    """
    pages = _fit_pages(spec, pages)
    keys = np.empty((len(pages), spec.page, spec.head_size), np.float32)
    values = np.empty((len(pages), spec.page, spec.value_size), np.float32)
    status = load().effc_decode_pages(
        _struct(spec), ctypes.c_int64(len(pages)), _pointer(pages), _pointer(keys), _pointer(values)
    )
    _check(status)
    return keys, values


def scores(spec: PageSpec, pages: Bytes, queries: Floats) -> Floats:
    """Dot products of queries `[g, head_size]` with all keys: `[g, pages * page]` in stored order.

    Raises:
        ValueError: A shape does not fit the spec.
    """
    pages = _fit_pages(spec, pages)
    queries = _fit("queries", queries, (len(queries), spec.head_size), np.float32)
    out = np.empty((len(queries), len(pages) * spec.page), np.float32)
    status = load().effc_page_scores(
        _struct(spec),
        ctypes.c_int64(len(pages)),
        _pointer(pages),
        _pointer(queries),
        ctypes.c_int64(len(queries)),
        _pointer(out),
    )
    _check(status)
    return out


def values(spec: PageSpec, pages: Bytes, probabilities: Floats) -> Floats:
    """Sums of all values weighed by probabilities `[g, pages * page]` in stored order: `[g, value_size]`.

    Raises:
        ValueError: A shape does not fit the spec.
    """
    pages = _fit_pages(spec, pages)
    shape = (len(probabilities), len(pages) * spec.page)
    probabilities = _fit("probabilities", probabilities, shape, np.float32)
    out = np.zeros((len(probabilities), spec.value_size), np.float32)
    status = load().effc_page_values(
        _struct(spec),
        ctypes.c_int64(len(pages)),
        _pointer(pages),
        _pointer(probabilities),
        ctypes.c_int64(len(probabilities)),
        _pointer(out),
    )
    _check(status)
    return out


def linear_attention(spec: PageSpec, pages: Bytes, queries: Floats) -> Floats:
    """Attention without softmax, page by page as the op goes: `[g, value_size]` of queries `[g, head_size]`.

    Raises:
        ValueError: A shape does not fit the spec.
    """
    pages = _fit_pages(spec, pages)
    queries = _fit("queries", queries, (len(queries), spec.head_size), np.float32)
    out = np.empty((len(queries), spec.value_size), np.float32)
    status = load().effc_page_linear_attention(
        _struct(spec),
        ctypes.c_int64(len(pages)),
        _pointer(pages),
        _pointer(queries),
        ctypes.c_int64(len(queries)),
        _pointer(out),
    )
    _check(status)
    return out
