"""Reads files of calibration data piece by piece: plain text, JSON lines, arrays."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from effc.errors import InputError

BLOCK = 1 << 16
"""Characters of plain text that are tokenized at once."""
LINE_LIMIT = 64 << 20
"""Bytes of the longest line of a JSON lines file."""
JSON_LINES = (".jsonl", ".ndjson")
FORMATS = "UTF-8 text, JSON lines (.jsonl) or arrays (.npz)"

Document = str | list[int]
"""A text, or the ids of its tokens."""


def check_file(path: Path) -> None:
    """See that there is a file of a kind that may hold calibration data.

    Raises:
        InputError: There is none.
    """
    if not path.exists():
        raise InputError(f"{path}: does not exist. Name a file of {FORMATS}.")
    if not path.is_file():
        raise InputError(f"{path}: is no file. Name a file of {FORMATS}.")
    if path.suffix == ".json":
        raise InputError(f"{path}: JSON must have one object a line. Write it so and name it .jsonl.")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: is empty. Give a file of {FORMATS}.")


def text_blocks(path: Path) -> Iterator[str]:
    """The text of a file in pieces of about `BLOCK` characters that end with a line, else with a word.

    Raises:
        InputError: The file cannot be read or is not UTF-8.
    """
    rest = ""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while block := file.read(BLOCK):
                rest += block
                cut = rest.rfind("\n") + 1 or rest.rfind(" ") + 1
                if cut:
                    yield rest[:cut]
                    rest = rest[cut:]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error.reason}). Give {FORMATS}.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    if rest:
        yield rest


def json_documents(path: Path) -> Iterator[tuple[int, Document]]:
    """Line number and content of each line that is not blank.

    A line is a string, or an object with `text`, with `prompt` and perhaps `completion`, or with `input_ids`.

    Raises:
        InputError: Names the line that is none of these.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LINE_LIMIT + 1):
                number += 1
                if len(line) > LINE_LIMIT:
                    raise InputError(f"{path}: line {number} is longer than {LINE_LIMIT >> 20} MiB. Split it.")
                document = _document(line, f"{path}: line {number}")
                if document is not None:
                    yield number, document
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error


def _document(line: bytes, where: str) -> Document | None:
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 ({error.reason}).") from error
    if not text:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}). Give one object or string a line.") from error
    if isinstance(content, str):
        return content
    if not isinstance(content, dict):
        raise InputError(f"{where} is a {type(content).__name__}. Give an object or a string.")
    return _from_object(content, where)


def _from_object(content: dict[str, Any], where: str) -> Document:
    if "input_ids" in content:
        ids = content["input_ids"]
        if not isinstance(ids, list) or any(type(item) is not int for item in ids):
            raise InputError(f"{where}: input_ids is no flat list of whole numbers.")
        return ids
    names = ("text",) if "text" in content else ("prompt", "completion")
    parts = [content[name] for name in names if name in content]
    if not parts or names[0] not in content:
        keys = ", ".join(map(repr, content)) or "no key"
        raise InputError(f"{where} has {keys}; expected 'text', 'prompt' (with 'completion') or 'input_ids'.")
    for name, part in zip(names, parts, strict=False):
        if not isinstance(part, str):
            raise InputError(f"{where}: {name!r} is a {type(part).__name__}, not a string.")
    return "".join(parts)


def array_rows(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """Entry i of the first axis of every array of an `.npz` file, for each i in turn.

    Raises:
        InputError: The file is damaged, holds Python objects, or its arrays have unequal numbers of rows.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            columns = {
                name.removesuffix(".npy"): _Column(archive.open(name), f"{path}: array {name.removesuffix('.npy')!r}")
                for name in archive.namelist()
            }
            counts = {name: column.shape[0] for name, column in columns.items()}
            if len(set(counts.values())) > 1:
                listed = ", ".join(f"{name} {count}" for name, count in counts.items())
                raise InputError(f"{path}: the arrays have unequal numbers of rows ({listed}).")
            for _ in range(min(counts.values(), default=0)):
                yield {name: column.row() for name, column in columns.items()}
    # zipfile raises NotImplementedError for an unknown compression and RuntimeError for an encrypted member.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path}: is no .npz file or is damaged ({error}). Write it again.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error


class _Column:
    """One array of an archive, read row by row.

    Args:
        file: The `.npy` content.
        where: What error messages call it.
    """

    def __init__(self, file: IO[bytes], where: str) -> None:
        self.file = file
        self.where = where
        self.shape, self.dtype = self._header()
        self.bytes = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))

    def _header(self) -> tuple[tuple[int, ...], np.dtype]:
        try:
            version = np.lib.format.read_magic(self.file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, columns_first, dtype = read(self.file)
        except ValueError as error:
            raise InputError(f"{self.where} is damaged ({error}). Write the file again with numpy.savez.") from error
        if dtype.hasobject:
            raise InputError(f"{self.where} holds Python objects. Give an array of numbers.")
        if not shape:
            raise InputError(f"{self.where} is a single number. Its first axis must count the samples.")
        if columns_first and len(shape) > 1:
            raise InputError(f"{self.where} is in Fortran order. Save numpy.ascontiguousarray of it.")
        return shape, dtype

    def row(self) -> np.ndarray:
        """The next entry of the first axis."""
        content = self.file.read(self.bytes)
        if len(content) < self.bytes:
            raise InputError(f"{self.where} is cut short. Write the file again with numpy.savez.")
        return np.frombuffer(content, self.dtype).reshape(self.shape[1:])
