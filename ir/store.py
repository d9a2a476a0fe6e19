"""A content-addressed store on disk: what a killed run had finished, the next one finds again.

Keys are SHA-256 over everything a value depends on. A value is written beside its final name and renamed, so
a reader sees all of it or none. The folder is `$EFFC_CACHE`, else `$XDG_CACHE_HOME/effc`, else `~/.cache/effc`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from effc.errors import OutputError

SIZE_LIMIT = 32 << 30
"""Bytes above which the least recently used entries are dropped."""
ENGINES = "engines"
"""Sub-folder of the cache in which each folder is one entry, used when one of its files was touched last."""


def cache_folder() -> Path:
    """The folder of the store."""
    explicit = os.environ.get("EFFC_CACHE")
    if explicit:
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "effc"


def content_key(**parts: Any) -> str:
    """Key of a value that depends on these JSON-ready parts, hexadecimal."""
    text = json.dumps(parts, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


class Store:
    """Files by key. Safe for several processes at once.

    Args:
        folder: Where it lies; made when first written to.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else cache_folder()

    def find(self, key: str) -> Path | None:
        """The file of a key, marked as used now; None when there is none."""
        path = self._path(key)
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError:
            return path if path.is_file() else None
        return path

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator[BinaryIO]:
        """Open a new entry for writing; it appears under its key when the block ends without an error.

        Raises:
            OutputError: The folder cannot be written, or the disk is full.
        """
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
        except OSError as error:
            raise OutputError(
                f"{self.folder}: cannot write the cache ({error}). Set EFFC_CACHE to a folder with space."
            ) from error
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
            os.replace(name, path)
        except OSError as error:
            raise OutputError(
                f"{path}: {error.strerror}. Free disk space, or set EFFC_CACHE to another folder."
            ) from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)

    def drop(self, key: str) -> None:
        """Forget a key. Files that are open stay readable."""
        with contextlib.suppress(FileNotFoundError):
            self._path(key).unlink()

    def prune(self, limit: int = SIZE_LIMIT) -> None:
        """Drop the least recently used entries until the store holds at most `limit` bytes."""
        entries = []
        for path in [*self.folder.glob("??/*"), *self.folder.glob(f"{ENGINES}/*")]:
            with contextlib.suppress(FileNotFoundError):
                statuses = [file.stat() for file in (path.iterdir() if path.is_dir() else [path])]
                used = max((status.st_mtime for status in statuses), default=0.0)
                entries.append((used, sum(status.st_size for status in statuses), path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= limit:
                return
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            total -= size

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key[2:]
