"""How a `CachedAttention` keeps its tokens: the attributes of each storage, its tensors and their bytes.

`docs/cached-attention.md` gives the exact meaning of every attribute and byte.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import onnx_ir as ir

from effc.errors import InputError

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Types in which a token can be kept as it is."""
BITS = (2, 4, 8, 16)
LANE_BLOCK = 16
"""Tokens of a class come in multiples of this; bytes of a word of codes; alignment of the parts of a page."""
MOST_TOKENS = 256
"""Of a page: the order of its tokens is bytes."""
PAST, BATCH = "past", "batch"


@dataclass(frozen=True)
class HeadSizes:
    """Sizes that the tensors of a cache depend on: key/value heads, elements of a key and of a value, query heads."""

    kv_heads: int
    head_size: int
    value_size: int
    heads: int = 0


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a cache.

    Attributes:
        name: Last part of its name: `key` in `past_key_values.0.key`.
        dtype: Element type.
        shape: `batch`, kv heads, an axis of tokens or pages, and elements. An axis that grows is `past` or `past // P`.
    """

    name: str
    dtype: ir.DataType
    shape: tuple[int | str, ...]

    def bytes_at(self, tokens: int) -> int:
        """Bytes one row needs for this many tokens."""
        sizes = [_axis(axis, tokens) for axis in self.shape]
        return prod(sizes) * self.dtype.bitwidth // 8


def _axis(axis: int | str, tokens: int) -> int:
    if isinstance(axis, int):
        return axis
    if axis == BATCH:
        return 1
    return tokens // int(axis.partition("//")[2] or 1)


class Storage(ABC):
    """A storage: frozen, checked when it is made.

    Class attributes:
        kind: Value of the attribute `storage`.
    """

    kind: ClassVar[str]

    @abstractmethod
    def attributes(self) -> dict[str, int | str | tuple[int, ...]]:
        """The attributes that are not those of no storage."""

    @abstractmethod
    def tensors(self, sizes: HeadSizes) -> tuple[StateTensor, ...]:
        """The tensors of the cache, in the order of the op."""

    @abstractmethod
    def stored_bits(self, sizes: HeadSizes) -> tuple[float, float]:
        """Bits an element takes in the long run, without and with parameters."""

    def bytes_at(self, sizes: HeadSizes, tokens: int) -> int:
        """Bytes one row of one layer needs for this many tokens."""
        return sum(tensor.bytes_at(tokens) for tensor in self.tensors(sizes))

    def code_bytes_at(self, sizes: HeadSizes, tokens: int) -> int:
        """The same without parameters, padding and statistics, as papers count."""
        return self.bytes_at(sizes, tokens)


@dataclass(frozen=True)
class DenseStorage(Storage):
    """Every token as it is, or the last `ring` ones.

    Attributes:
        dtype: FLOAT, FLOAT16 or BFLOAT16.
        ring: Places of a ring; 0: slot j at place j.

    Raises:
        InputError: A value that the op does not have.
    """

    kind: ClassVar[str] = "dense"
    dtype: ir.DataType = ir.DataType.FLOAT
    ring: int = 0

    def __post_init__(self) -> None:
        _require_float("cache", self.dtype)
        _require(self.ring >= 0, f"ring is {self.ring}, it must be 0 or more")

    def attributes(self) -> dict[str, int | str | tuple[int, ...]]:
        """`ring`."""
        return {"ring": self.ring}

    def tensors(self, sizes: HeadSizes) -> tuple[StateTensor, ...]:
        """`key` and `value`."""
        length = self.ring or PAST
        return tuple(
            StateTensor(name, self.dtype, (BATCH, sizes.kv_heads, length, size))
            for name, size in (("key", sizes.head_size), ("value", sizes.value_size))
        )

    def stored_bits(self, sizes: HeadSizes) -> tuple[float, float]:
        """The bits of the type; there are no parameters."""
        return float(self.dtype.bitwidth), float(self.dtype.bitwidth)


@dataclass(frozen=True)
class PageStorage(Storage):
    """The first and last tokens as they are, those between in pages of codes.

    Attributes:
        dtype: Type of the exact tokens.
        sinks: Tokens kept as they are at the start.
        recent: Tokens kept as they are at the end, at least.
        page: Tokens of a page, a multiple of 16, at most 256.
        key_scheme: `channel` or `balanced`.
        value_scheme: `token` or `separable`.
        key_bits: Bits of the keys of class 0 and class 1: 2, 4, 8 or 16 each.
        value_bits: The same of the values.
        key_group: Tokens that share parameters of a key channel; 0: all of a panel.
        value_group: Channels that share parameters of a value; 0: all.
        salient: Tokens of a page in class 0, a multiple of 16 from 16 to `page`.
        importance: Which tokens those are; `none` with one class.
        window: Window of the attention, which bounds the number of pages; 0: none.

    Raises:
        InputError: A value that the op does not have.
    """

    kind: ClassVar[str] = "pages"
    dtype: ir.DataType = ir.DataType.BFLOAT16
    sinks: int = 4
    recent: int = 32
    page: int = 128
    key_scheme: str = "channel"
    value_scheme: str = "token"
    key_bits: tuple[int, int] = (8, 8)
    value_bits: tuple[int, int] = (8, 8)
    key_group: int = 0
    value_group: int = 0
    salient: int = 128
    importance: str = "none"
    window: int = 0

    def __post_init__(self) -> None:
        _require_float("exact tokens", self.dtype)
        for name in ("sinks", "recent", "key_group", "value_group", "window"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, it must be 0 or more")
        fits = LANE_BLOCK <= self.page <= MOST_TOKENS and self.page % LANE_BLOCK == 0
        _require(fits, f"page is {self.page}, it must be a multiple of {LANE_BLOCK} from {LANE_BLOCK} to {MOST_TOKENS}")
        fits = LANE_BLOCK <= self.salient <= self.page and self.salient % LANE_BLOCK == 0
        _require(fits, f"salient is {self.salient}, it must be a multiple of {LANE_BLOCK} from {LANE_BLOCK} to page")
        for name in ("key_bits", "value_bits"):
            bits = getattr(self, name)
            _require(len(bits) == 2 and set(bits) <= set(BITS), f"{name} is {bits}, it must be two of {BITS}")
        _one_of("key_scheme", self.key_scheme, ("channel", "balanced"))
        _one_of("value_scheme", self.value_scheme, ("token", "separable"))
        choices = ("normalised", "causal-count", "accumulated") if self.two_classes else ("none",)
        _one_of("importance", self.importance, choices)
        _require(self.key_scheme == "channel" or not self.key_group, "balanced keys have no key_group")
        _require(self.value_scheme == "token" or not self.value_group, "separable values have no value_group")

    @property
    def two_classes(self) -> bool:
        """Whether a page has tokens of both classes."""
        return self.salient < self.page

    @property
    def has_statistics(self) -> bool:
        """Whether the cache carries sums of probabilities and maxima of queries."""
        return self.two_classes or self.key_scheme == "balanced"

    @property
    def exact_tokens(self) -> int:
        """Places of the exact buffer."""
        return self.sinks + self.recent + self.page

    def attributes(self) -> dict[str, int | str | tuple[int, ...]]:
        """All of this storage."""
        return {
            "sinks": self.sinks,
            "recent": self.recent,
            "page": self.page,
            "key_scheme": self.key_scheme,
            "value_scheme": self.value_scheme,
            "key_bits": self.key_bits,
            "value_bits": self.value_bits,
            "key_group": self.key_group,
            "value_group": self.value_group,
            "salient": self.salient,
            "importance": self.importance,
        }

    def tensors(self, sizes: HeadSizes) -> tuple[StateTensor, ...]:
        """`exact_key`, `exact_value`, `pages`, and `statistics` where they are kept."""
        heads = sizes.kv_heads
        pages = self.window // self.page + 2 if self.window else f"{PAST} // {self.page}"
        found = [
            StateTensor("exact_key", self.dtype, (BATCH, heads, self.exact_tokens, sizes.head_size)),
            StateTensor("exact_value", self.dtype, (BATCH, heads, self.exact_tokens, sizes.value_size)),
            StateTensor("pages", ir.DataType.UINT8, (BATCH, heads, pages, self.page_bytes(sizes))),
        ]
        if self.has_statistics:
            width = 2 * self.exact_tokens + sizes.head_size
            found.append(StateTensor("statistics", ir.DataType.FLOAT, (BATCH, heads, width)))
        return tuple(found)

    def pages_at(self, tokens: int) -> int:
        """Full pages of a row of this many tokens."""
        full = max(0, (tokens - self.sinks - self.recent) // self.page)
        return min(full, self.window // self.page + 2) if self.window else full

    def bytes_at(self, sizes: HeadSizes, tokens: int) -> int:
        """The whole exact buffer, the statistics, and the pages that are full."""
        fixed = sum(tensor.bytes_at(tokens) for tensor in self.tensors(sizes) if tensor.name != "pages")
        return fixed + self.pages_at(tokens) * sizes.kv_heads * self.page_bytes(sizes)

    def code_bytes_at(self, sizes: HeadSizes, tokens: int) -> int:
        """The exact buffer, and the codes of the pages."""
        exact, values, *_ = self.tensors(sizes)
        codes = round(self.stored_bits(sizes)[0] * self.page * (sizes.head_size + sizes.value_size) / 8)
        return exact.bytes_at(tokens) + values.bytes_at(tokens) + self.pages_at(tokens) * sizes.kv_heads * codes

    def page_bytes(self, sizes: HeadSizes) -> int:
        """Bytes of a page of one head."""
        return sum(self.page_parts(sizes).values())

    def page_parts(self, sizes: HeadSizes) -> Mapping[str, int]:
        """Part of a page -> its bytes, padding included, in order."""
        keys, values = sizes.head_size, sizes.value_size
        parts = {}
        if self.two_classes:
            parts["classes"] = -(-self.page // 8)
        if self.value_scheme == "separable":
            parts["value factor"] = 2 * values
        if self.key_scheme == "balanced":
            parts["key factor"] = 2 * keys
        for index, tokens in enumerate((self.salient, self.page - self.salient)):
            if not tokens:
                continue
            bits = self.key_bits[index]
            count = tokens if self.key_scheme == "balanced" else keys * _groups(tokens, self.key_group)
            parts[f"key parameters {index}"] = _parameter_bytes(bits, count)
            parts[f"key codes {index}"] = keys * _row_bytes(tokens, bits)
            bits = self.value_bits[index]
            parts[f"value parameters {index}"] = _parameter_bytes(bits, tokens * _groups(values, self.value_group))
            parts[f"value codes {index}"] = tokens * _row_bytes(values, bits)
        return {name: _aligned(size) for name, size in parts.items()}

    def stored_bits(self, sizes: HeadSizes) -> tuple[float, float]:
        """Bits of the codes alone, and of a whole page, for each element of it."""
        share = self.salient / self.page
        codes = sum(
            size * (share * bits[0] + (1 - share) * bits[1])
            for size, bits in ((sizes.head_size, self.key_bits), (sizes.value_size, self.value_bits))
        )
        elements = sizes.head_size + sizes.value_size
        return codes / elements, 8 * self.page_bytes(sizes) / (self.page * elements)


@dataclass(frozen=True)
class StaticStorage(Storage):
    """Every token in 8 or 4 bits, with scales that were fixed before: one for each channel of each head.

    Attributes:
        bits: 8: int8. 4: two channels a byte, the even one in the low nibble, 8 added.

    Raises:
        InputError: Other bits.
    """

    kind: ClassVar[str] = "static"
    bits: int = 8

    def __post_init__(self) -> None:
        _require(self.bits in (4, 8), f"bits is {self.bits}, static caches have 4 or 8")

    def attributes(self) -> dict[str, int | str | tuple[int, ...]]:
        """`key_bits` and `value_bits`."""
        return {"key_bits": (self.bits, self.bits), "value_bits": (self.bits, self.bits)}

    def tensors(self, sizes: HeadSizes) -> tuple[StateTensor, ...]:
        """`key` and `value`."""
        for name in ("head_size", "value_size"):
            size = getattr(sizes, name)
            _require(self.bits == 8 or size % 2 == 0, f"{name} is {size}, it must be even for 4 bits")
        dtype = ir.DataType.INT8 if self.bits == 8 else ir.DataType.UINT8
        return tuple(
            StateTensor(name, dtype, (BATCH, sizes.kv_heads, PAST, size * self.bits // 8))
            for name, size in (("key", sizes.head_size), ("value", sizes.value_size))
        )

    def stored_bits(self, sizes: HeadSizes) -> tuple[float, float]:
        """The bits; the scales are constants of the engine."""
        return float(self.bits), float(self.bits)


def _groups(lanes: int, group: int) -> int:
    return -(-lanes // group) if group else 1


def _row_bytes(lanes: int, bits: int) -> int:
    """Bytes of a row of codes; its lanes fill whole words."""
    block = LANE_BLOCK * 8 // bits if bits < 16 else LANE_BLOCK
    return -(-lanes // block) * block * bits // 8


def _parameter_bytes(bits: int, count: int) -> int:
    """A unit and a scale and minimum for each parameter; values of 16 bits have none."""
    return 4 + 4 * count if bits < 16 else 0


def _aligned(size: int) -> int:
    return -(-size // LANE_BLOCK) * LANE_BLOCK


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise InputError(problem)


def _require_float(what: str, dtype: ir.DataType) -> None:
    names = ", ".join(item.name for item in FLOATS)
    _require(dtype in FLOATS, f"the {what} are {dtype.name}, they must be one of {names}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name} is {value!r}, it must be one of {', '.join(choices)}")
