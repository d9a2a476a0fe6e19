"""What an engine reads of the prompts it is given: token ids, checked, shortened where it has a filter."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from effc.errors import UsageError
from effc.runtime import limits

if TYPE_CHECKING:
    from effc.runtime.prefix import Prefix
    from effc.runtime.session import Engine

Prompts = str | Sequence[str] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        ids: Its tokens, without those of the prefix it follows.
        kept: Those that the model reads.
        seconds: Time it took to choose them.
    """

    ids: list[int]
    kept: list[int]
    seconds: float


def read_prompts(engine: Engine, prompts: Prompts, chat: bool, start: Prefix | None, filtered: bool) -> list[Prompt]:
    """Encode prompts, and shorten the long ones.

    Args:
        engine: The engine.
        prompts: A text, texts, or lists of token ids.
        chat: Take each text as a user's message.
        start: The prefix they follow.
        filtered: Whether the engine's filter, when it has one, shortens them.

    Raises:
        UsageError: A prompt is empty, too long, neither text nor ids, or does not continue the prefix.
        EngineError: The engine has no tokenizer and texts were given, or its filter fails.
    """
    items: list[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else [*prompts]
    whole = [_encode(engine, index, item, chat, start) for index, item in enumerate(items)]
    _check_lengths(engine, whole, start.length if start is not None else 0, filtered)
    return [_shortened(engine, ids, start) if filtered else Prompt(ids, ids, 0.0) for ids in whole]


def _shortened(engine: Engine, ids: list[int], start: Prefix | None) -> Prompt:
    begun = time.perf_counter()
    kept = engine.shortened(ids, start)
    return Prompt(ids, kept, time.perf_counter() - begun)


def _check_lengths(engine: Engine, prompts: Sequence[Sequence[int]], before: int, filtered: bool) -> None:
    """Refuse prompts longer than the model, or the filter that is to shorten them, has positions for."""
    limit, positions = limits.token_limit(engine.manifest), limits.position_limit(engine.manifest.config)
    entry = engine.manifest.prompt_filter if filtered else None
    for index, ids in enumerate(prompts):
        tokens = before + len(ids)
        if limit is not None and tokens > limit:
            raise UsageError(f"prompt {index} has {tokens} tokens, the model takes at most {limit}. Shorten it.")
        # An engine that takes texts of any length compares tokens within a window; its filter compares all.
        if entry is not None and len(ids) > entry.keep and positions is not None and tokens > positions:
            raise UsageError(
                f"prompt {index} has {tokens} tokens, the engine's filter takes at most {positions}. Shorten it, or "
                "let the model read it whole (filter_prompt=False, --no-filter-prompt)."
            )


def _encode(engine: Engine, index: int, prompt: str | Sequence[int], chat: bool, start: Prefix | None) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise UsageError(f"prompt {index} is empty. To start from nothing, give the ids to start with.")
        ids = _encode_text(engine, index, prompt, chat, start)
        if not ids:
            raise UsageError(f"prompt {index}: the tokenizer makes no tokens of {prompt!r}.")
        return ids
    if chat:
        raise UsageError(f"prompt {index} is a list of ids; chat takes texts.")
    ids = limits.checked_ids(engine.manifest.config, f"prompt {index}", prompt)
    if start is not None:
        start.check_continues(engine, index, ids)
    return ids


def _encode_text(engine: Engine, index: int, prompt: str, chat: bool, start: Prefix | None) -> list[int]:
    if start is not None:
        return start.continued(engine.tokenizer, index, prompt)
    if chat:
        return engine.tokenizer.chat_prompt([{"role": "user", "content": prompt}])
    return engine.tokenizer.encode(prompt)
