"""What the model's own configuration says about lengths and special ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effc.errors import UsageError
from effc.runtime.assets import Assets
from effc.runtime.bundle import Manifest

LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len")
"""Names under which configurations keep the longest input."""
OFFSET_MODELS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xlm-roberta-xl")
"""Model types whose position table begins with pad_token_id + 1 unused rows."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration about the language model; multimodal ones nest it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def position_limit(config: Mapping[str, Any]) -> int | None:
    """Most tokens the model has positions for, or None when its configuration does not say."""
    config = text_config(config)
    for key in LENGTH_KEYS:
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            offset = config.get("pad_token_id") if config.get("model_type") in OFFSET_MODELS else None
            return value - (offset + 1 if isinstance(offset, int) else 0)
    return None


def token_limit(manifest: Manifest) -> int | None:
    """Most tokens an engine takes, or None when there is no bound or its configuration does not say."""
    endless = manifest.cache is not None and manifest.cache.endless
    return None if endless else position_limit(manifest.config)


def eos_ids(config: Mapping[str, Any], assets: Assets) -> frozenset[int]:
    """Ids that end a generation: of `generation_config.json`, else of the model's configuration; may be empty."""
    return _special_ids("eos_token_id", config, assets)


def bos_ids(config: Mapping[str, Any], assets: Assets) -> frozenset[int]:
    """Ids that begin a prompt, found as `eos_ids` are; may be empty."""
    return _special_ids("bos_token_id", config, assets)


def pad_id(config: Mapping[str, Any], assets: Assets) -> int:
    """An id to fill rows with; what it is does not matter, it is masked, but the model must have it."""
    for source in (assets.json_object("generation_config.json"), text_config(config), config):
        value = source.get("pad_token_id")
        if isinstance(value, int) and value >= 0:
            return value
    return 0


def checked_ids(config: Mapping[str, Any], what: str, ids: object) -> list[int]:
    """A flat list of at least one id of the vocabulary.

    Args:
        config: The model's configuration.
        what: What the ids are, for messages: `prompt 0`.
        ids: A sequence or array.

    Raises:
        UsageError: It is anything else.
    """
    if not isinstance(ids, Sequence | np.ndarray):
        raise UsageError(f"{what} is a {type(ids).__name__}; give texts, or a list of ids for each prompt.")
    try:
        array = np.asarray(ids)
    except ValueError as error:
        raise UsageError(f"{what}: is no flat list of ids.") from error
    if array.size == 0:
        raise UsageError(f"{what} is empty. Give at least one id.")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError(f"{what}: holds something other than whole numbers. Give a flat list of ids.")
    vocabulary = text_config(config).get("vocab_size")
    if array.min() < 0 or (isinstance(vocabulary, int) and array.max() >= vocabulary):
        raise UsageError(f"{what}: an id is outside the vocabulary of {vocabulary} tokens.")
    return [int(item) for item in array]


def _special_ids(key: str, config: Mapping[str, Any], assets: Assets) -> frozenset[int]:
    for source in (assets.json_object("generation_config.json"), text_config(config), config):
        ids = _ids(source.get(key))
        if ids:
            return ids
    return frozenset()


def _ids(value: object) -> frozenset[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return frozenset(item for item in values if isinstance(item, int) and not isinstance(item, bool) and item >= 0)
