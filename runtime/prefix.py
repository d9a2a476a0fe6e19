"""Prefixes: the cache that the beginning of a prompt leaves, computed once and mapped by every run that starts there.

A prefix folder, format version 1:

    prefix.json    the manifest: which engine, which text, which tensors lie where
    prefix.bin     the tensors, each aligned so that it can be mapped
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effc import __version__
from effc.errors import EngineError, UsageError
from effc.runtime import limits
from effc.runtime.batch import Batch, check_task, prompt_chunk
from effc.runtime.bundle import CacheLayout, check_name, numbers_hash, read_versioned
from effc.runtime.kv_state import check_snapshot
from effc.runtime.new_folder import new_folder, write_synced
from effc.runtime.tensors import storage_dtype

if TYPE_CHECKING:
    from effc.runtime.session import Engine
    from effc.runtime.tokenizer import Tokenizer

FORMAT = "effc-prefix"
VERSION = 1
MANIFEST = "prefix.json"
DATA = "prefix.bin"
ALIGNMENT = 64
AGAIN = "Compute the prefix again with `effc prefix`."

CACHE, TOKENS = "cache", "tokens"
"""Roles of tensors: state of the cache, named as the engine's cache inputs; the ids of the prefix, int64 [tokens]."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of `prefix.bin`.

    Attributes:
        name: Its name, unique within its role.
        role: What it is for, `cache` or `tokens`. A reader leaves roles alone that it does not know.
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
        text_sha256: SHA-256 of the text in UTF-8, or None.
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
    text_sha256: str | None
    file: str
    bytes: int
    tensors: list[StoredTensor]

    def to_json(self) -> str:
        """The manifest as the text of `prefix.json`."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1, ensure_ascii=False)


@dataclass(frozen=True)
class Prefix:
    """An open prefix, checked against the engine it was opened for.

    Attributes:
        folder: Where it lies.
        manifest: Its manifest.
        token_ids: Ids of the prefix.
        tensors: Cache input name -> tensor of one row. Mapped; what is written to one never reaches the file.
    """

    folder: Path
    manifest: PrefixManifest
    token_ids: list[int]
    tensors: Mapping[str, np.ndarray]

    @property
    def length(self) -> int:
        """Tokens of the prefix."""
        return len(self.token_ids)

    def check_continues(self, engine: Engine, index: int, ids: Sequence[int]) -> None:
        """Refuse ids that begin a prompt where the prefix has begun it already.

        Raises:
            UsageError: Prefix and ids both begin with the token that begins a prompt.
        """
        if {self.token_ids[0], ids[0]} <= limits.bos_ids(engine.manifest.config, engine.assets):
            raise UsageError(
                f"prompt {index}: begins with token {ids[0]}, with which {self.folder} begins already. "
                "Give the ids that come after the prefix."
            )

    def continued(self, tokenizer: Tokenizer, index: int, text: str) -> list[int]:
        """Token ids of a text that follows: those of prefix and text as one, without those of the prefix.

        Args:
            tokenizer: The engine's.
            index: Of the prompt, for messages.
            text: The prompt.

        Raises:
            UsageError: Read together, the two do not begin with the tokens of the prefix.
        """
        if self.manifest.text is None:
            return tokenizer.encode(text, add_special_tokens=False)
        ids = tokenizer.encode(self.manifest.text + text)
        if ids[: self.length] == self.token_ids:
            return ids[self.length :]
        if tokenizer.encode_start(self.manifest.text) != self.token_ids:
            raise UsageError(f"{self.folder}: the engine's tokenizer makes other tokens of its text now. {AGAIN}")
        raise UsageError(
            f"prompt {index}: does not continue {self.folder}. Read together, the end of the prefix and {text[:20]!r} "
            "make other tokens than apart. Let the prefix end, and the prompt begin, before a blank or after a line."
        )


def write_prefix(
    engine: Engine, prefix: str | Sequence[int], output: str | Path, *, prefill_chunk: int | None = None
) -> dict[str, Any]:
    """Read the beginning of a prompt and write its cache to a folder.

    Args:
        engine: An engine of task `causal-lm`.
        prefix: A text, encoded with the special tokens the tokenizer puts before one, or token ids.
        output: The folder to write; a prefix already there is replaced.
        prefill_chunk: Tokens read in one run; None as `generate` does.

    Returns:
        The JSON object of `effc prefix`: `prefix` (the folder), `engine`, `tokens`, `bytes` of all files, and
        `seconds` for computing and writing them.

    Raises:
        UsageError: The prefix is empty or leaves no room for a prompt, or the task does not generate.
        EngineError: The engine has no cache, or no tokenizer where one is needed, or fails while running.
        OutputError: The folder cannot be written.
    """
    begun = time.perf_counter()
    check_task(engine)
    layout = engine.cache_layout()
    if prefill_chunk is not None and prefill_chunk < 1:
        raise UsageError(f"prefill_chunk is {prefill_chunk}; give at least 1, or leave it out.")
    ids = _prefix_ids(engine, prefix)
    with new_folder(Path(output), MANIFEST, "a prefix") as folder:
        batch = Batch(engine, [ids], 1)
        batch.prefill(prefill_chunk or prompt_chunk(engine, 1, len(ids)))
        tensors = _write_tensors(folder / DATA, ids, layout, batch.state.snapshot())
        text = prefix if isinstance(prefix, str) else None
        manifest = PrefixManifest(
            effc_version=__version__,
            engine=numbers_hash(engine.manifest),
            target=engine.manifest.target,
            cache_mode=layout.mode,
            tokens=len(ids),
            text=text,
            text_sha256=None if text is None else sha256(text.encode("utf-8")).hexdigest(),
            file=DATA,
            bytes=(folder / DATA).stat().st_size,
            tensors=tensors,
        )
        write_synced(folder / MANIFEST, manifest.to_json())
        size = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "prefix": str(output),
        "engine": str(engine.folder),
        "tokens": len(ids),
        "bytes": size,
        "seconds": time.perf_counter() - begun,
    }


def start_from(engine: Engine, prefix: str | Path | Prefix) -> Prefix:
    """The prefix itself, or the one of a folder, once it is known to be of this engine; see `open_prefix`."""
    if not isinstance(prefix, Prefix):
        return open_prefix(engine, prefix)
    _check_engine(engine, prefix.folder, prefix.manifest)
    return prefix


def open_prefix(engine: Engine, folder: str | Path, *, check: bool = True) -> Prefix:
    """Map a prefix folder for an engine.

    Args:
        engine: The engine that is to start from it.
        folder: What `write_prefix` wrote.
        check: Compare every tensor with its SHA-256. Off, names, sizes and shapes are still checked.

    Raises:
        EngineError: The folder is damaged, of a newer format or no prefix, or the engine carries no cache.
        UsageError: It was computed with another engine.
    """
    folder = Path(folder)
    layout = engine.cache_layout()
    manifest = read_prefix_manifest(folder)
    _check_engine(engine, folder, manifest)
    data = _map(folder, manifest)
    for tensor in manifest.tensors:
        if check and sha256(_bytes(data, tensor).data).hexdigest() != tensor.sha256:
            raise EngineError(
                f"{folder / manifest.file}: the bytes of {tensor.name!r} are not those that were written. {AGAIN}"
            )
    tensors = {one.name: _array(data, one) for one in manifest.tensors if one.role == CACHE}
    try:
        check_snapshot(layout, tensors, manifest.tokens)
    except EngineError as error:
        raise EngineError(f"{folder}: {error}") from error
    return Prefix(folder, manifest, _token_ids(engine, folder, manifest, data), tensors)


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
        values["tensors"] = [StoredTensor(**item) for item in values["tensors"]]
        manifest = PrefixManifest(**values)
        check_name(path, manifest.file)
        _check_manifest(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"{path}: a key is missing or malformed ({error}). {AGAIN}") from error
    return manifest


def _check_engine(engine: Engine, folder: Path, manifest: PrefixManifest) -> None:
    if manifest.engine != numbers_hash(engine.manifest):
        raise UsageError(
            f"{folder}: was computed with another engine than {engine.folder}, their graphs or weights differ. {AGAIN}"
        )


def _check_manifest(manifest: PrefixManifest) -> None:
    """Raise ValueError where a figure cannot be right."""
    _require(_is_count(manifest.tokens) and manifest.tokens > 0, "tokens")
    _require(_is_count(manifest.bytes), "bytes")
    _require(manifest.text is None or isinstance(manifest.text, str), "text")
    seen = set()
    for tensor in manifest.tensors:
        where = f"tensor {tensor.name!r}"
        _require((tensor.role, tensor.name) not in seen, f"{where}: named twice")
        seen.add((tensor.role, tensor.name))
        _require(_is_count(tensor.offset) and tensor.offset % ALIGNMENT == 0, f"{where}: offset")
        _require(_is_count(tensor.bytes) and tensor.offset + tensor.bytes <= manifest.bytes, f"{where}: bytes")
        if tensor.role in (CACHE, TOKENS):
            _require(isinstance(tensor.dtype, str) and all(map(_is_count, tensor.shape)), f"{where}: dtype or shape")
            size = math.prod(tensor.shape) * storage_dtype(tensor.dtype).itemsize
            _require(size == tensor.bytes, f"{where}: dtype and shape make {size} bytes")
    _require([one.shape for one in manifest.tensors if one.role == TOKENS] == [[manifest.tokens]], "tensor of tokens")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _prefix_ids(engine: Engine, prefix: str | Sequence[int]) -> list[int]:
    if isinstance(prefix, str):
        if not prefix:
            raise UsageError("the prefix is empty. Give a text.")
        ids = engine.tokenizer.encode_start(prefix)
    else:
        ids = limits.checked_ids(engine.manifest.config, "the prefix", prefix)
    if not ids:
        raise UsageError(f"the tokenizer makes no tokens of the prefix {prefix!r}.")
    limit = limits.position_limit(engine.manifest.config)
    if limit is not None and len(ids) >= limit:
        raise UsageError(
            f"the prefix has {len(ids)} tokens, the model takes at most {limit} with the prompt. Shorten it."
        )
    return ids


def _write_tensors(
    path: Path, ids: Sequence[int], layout: CacheLayout, cache: Mapping[str, np.ndarray]
) -> list[StoredTensor]:
    """Write tokens and cache one after the other, synced to disk."""
    parts = [("token_ids", TOKENS, "int64", np.array(ids, np.int64))]
    parts += [(port.input, CACHE, port.dtype, cache[port.input]) for port in layout.ports]
    tensors = []
    with path.open("wb") as file:
        for name, role, dtype, array in parts:
            file.write(bytes(-file.tell() % ALIGNMENT))
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            digest = sha256(raw.data).hexdigest()
            tensors.append(StoredTensor(name, role, dtype, [*array.shape], file.tell(), raw.nbytes, digest))
            file.write(raw.data)
        file.flush()
        os.fsync(file.fileno())
    return tensors


def _map(folder: Path, manifest: PrefixManifest) -> np.ndarray:
    """The bytes of the tensors, mapped; a page that is written to becomes private memory."""
    path = folder / manifest.file
    if path.is_symlink() or not path.is_file():
        raise EngineError(f"{path}: is missing or not a plain file. {AGAIN}")
    size = path.stat().st_size
    if size != manifest.bytes:
        raise EngineError(f"{path}: has {size} bytes, {manifest.bytes} were written. {AGAIN}")
    return np.memmap(path, np.uint8, mode="c")


def _bytes(data: np.ndarray, tensor: StoredTensor) -> np.ndarray:
    return data[tensor.offset : tensor.offset + tensor.bytes]


def _array(data: np.ndarray, tensor: StoredTensor) -> np.ndarray:
    return np.asarray(_bytes(data, tensor)).view(storage_dtype(tensor.dtype)).reshape(tensor.shape)


def _token_ids(engine: Engine, folder: Path, manifest: PrefixManifest, data: np.ndarray) -> list[int]:
    (tensor,) = (one for one in manifest.tensors if one.role == TOKENS)
    try:
        return limits.checked_ids(engine.manifest.config, "its prefix", _array(data, tensor))
    except UsageError as error:
        raise EngineError(f"{folder / MANIFEST}: {error} {AGAIN}") from error
