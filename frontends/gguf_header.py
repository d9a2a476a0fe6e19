"""Strict reader of GGUF headers: what is in the file and where, checked before any other code sees it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Every count and
length is checked against the bytes that are left in the file, so a damaged header is refused without allocating.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from effc.errors import InputError
from effc.frontends.environment import require

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
WIDTHS = {kind: struct.calcsize(f"<{code}") for kind, code in FORMATS.items()}
NAME_LIMIT = 65_535
KEY_VALUES_LIMIT = 65_536
TENSORS_LIMIT = 1_000_000
MAX_DIMENSIONS = 4
KEPT_ARRAY = 4096
"""Longer arrays (vocabularies) are checked and stepped over."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        name: Name in the file.
        shape: Shape in torch order (outermost first).
        kind: ggml type number.
        offset: First byte in the file.
        nbytes: Bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """A checked header.

    Attributes:
        path: The file.
        typed: Key -> (value type, value); the value of an array is (element type, list). Long arrays are left out.
        long_arrays: Key -> length of the arrays left out.
        tensors: The tensors, in file order.
    """

    path: Path
    typed: Mapping[str, tuple[int, Any]]
    long_arrays: Mapping[str, int]
    tensors: tuple[GgufTensor, ...]

    @property
    def metadata(self) -> dict[str, Any]:
        """Keys and values without their types."""
        return {key: value[1] if kind == ARRAY else value for key, (kind, value) in self.typed.items()}

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return str(self.metadata["general.architecture"])


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        InputError: Not GGUF, damaged, truncated, or of a version or tensor type effc does not read.
    """
    size = path.stat().st_size
    if size < 24:
        raise _damaged(path, f"it has {size} bytes, fewer than a header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
        return _Reader(path, blob).read()


class _Reader:
    """A position in the file that never passes its end."""

    def __init__(self, path: Path, blob: mmap.mmap) -> None:
        self.path = path
        self.blob = blob
        self.position = 0
        self.long_arrays: dict[str, int] = {}

    def read(self) -> GgufHeader:
        if self.take(4, "the magic number") != MAGIC:
            raise InputError(f"{self.path}: does not begin with `GGUF`, so it is not a GGUF file.")
        version = self.number("I", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = "big-endian GGUF" if swapped in VERSIONS else f"GGUF version {version}"
            raise InputError(f"{self.path}: is {kind}; effc reads little-endian GGUF of versions 2 and 3.")
        tensor_count = self.count("tensors", TENSORS_LIMIT, 24)
        pair_count = self.count("key-value pairs", KEY_VALUES_LIMIT, 13)
        typed = self.metadata(pair_count)
        entries = [self.tensor() for _ in range(tensor_count)]
        alignment = typed.get("general.alignment", (4, 32))[1]
        return GgufHeader(self.path, typed, self.long_arrays, self.place(entries, alignment))

    def take(self, length: int, what: str) -> bytes:
        if self.position + length > len(self.blob):
            raise _damaged(self.path, f"it ends inside {what} at byte {self.position}")
        self.position += length
        return self.blob[self.position - length : self.position]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def count(self, what: str, limit: int, smallest: int) -> int:
        value = self.number("Q", f"the count of {what}")
        if value > limit or value * smallest > len(self.blob):
            raise _damaged(self.path, f"it claims {value} {what}, more than fit")
        return int(value)

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.number("Q", what)
        if limit is not None and length > limit:
            raise _damaged(self.path, f"{what} claims {length} bytes, the limit is {limit}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _damaged(self.path, f"{what} is not UTF-8") from error

    def metadata(self, pair_count: int) -> dict[str, tuple[int, Any]]:
        result: dict[str, tuple[int, Any]] = {}
        for index in range(pair_count):
            key = self.string(f"key {index}", NAME_LIMIT)
            if key in result or key in self.long_arrays:
                raise _damaged(self.path, f"key {key!r} appears twice")
            kind = self.number("I", key)
            value = self.value(kind, key)
            if value is not None:
                result[key] = (kind, value)
        if result.get("general.architecture", (None,))[0] != STRING:
            raise _damaged(self.path, "it has no `general.architecture`")
        return result

    def value(self, kind: int, key: str) -> Any:
        if kind in FORMATS:
            return self.number(FORMATS[kind], key)
        if kind == STRING:
            return self.string(key)
        if kind == ARRAY:
            return self.array(key)
        raise _damaged(self.path, f"{key} has the unknown value type {kind}")

    def array(self, key: str) -> tuple[int, list[Any]] | None:
        kind, count = self.number("I", key), self.number("Q", key)
        if kind not in FORMATS and kind != STRING:
            raise _damaged(self.path, f"{key} is an array of the unsupported type {kind}")
        if count * WIDTHS.get(kind, 8) > len(self.blob) - self.position:
            raise _damaged(self.path, f"{key} claims {count} values, more than fit")
        if count <= KEPT_ARRAY:
            return kind, [self.value(kind, key) for _ in range(count)]
        self.long_arrays[key] = count
        if kind in FORMATS:
            self.position += count * WIDTHS[kind]
            return None
        for _ in range(count):
            length = self.number("Q", key)
            self.position += length
            self.take(0, key)
        return None

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("a tensor name", NAME_LIMIT)
        dimensions = self.number("I", name)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise _damaged(self.path, f"tensor {name!r} has {dimensions} dimensions, 1 to {MAX_DIMENSIONS} are allowed")
        shape = tuple(self.number("Q", name) for _ in range(dimensions))
        if min(shape) < 1 or prod(shape) >= 1 << 48:
            raise _damaged(self.path, f"tensor {name!r} has the impossible shape {list(shape)}")
        return name, shape[::-1], self.number("I", name), self.number("Q", name)

    def place(self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: Any) -> tuple[GgufTensor, ...]:
        if type(alignment) is not int or alignment < 8 or alignment > 1 << 20 or alignment & (alignment - 1):
            raise _damaged(self.path, f"its alignment {alignment!r} is not a power of two from 8 to 1 MiB")
        start = -(-self.position // alignment) * alignment
        tensors = []
        for name, shape, kind, offset in entries:
            nbytes = self.tensor_bytes(name, shape, kind)
            if offset % alignment or start + offset + nbytes > len(self.blob):
                raise _damaged(
                    self.path, f"tensor {name!r} ({nbytes} bytes at {start + offset}) is misaligned or past the end"
                )
            tensors.append(GgufTensor(name, shape, kind, start + offset, nbytes))
        self.check_distinct(tensors)
        return tuple(tensors)

    def tensor_bytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        sizes = {int(known): size for known, size in require("gguf", "Reading GGUF").GGML_QUANT_SIZES.items()}
        if kind not in sizes:
            raise InputError(f"{self.path}: tensor {name!r} has ggml type {kind}, which effc does not read.")
        elements, nbytes = sizes[kind]
        if shape[-1] % elements:
            raise _damaged(self.path, f"tensor {name!r} has rows of {shape[-1]}, not whole blocks of {elements}")
        return int(prod(shape) // elements * nbytes)

    def check_distinct(self, tensors: list[GgufTensor]) -> None:
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise _damaged(self.path, "two tensors have the same name")
        end = 0
        for tensor in sorted(tensors, key=lambda item: item.offset):
            if tensor.offset < end:
                raise _damaged(self.path, f"tensor {tensor.name!r} overlaps another")
            end = tensor.offset + tensor.nbytes


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: is not a sound GGUF file: {what}. Download it again.")
