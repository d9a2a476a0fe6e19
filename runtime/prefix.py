"""Prefixes: the cache that the beginning of a prompt left, mapped by runs that start there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from effc.errors import EngineError, UsageError
from effc.runtime import limits
from effc.runtime.bundle import numbers_hash
from effc.runtime.kv_state import check_snapshot
from effc.runtime.prefix_folder import (
    AGAIN,
    CACHE,
    INPUTS,
    TOKEN_IDS,
    TOKENS,
    PrefixManifest,
    map_tensors,
    read_prefix_manifest,
)
from effc.runtime.prefix_inputs import check_inputs

if TYPE_CHECKING:
    from effc.runtime.session import Engine
    from effc.runtime.tokenizer import Tokenizer

PROBES = ("a", "1")
"""Messages of a user that have no token in common: what two chats with them share is before any message."""


@dataclass(frozen=True)
class Prefix:
    """An open prefix, checked against the engine it was opened for.

    Attributes:
        folder: Where it lies.
        manifest: Its manifest.
        token_ids: Ids of the prefix.
        tensors: Cache input name -> tensor of one row. Mapped; what is written to one never reaches the file.
        inputs: Input name -> what else the engine takes of a prefix, mapped too.
    """

    folder: Path
    manifest: PrefixManifest
    token_ids: list[int]
    tensors: Mapping[str, np.ndarray]
    inputs: Mapping[str, np.ndarray]

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
            text: The prompt; after the prefix of a chat, the user's message.

        Raises:
            UsageError: Read together, the two do not begin with the tokens of the prefix.
        """
        start = self.manifest.text
        if start is None:
            return tokenizer.encode(text, add_special_tokens=False)
        whole = chat_ids(tokenizer, start, text) if self.manifest.chat else tokenizer.encode(start + text)
        if whole[: self.length] == self.token_ids:
            return whole[self.length :]
        if text_ids(tokenizer, start, self.manifest.chat) != self.token_ids:
            raise UsageError(
                f"{self.folder}: the engine's tokenizer or chat template makes other tokens of its text now. {AGAIN}"
            )
        raise UsageError(
            f"prompt {index}: does not continue {self.folder}. Read together, the end of the prefix and {text[:20]!r} "
            "make other tokens than apart. Let the prefix end, and the prompt begin, before a blank or after a line."
        )


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
    stored = map_tensors(folder, manifest, check=check)
    tensors, inputs = (
        {name: array for (role, name), array in stored.items() if role == wanted} for wanted in (CACHE, INPUTS)
    )
    try:
        check_inputs(layout, inputs)
        check_snapshot(layout, tensors, manifest.tokens, inputs)
        ids = limits.checked_ids(engine.manifest.config, "its tokens", stored[TOKENS, TOKEN_IDS])
    except EngineError as error:
        raise EngineError(f"{folder}: {error}") from error
    except UsageError as error:
        raise EngineError(f"{folder}: {error} {AGAIN}") from error
    return Prefix(folder, manifest, ids, tensors, inputs)


def start_from(engine: Engine, prefix: str | Path | Prefix, *, chat: bool) -> Prefix:
    """The prefix itself, or the one of a folder, once it is known to be of this engine and for such prompts.

    Raises:
        UsageError: It is the beginning of a chat and `chat` is off, or the other way round; or as `open_prefix`.
        EngineError: As `open_prefix`.
    """
    if isinstance(prefix, Prefix):
        _check_engine(engine, prefix.folder, prefix.manifest)
    else:
        prefix = open_prefix(engine, prefix)
    if chat and not prefix.manifest.chat:
        raise UsageError(
            f"{prefix.folder}: is plain text, which no chat template continues. Leave chat out, or compute a prefix of "
            "a system message with chat."
        )
    if prefix.manifest.chat and not chat:
        raise UsageError(f"{prefix.folder}: is the beginning of a chat. Generate with chat.")
    return prefix


def _check_engine(engine: Engine, folder: Path, manifest: PrefixManifest) -> None:
    if manifest.engine != numbers_hash(engine.manifest):
        raise UsageError(
            f"{folder}: was computed with another engine than {engine.folder}, their graphs or weights differ. {AGAIN}"
        )


def text_ids(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    """Ids of a text that others will follow."""
    if not chat:
        return tokenizer.encode_start(text)
    first, second = (chat_ids(tokenizer, text, probe) for probe in PROBES)
    same = [one == other for one, other in zip(first, second)]
    return first[: same.index(False) if False in same else len(same)]


def chat_ids(tokenizer: Tokenizer, system: str, user: str) -> list[int]:
    """Ids of a chat with a system message and one of the user."""
    return tokenizer.chat_prompt([{"role": "system", "content": system}, {"role": "user", "content": user}])
