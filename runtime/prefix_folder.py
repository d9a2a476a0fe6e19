"""The prefix folder: what `prefix.json` says, how a folder is written, read and checked.

Layout of a folder, format version 1:

    prefix.json    the manifest: which engine, which text, which tensors lie where
    prefix.bin     the tensors, each aligned so that it can be mapped
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path

import numpy as np

from effc.errors import EngineError
from effc.runtime.bundle import check_name, read_versioned
from effc.runtime.tensors import storage_dtype

FORMAT = "effc-prefix"
VERSION = 1
MANIFEST = "prefix.json"
DATA = "prefix.bin"
ALIGNMENT = 64
AGAIN = "Compute the prefix again with `effc prefix`."

CACHE, TOKENS, INPUTS = "cache", "tokens", "inputs"
"""Roles of tensors: state of the cache, named as the engine's cache inputs; the ids of the prefix, int64 [tokens];
what else the engine takes of a prefix, named as its inputs."""
KNOWN = (CACHE, TOKENS, INPUTS)
TOKEN_IDS = "token_ids"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of `prefix.bin`.

    Attributes:
        name: Its name, unique within its role.
        role: What it is for, `cache`, `tokens` or `inputs`. A reader leaves roles alone that it does not know.
        dtype: Numpy dtype name, or `bfloat16`, `float8_e4m3fn`, `float8_e5m2`; little-endian.
        shape: Its sizes; the batch of a cache tensor is 1.
        offset: Where it begins in the file, a multiple of 64.
        bytes: How many it takes.
        sha256: Of those bytes.
    """

    name: str
    role: str
    dtype: str
    shape: list[int]
    offset: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class PrefixManifest:
    """The content of `prefix.json`; every key is stable within a format version.

    Attributes:
        effc_version: Version that wrote the prefix.
        engine: Hash of what decides the engine's numbers (`effc.runtime.bundle.numbers_hash`).
        target: Target of the engine.
        cache_mode: How the engine carries its cache.
        tokens: Tokens of the prefix.
        text: The text they are of; None when ids were given.
        chat: Whether the text is the system message of a chat, and the tokens what the template makes of it.
        file: Name of the file with the tensors.
        bytes: Its size.
        tensors: What lies in it.
    """

    effc_version: str
    engine: str
    target: str
    cache_mode: str
    tokens: int
    text: str | None
    chat: bool
    file: str
    bytes: int
    tensors: list[StoredTensor]

    def to_json(self) -> str:
        """The manifest as the text of `prefix.json`."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1, ensure_ascii=False)


def read_prefix_manifest(folder: Path) -> PrefixManifest:
    """Read and check `prefix.json`, without looking at the tensors.

    Raises:
        EngineError: Not a prefix folder, damaged, or written in a newer format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise EngineError(f"{folder}: is not a prefix folder, it has no {MANIFEST}. Make one with `effc prefix`.")
    content = read_versioned(path, FORMAT, VERSION, "a prefix of effc", AGAIN)
    try:
        values = {item.name: content[item.name] for item in fields(PrefixManifest)}
        names = [item.name for item in fields(StoredTensor)]
        values["tensors"] = [StoredTensor(**{name: item[name] for name in names}) for item in values["tensors"]]
        manifest = PrefixManifest(**values)
        check_name(path, manifest.file)
        _check_manifest(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"{path}: a key is missing or malformed ({error}). {AGAIN}") from error
    return manifest


def write_tensors(path: Path, tensors: Iterable[tuple[str, str, str, np.ndarray]]) -> list[StoredTensor]:
    """Write tensors one after the other, synced to disk.

    Args:
        path: The file.
        tensors: Name, role, dtype and array of each.
    """
    stored = []
    with path.open("wb") as file:
        for name, role, dtype, array in tensors:
            file.write(bytes(-file.tell() % ALIGNMENT))
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            digest = sha256(raw.data).hexdigest()
            stored.append(StoredTensor(name, role, dtype, [*array.shape], file.tell(), raw.nbytes, digest))
            file.write(raw.data)
        file.flush()
        os.fsync(file.fileno())
    return stored


def map_tensors(folder: Path, manifest: PrefixManifest, *, check: bool) -> dict[tuple[str, str], np.ndarray]:
    """Role and name -> array of every tensor whose role is known. Mapped: writing to one makes private memory.

    Args:
        folder: The prefix folder.
        manifest: Its manifest.
        check: Compare every tensor, of unknown roles too, with its SHA-256.

    Raises:
        EngineError: The file is missing, a link, of another size, or has other bytes than were written.
    """
    path = folder / manifest.file
    if path.is_symlink() or not path.is_file():
        raise EngineError(f"{path}: is missing or not a plain file. {AGAIN}")
    size = path.stat().st_size
    if size != manifest.bytes:
        raise EngineError(f"{path}: has {size} bytes, {manifest.bytes} were written. {AGAIN}")
    data = np.memmap(path, np.uint8, mode="c")
    found = {}
    for tensor in manifest.tensors:
        raw = np.asarray(data[tensor.offset : tensor.offset + tensor.bytes])
        if check and sha256(raw.data).hexdigest() != tensor.sha256:
            raise EngineError(f"{path}: the bytes of {tensor.name!r} are not those that were written. {AGAIN}")
        if tensor.role in KNOWN:
            found[tensor.role, tensor.name] = raw.view(storage_dtype(tensor.dtype)).reshape(tensor.shape)
    return found


def _check_manifest(manifest: PrefixManifest) -> None:
    """Raise ValueError where a figure cannot be right."""
    _require(_is_count(manifest.tokens) and manifest.tokens > 0, "tokens")
    _require(_is_count(manifest.bytes), "bytes")
    _require(manifest.text is None or isinstance(manifest.text, str), "text")
    _require(isinstance(manifest.chat, bool), "chat")
    seen = set()
    for tensor in manifest.tensors:
        where = f"tensor {tensor.name!r}"
        _require(isinstance(tensor.name, str) and isinstance(tensor.role, str), f"{where}: name or role")
        _require((tensor.role, tensor.name) not in seen, f"{where}: named twice")
        seen.add((tensor.role, tensor.name))
        _require(_is_count(tensor.offset) and tensor.offset % ALIGNMENT == 0, f"{where}: offset")
        _require(_is_count(tensor.bytes) and tensor.offset + tensor.bytes <= manifest.bytes, f"{where}: bytes")
        if tensor.role in KNOWN:
            _require(all(map(_is_count, tensor.shape)), f"{where}: shape")
            size = math.prod(tensor.shape) * _item_size(tensor.dtype)
            _require(size == tensor.bytes, f"{where}: bytes of its shape")
    ids = [(one.name, one.dtype, one.shape) for one in manifest.tensors if one.role == TOKENS]
    _require(ids == [(TOKEN_IDS, "int64", [manifest.tokens])], "tensor of tokens")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _item_size(dtype: object) -> int:
    """Bytes of an element of a plain numeric type; ValueError for all else."""
    try:
        found = storage_dtype(str(dtype))
    except EngineError as error:
        raise ValueError(f"dtype {dtype!r}") from error
    _require(isinstance(dtype, str) and found.kind in "biuf", f"dtype {dtype!r}")
    return found.itemsize


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
