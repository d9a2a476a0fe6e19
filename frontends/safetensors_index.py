"""Strict reader of safetensors headers: every tensor of a checkpoint and where it lies, no weight read.

Format: https://github.com/huggingface/safetensors, README, section "Format". The same limits are enforced:
header at most 100 MB, offsets without holes or overlaps, the data exactly as long as the header says.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import onnx_ir as ir

from effc.errors import InputError
from effc.ir.weights import file_tensor

HEADER_LIMIT = 100_000_000
INDEX_LIMIT = 256 << 20
DTYPES: Mapping[str, ir.DataType] = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "F8_E5M2": ir.DataType.FLOAT8E5M2,
    "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32,
    "I16": ir.DataType.INT16,
    "I8": ir.DataType.INT8,
    "U64": ir.DataType.UINT64,
    "U32": ir.DataType.UINT32,
    "U16": ir.DataType.UINT16,
    "U8": ir.DataType.UINT8,
    "BOOL": ir.DataType.BOOL,
}


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a checkpoint, read when asked.

    Attributes:
        tensors: Name in the checkpoint -> lazy tensor.
        files: The weight files, links resolved, in a fixed order.
    """

    tensors: Mapping[str, ir.LazyTensor]
    files: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_checkpoint(folder: Path) -> Checkpoint:
    """The safetensors checkpoint in a folder: `model.safetensors`, or the shards its index names.

    Raises:
        InputError: There is none, or a file is damaged, missing, or outside the folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return Checkpoint(read_header(single), (single.resolve(),))
    if index.is_file():
        return _read_shards(folder, index)
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    found = f" It has {pickles[0]}, a pickle, which effc does not run." if pickles else ""
    raise InputError(
        f"{folder}: has no model.safetensors and no model.safetensors.index.json.{found} "
        "Save the model again with `save_pretrained`, which writes safetensors."
    )


def _read_shards(folder: Path, index: Path) -> Checkpoint:
    weight_map = _read_weight_map(index)
    shards: dict[str, Mapping[str, ir.LazyTensor]] = {}
    for name in sorted(set(weight_map.values())):
        if len(PurePosixPath(name).parts) != 1 or name in (".", "..") or "\\" in name or "\0" in name:
            raise InputError(f"{index}: names the shard {name!r}, which leaves the folder. Do not use this checkpoint.")
        if not (folder / name).is_file():
            raise InputError(f"{index}: names the shard {name!r}, which is missing. Download the checkpoint again.")
        shards[name] = read_header(folder / name)
    tensors = {}
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard]:
            raise InputError(
                f"{folder / shard}: has no tensor {tensor!r}, though {index.name} says so. Download it again."
            )
        tensors[tensor] = shards[shard][tensor]
    return Checkpoint(tensors, tuple((folder / name).resolve() for name in sorted(shards)))


def _read_weight_map(index: Path) -> dict[str, str]:
    if index.stat().st_size > INDEX_LIMIT:
        raise InputError(f"{index}: is larger than {INDEX_LIMIT >> 20} MiB, which no checkpoint needs.")
    try:
        content = json.loads(index.read_bytes())
        weight_map = content["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{index}: is not an index of shards ({error}). Download it again.") from error
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{index}: `weight_map` must map tensor names to file names. Download it again.")
    return weight_map


def read_header(path: Path) -> dict[str, ir.LazyTensor]:
    """The tensors of one safetensors file, by name.

    Raises:
        InputError: The header is damaged, or does not fit the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _damaged(path, f"it has {size} bytes, fewer than the 8 of a header length")
        (length,) = struct.unpack("<Q", prefix)
        if length > HEADER_LIMIT:
            raise _damaged(path, f"its header claims {length} bytes, the format allows {HEADER_LIMIT}")
        if 8 + length > size:
            raise _damaged(path, f"its header claims {length} bytes, the file has {size}")
        header = _parse_header(path, file.read(length))
    return _tensors(path, header, 8 + length, size)


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            raise ValueError("a key appears twice")
        return keys

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _tensors(path: Path, header: dict[str, Any], start: int, size: int) -> dict[str, ir.LazyTensor]:
    resolved = path.resolve()
    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        spans.append((begin, end, name))
        tensors[name] = file_tensor(resolved, start + begin, dtype, shape, name)
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise _damaged(path, f"tensor {name!r} begins at {begin}, where {position} was expected (overlap or hole)")
        position = end
    if start + position != size:
        raise _damaged(path, f"its tensors end at byte {start + position}, the file at {size}")
    return tensors


def _entry(path: Path, name: str, entry: Any) -> tuple[ir.DataType, tuple[int, ...], int, int]:
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"tensor {name!r} has no dtype, shape or data_offsets") from error
    if dtype_name not in DTYPES:
        raise InputError(f"{path}: tensor {name!r} has dtype {dtype_name!r}; effc reads {', '.join(DTYPES)}.")
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise _damaged(path, f"tensor {name!r} has a shape or offsets that are not counts")
    dtype = DTYPES[dtype_name]
    if prod(shape) * dtype.bitwidth != (end - begin) * 8:
        raise _damaged(path, f"tensor {name!r} is {dtype_name}{shape} but spans {end - begin} bytes")
    return dtype, tuple(shape), begin, end


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: is not a sound safetensors file: {what}. Download or save it again.")
