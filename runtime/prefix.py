"""Prefixes: the cache that the beginning of a prompt leaves, computed once and mapped by runs that start there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effc import __version__
from effc.errors import EngineError, UsageError
from effc.runtime import limits
from effc.runtime.batch import Batch, check_task, prompt_chunk, takes_scores
from effc.runtime.bundle import numbers_hash
from effc.runtime.clusters import cluster_cache
from effc.runtime.kv_state import check_snapshot
from effc.runtime.low_rank import low_rank_cache
from effc.runtime.new_folder import new_folder, write_synced
from effc.runtime.prefix_folder import (
    AGAIN,
    CACHE,
    DATA,
    INPUTS,
    MANIFEST,
    TOKEN_IDS,
    TOKENS,
    PrefixManifest,
    map_tensors,
    read_prefix_manifest,
    write_tensors,
)
from effc.runtime.prefix_inputs import check_inputs, empty_inputs, prefix_ports

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
        whole = _chat_ids(tokenizer, start, text) if self.manifest.chat else tokenizer.encode(start + text)
        if whole[: self.length] == self.token_ids:
            return whole[self.length :]
        if _text_ids(tokenizer, start, self.manifest.chat) != self.token_ids:
            raise UsageError(
                f"{self.folder}: the engine's tokenizer or chat template makes other tokens of its text now. {AGAIN}"
            )
        raise UsageError(
            f"prompt {index}: does not continue {self.folder}. Read together, the end of the prefix and {text[:20]!r} "
            "make other tokens than apart. Let the prefix end, and the prompt begin, before a blank or after a line."
        )


def write_prefix(
    engine: Engine,
    prefix: str | Sequence[int],
    output: str | Path,
    *,
    chat: bool = False,
    keep: float | None = None,
    cluster_tokens: int | None = None,
    rank: int | None = None,
    outliers: int | None = None,
    prefill_chunk: int | None = None,
) -> dict[str, Any]:
    """Read the beginning of a prompt and write its cache to a folder.

    Args:
        engine: An engine of task `causal-lm`.
        prefix: A text, encoded with the special tokens the tokenizer puts before one, or token ids.
        output: The folder to write; a prefix already there is replaced.
        chat: Take the text as the system message of a chat: the prefix is what the model's chat template makes of
            it, up to where the user's message begins.
        keep: Share of the clustered keys that a step reads, above 0 and at most 1, where the engine reads clusters of
            a prefix; None: a quarter.
        cluster_tokens: Keys of a cluster there, the mean; None: 5. With more, fewer centroids are compared, and the
            keys that matter are found less surely.
        rank: Columns of the matrices whose product replaces the keys, where the engine reads a prefix of low rank;
            None: 5 of 32 elements of a token's keys, and at least 64.
        outliers: Chunks of every key head that keep their keys there; None: one in 64, at most 48.
        prefill_chunk: Tokens read in one run; None as `generate` does.

    Returns:
        The JSON object of `effc prefix`: `prefix` (the folder), `engine`, `tokens`, `bytes` of all files, and
        `seconds` for computing and writing them.

    Raises:
        UsageError: The prefix is empty or leaves no room for a prompt, the task does not generate, the chat
            template takes no system message, an option is out of range or of another engine, or the cache keeps
            tokens by their surprise.
        EngineError: The engine has no cache, or no tokenizer where one is needed, or fails while running.
        OutputError: The folder cannot be written.
    """
    begun = time.perf_counter()
    check_task(engine)
    layout = engine.cache_layout()
    if takes_scores(engine):
        raise UsageError(
            f"{engine.folder}: keeps the tokens that surprised the model most, and a prefix does not hold what "
            "surprised it. Give the text with the prompt, or build the engine without sparse-attention{scheme=retain}."
        )
    if prefill_chunk is not None and prefill_chunk < 1:
        raise UsageError(f"prefill_chunk is {prefill_chunk}; give at least 1, or leave it out.")
    clustering = _cluster_options(engine, keep, cluster_tokens)
    reducing = _low_rank_options(engine, rank, outliers)
    ids = _prefix_ids(engine, prefix, chat)
    with new_folder(Path(output), MANIFEST, "a prefix") as folder:
        batch = Batch(engine, [ids], 1)
        batch.prefill(prefill_chunk or prompt_chunk(engine, 1, len(ids)))
        cache = batch.state.snapshot()
        tensors = [(TOKEN_IDS, TOKENS, "int64", np.array(ids, np.int64))]
        inputs = empty_inputs(layout)
        inputs |= cluster_cache(layout, cache, len(ids), **clustering)
        inputs |= low_rank_cache(layout, engine.folder, cache, len(ids), **reducing)
        tensors += [(port.input, CACHE, port.dtype, cache[port.input]) for port in layout.ports]
        tensors += [(port.name, INPUTS, port.dtype, inputs[port.name]) for port in prefix_ports(layout)]
        stored = write_tensors(folder / DATA, tensors)
        manifest = PrefixManifest(
            effc_version=__version__,
            engine=numbers_hash(engine.manifest),
            target=engine.manifest.target,
            cache_mode=layout.mode,
            tokens=len(ids),
            text=prefix if isinstance(prefix, str) else None,
            chat=chat,
            file=DATA,
            bytes=(folder / DATA).stat().st_size,
            tensors=stored,
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


def _cluster_options(engine: Engine, keep: float | None, cluster_tokens: int | None) -> dict[str, Any]:
    """Those of `cluster_cache` that were given."""
    options = {"keep": keep, "cluster_tokens": cluster_tokens}
    given = {name: value for name, value in options.items() if value is not None}
    if given and not engine.cache_layout().clusters:
        raise UsageError(
            f"{engine.folder}: reads no clusters of a prefix, so it keeps all of it. "
            f"Leave {' and '.join(given)} out, or build the engine with sparse-attention{{scheme=clusters}}."
        )
    if keep is not None and not 0 < keep <= 1:
        raise UsageError(f"keep is {keep}; give a share above 0 and at most 1.")
    if cluster_tokens is not None and cluster_tokens < 1:
        raise UsageError(f"cluster_tokens is {cluster_tokens}; give at least 1.")
    return given


def _low_rank_options(engine: Engine, rank: int | None, outliers: int | None) -> dict[str, Any]:
    """Those of `low_rank_cache` that were given."""
    options = {"rank": rank, "outliers": outliers}
    given = {name: value for name, value in options.items() if value is not None}
    if given and not engine.cache_layout().low_rank:
        raise UsageError(
            f"{engine.folder}: reads the keys of a prefix as they are. "
            f"Leave {' and '.join(given)} out, or build the engine with sparse-attention{{scheme=lowrank}}."
        )
    for name, least in (("rank", 1), ("outliers", 0)):
        if given.get(name, least) < least:
            raise UsageError(f"{name} is {given[name]}; give at least {least}.")
    return given


def _check_engine(engine: Engine, folder: Path, manifest: PrefixManifest) -> None:
    if manifest.engine != numbers_hash(engine.manifest):
        raise UsageError(
            f"{folder}: was computed with another engine than {engine.folder}, their graphs or weights differ. {AGAIN}"
        )


def _prefix_ids(engine: Engine, prefix: str | Sequence[int], chat: bool) -> list[int]:
    if isinstance(prefix, str):
        if not prefix:
            raise UsageError("the prefix is empty. Give a text.")
        ids = _text_ids(engine.tokenizer, prefix, chat)
        if not ids:
            raise UsageError(f"the tokenizer makes no tokens of the prefix {prefix[:40]!r}.")
    elif chat:
        raise UsageError("the prefix is a list of ids; chat takes a text.")
    else:
        ids = limits.checked_ids(engine.manifest.config, "the prefix", prefix)
    limit = limits.position_limit(engine.manifest.config)
    if limit is not None and len(ids) >= limit:
        raise UsageError(
            f"the prefix has {len(ids)} tokens, the model takes at most {limit} with the prompt. Shorten it."
        )
    return ids


def _text_ids(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    """Ids of a text that others will follow."""
    if not chat:
        return tokenizer.encode_start(text)
    first, second = (_chat_ids(tokenizer, text, probe) for probe in PROBES)
    same = [one == other for one, other in zip(first, second)]
    return first[: same.index(False) if False in same else len(same)]


def _chat_ids(tokenizer: Tokenizer, system: str, user: str) -> list[int]:
    return tokenizer.chat_prompt([{"role": "system", "content": system}, {"role": "user", "content": user}])
