"""What the model's own configuration says about lengths and special ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    for source in (assets.json_object("generation_config.json"), text_config(config), config):
        ids = _ids(source.get("eos_token_id"))
        if ids:
            return ids
    return frozenset()


def pad_id(config: Mapping[str, Any], assets: Assets) -> int:
    """An id to fill rows with; what it is does not matter, it is masked, but the model must have it."""
    for source in (assets.json_object("generation_config.json"), text_config(config), config):
        value = source.get("pad_token_id")
        if isinstance(value, int) and value >= 0:
            return value
    return 0


def _ids(value: object) -> frozenset[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return frozenset(item for item in values if isinstance(item, int) and not isinstance(item, bool) and item >= 0)
