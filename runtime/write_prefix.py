"""Writes prefixes: reads the beginning of a prompt once, and keeps its cache and what stands for parts of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effc import __version__
from effc.errors import UsageError
from effc.runtime import limits
from effc.runtime.batch import Batch, check_task, prompt_chunk, takes_scores
from effc.runtime.bundle import CacheLayout, numbers_hash
from effc.runtime.clusters import cluster_cache
from effc.runtime.low_rank import low_rank_cache
from effc.runtime.new_folder import new_folder, write_synced
from effc.runtime.prefix import text_ids
from effc.runtime.prefix_folder import (
    CACHE,
    DATA,
    INPUTS,
    MANIFEST,
    TOKEN_IDS,
    TOKENS,
    PrefixManifest,
    StoredTensor,
    write_tensors,
)
from effc.runtime.prefix_inputs import empty_inputs, prefix_ports

if TYPE_CHECKING:
    from effc.runtime.session import Engine


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
        cluster_tokens: Keys of a cluster there, the mean; None: 10. With more, fewer centroids are compared, and the
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
    _check_engine(engine, prefill_chunk)
    clustering = _cluster_options(engine, keep, cluster_tokens)
    reducing = _low_rank_options(engine, rank, outliers)
    ids, layout = _prefix_ids(engine, prefix, chat), engine.cache_layout()
    with new_folder(Path(output), MANIFEST, "a prefix") as folder:
        batch = Batch(engine, [ids], 1)
        batch.prefill(prefill_chunk or prompt_chunk(engine, 1, len(ids)))
        cache, inputs = batch.state.snapshot(), empty_inputs(layout)
        inputs |= cluster_cache(layout, cache, len(ids), **clustering)
        inputs |= low_rank_cache(layout, engine.folder, cache, len(ids), **reducing)
        stored = write_tensors(folder / DATA, _tensors(layout, ids, cache, inputs))
        text = prefix if isinstance(prefix, str) else None
        manifest = _manifest(engine, len(ids), text, chat, stored, (folder / DATA).stat().st_size)
        write_synced(folder / MANIFEST, manifest.to_json())
        size = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "prefix": str(output),
        "engine": str(engine.folder),
        "tokens": len(ids),
        "bytes": size,
        "seconds": time.perf_counter() - begun,
    }


def _check_engine(engine: Engine, prefill_chunk: int | None) -> None:
    check_task(engine)
    engine.cache_layout()
    if takes_scores(engine):
        raise UsageError(
            f"{engine.folder}: keeps the tokens that surprised the model most, and a prefix does not hold what "
            "surprised it. Give the text with the prompt, or build the engine without sparse-attention{scheme=retain}."
        )
    if prefill_chunk is not None and prefill_chunk < 1:
        raise UsageError(f"prefill_chunk is {prefill_chunk}; give at least 1, or leave it out.")


def _cluster_options(engine: Engine, keep: float | None, cluster_tokens: int | None) -> dict[str, Any]:
    """Those of `cluster_cache` that were given."""
    given = _given(keep=keep, cluster_tokens=cluster_tokens)
    if not engine.cache_layout().clusters:
        _refuse(engine, given, "reads no clusters of a prefix, so it keeps all of it", "clusters")
    if keep is not None and not 0 < keep <= 1:
        raise UsageError(f"keep is {keep}; give a share above 0 and at most 1.")
    _require_least(given, "cluster_tokens", 1)
    return given


def _low_rank_options(engine: Engine, rank: int | None, outliers: int | None) -> dict[str, Any]:
    """Those of `low_rank_cache` that were given."""
    given = _given(rank=rank, outliers=outliers)
    if not engine.cache_layout().low_rank:
        _refuse(engine, given, "reads the keys of a prefix as they are", "lowrank")
    _require_least(given, "rank", 1)
    _require_least(given, "outliers", 0)
    return given


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse(engine: Engine, given: Mapping[str, Any], reason: str, scheme: str) -> None:
    """Refuse options, if there are any, that an engine has no use for."""
    if given:
        raise UsageError(
            f"{engine.folder}: {reason}. Leave {' and '.join(given)} out, or build the engine with "
            f"sparse-attention{{scheme={scheme}}}."
        )


def _require_least(given: Mapping[str, Any], name: str, least: int) -> None:
    if given.get(name, least) < least:
        raise UsageError(f"{name} is {given[name]}; give at least {least}.")


def _prefix_ids(engine: Engine, prefix: str | Sequence[int], chat: bool) -> list[int]:
    if isinstance(prefix, str):
        if not prefix:
            raise UsageError("the prefix is empty. Give a text.")
        ids = text_ids(engine.tokenizer, prefix, chat)
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


def _tensors(
    layout: CacheLayout, ids: Sequence[int], cache: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]
) -> list[tuple[str, str, str, np.ndarray]]:
    """Name, role, dtype and content of every tensor of the folder."""
    return [
        (TOKEN_IDS, TOKENS, "int64", np.array(ids, np.int64)),
        *((port.input, CACHE, port.dtype, cache[port.input]) for port in layout.ports),
        *((port.name, INPUTS, port.dtype, inputs[port.name]) for port in prefix_ports(layout)),
    ]


def _manifest(
    engine: Engine, tokens: int, text: str | None, chat: bool, stored: list[StoredTensor], size: int
) -> PrefixManifest:
    return PrefixManifest(
        effc_version=__version__,
        engine=numbers_hash(engine.manifest),
        target=engine.manifest.target,
        cache_mode=engine.cache_layout().mode,
        tokens=tokens,
        text=text,
        chat=chat,
        file=DATA,
        bytes=size,
        tensors=stored,
    )
