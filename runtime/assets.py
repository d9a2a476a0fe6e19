"""Reads the small text files that travel with an engine: tokenizer, configurations, chat template."""

from __future__ import annotations

import json
import lzma
from collections.abc import Collection
from pathlib import Path
from typing import Any

from effc.errors import EngineError

SIZE_LIMIT = 512 << 20
"""Largest asset in bytes once decompressed; a bomb of a few kilobytes must not fill the memory."""


class Assets:
    """The text files of one engine folder, by name; a file may be stored LZMA-compressed as `NAME.xz`.

    Args:
        folder: The engine folder.
        names: Files the manifest lists. Others are invisible, so nothing unhashed is ever read.
    """

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        self._folder = folder
        self._names = frozenset(names)

    def path(self, name: str) -> Path:
        """Where the asset lies or would lie, for messages."""
        return self._folder / (f"{name}.xz" if f"{name}.xz" in self._names else name)

    def read(self, name: str) -> bytes | None:
        """Content of an asset, or None when the engine has none of that name.

        Raises:
            EngineError: It cannot be read, is damaged, or larger than `SIZE_LIMIT`.
        """
        path = self.path(name)
        if path.name not in self._names:
            return None
        try:
            with lzma.open(path, "rb") if path.suffix == ".xz" else path.open("rb") as file:
                data = file.read(SIZE_LIMIT + 1)
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise EngineError(f"{path}: cannot be read ({error}). Copy or build the engine again.") from error
        if len(data) > SIZE_LIMIT:
            raise EngineError(f"{path}: is larger than {SIZE_LIMIT >> 20} MiB. Do not use this engine.")
        return data

    def text(self, name: str) -> str | None:
        """Content of a UTF-8 asset, or None. Raises `EngineError` as `read` does."""
        data = self.read(name)
        if data is None:
            return None
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise EngineError(f"{self.path(name)}: is not UTF-8 ({error}). Build the engine again.") from error

    def json(self, name: str) -> Any:
        """Parsed JSON asset, or None. Raises `EngineError` as `read` does, and when it is not JSON."""
        text = self.text(name)
        if text is None:
            return None
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise EngineError(f"{self.path(name)}: is not JSON ({error}). Build the engine again.") from error

    def json_object(self, name: str) -> dict[str, Any]:
        """Parsed JSON object, empty when the engine has none. Raises `EngineError` as `json` does."""
        value = self.json(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise EngineError(f"{self.path(name)}: holds no JSON object. Build the engine again.")
        return value
