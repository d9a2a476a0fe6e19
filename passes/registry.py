"""The names of all passes. Modules are imported when a pass is asked for, not before."""

from __future__ import annotations

import importlib
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from effc.errors import MissingDependencyError, UsageError
from effc.passes.base import Pass

BUILTIN: dict[str, str] = {
    "canonicalize": "effc.passes.canonicalize:Canonicalize",
    "cached-attention": "effc.passes.attention.cached_attention:CachedAttention",
    "kv-cache": "effc.passes.attention.kv_cache:KvCache",
    "sparse-attention": "effc.passes.attention.sparse_attention:SparseAttention",
    "prompt-filter": "effc.passes.tokens.prompt_filter:PromptFilter",
    "fuse": "effc.passes.fuse:Fuse",
    "stored-weights": "effc.passes.weights.stored_weights:StoredWeights",
    "lossless-weights": "effc.passes.weights.lossless_weights:LosslessWeights",
}
"""Pass name -> `module:class`."""

ENTRY_POINT_GROUP = "effc.passes"


@cache
def _third_party() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def pass_names() -> list[str]:
    """Names of all passes, built in and installed by others, sorted."""
    return sorted({*BUILTIN, *_third_party()})


def pass_class(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        UsageError: No pass has this name; the message lists the names and the nearest one.
        MissingDependencyError: The pass exists, but what it imports is not installed.
    """
    if name not in BUILTIN and name not in _third_party():
        near = get_close_matches(name, pass_names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"unknown pass {name!r}.{hint} Passes: {', '.join(pass_names())}.")
    try:
        if name in BUILTIN:
            module, _, attribute = BUILTIN[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        return _third_party()[name].load()
    except ImportError as error:
        raise MissingDependencyError(f"pass {name!r} cannot be imported: {error}. Install what it names.") from error
