"""Which cached tokens a step of `CachedAttention` reads: the attributes of each selection and the tensors it adds.

`docs/cached-attention.md`, section "Selection", gives the exact meaning.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from effc.errors import InputError
from effc.ir.dialect.cache_storage import BATCH, PAST, DenseStorage, HeadSizes, PageStorage, StateTensor, Storage

if TYPE_CHECKING:
    from effc.ir.dialect.cached_attention import AttentionForm

MOST_BLOCK = 256
"""Tokens of a block."""
MOST_SINKS = 128
"""Of selection `window`."""
POSITIONS = ("keep", "compact", "cap")


class TokenSelection(ABC):
    """A selection: frozen, checked when it is made.

    Class attributes:
        kind: Value of the attribute `selection`.
    """

    kind: ClassVar[str]

    @abstractmethod
    def attributes(self) -> dict[str, int | float | str]:
        """The attributes that are not those of no selection."""

    @abstractmethod
    def tensors(self, storage: Storage, sizes: HeadSizes) -> tuple[StateTensor, ...]:
        """What it carries from step to step, after the tensors of the storage."""

    @abstractmethod
    def reason_against(self, form: AttentionForm, storage: Storage) -> str:
        """Why an attention without a bias cannot have it; empty when it can."""

    @abstractmethod
    def read_at(self, tokens: int) -> int:
        """Tokens that a step of one token reads of this many in the cache."""


@dataclass(frozen=True)
class AllTokens(TokenSelection):
    """Every token is read."""

    kind: ClassVar[str] = "all"

    def attributes(self) -> dict[str, int | float | str]:
        """None."""
        return {}

    def tensors(self, storage: Storage, sizes: HeadSizes) -> tuple[StateTensor, ...]:
        """None."""
        return ()

    def reason_against(self, form: AttentionForm, storage: Storage) -> str:
        """There is none."""
        return ""

    def read_at(self, tokens: int) -> int:
        """All."""
        return tokens


@dataclass(frozen=True)
class PageSelection(TokenSelection):
    """The blocks whose keys may have the largest scores, by the bounds of their channels.

    Quest (Tang et al. 2024, arXiv 2406.10774, section 3): a query's score is at most the sum over channels of the
    larger of its products with the least and the largest element of a block. Query heads that share a key head share
    its blocks.

    Attributes:
        sinks: Tokens at the start that are always read.
        recent: Tokens at the end that are always read, at least.
        block: Tokens of a block.
        budget: Tokens in blocks that are read, at least.
        share: Share of the blocks that are read, at least; float32.
        dense_below: With fewer cached tokens than this, everything is read.

    Raises:
        InputError: A value that the op does not have.
    """

    kind: ClassVar[str] = "pages"
    sinks: int = 4
    recent: int = 32
    block: int = 16
    budget: int = 0
    share: float = 0.0
    dense_below: int = 0

    def __post_init__(self) -> None:
        for name in ("sinks", "recent", "budget", "dense_below"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, it must be 0 or more")
        _require(1 <= self.block <= MOST_BLOCK, f"block is {self.block}, it must be from 1 to {MOST_BLOCK}")
        _require(0 <= self.share <= 1, f"share is {self.share}, it must be from 0 to 1")

    def attributes(self) -> dict[str, int | float | str]:
        """All of this selection."""
        return {
            "select_sinks": self.sinks,
            "select_recent": self.recent,
            "select_block": self.block,
            "select_budget": self.budget,
            "select_share": float(np.float32(self.share)),
            "dense_below": self.dense_below,
        }

    def tensors(self, storage: Storage, sizes: HeadSizes) -> tuple[StateTensor, ...]:
        """`bounds` of a dense cache; coded pages have theirs in their parameters."""
        if not isinstance(storage, DenseStorage):
            return ()
        blocks = f"{PAST} // {self.block}"
        return (StateTensor("bounds", storage.dtype, (BATCH, sizes.kv_heads, blocks, 2 * sizes.head_size)),)

    def reason_against(self, form: AttentionForm, storage: Storage) -> str:
        """No window; pages must have bounds, and be the blocks."""
        if form.window:
            return f"its window of {form.window} tokens bounds what it reads"
        if form.scale < 0:
            return "its scale is negative"
        return self._reason_against_storage(storage)

    def _reason_against_storage(self, storage: Storage) -> str:
        if isinstance(storage, DenseStorage):
            return "its cache is a ring" if storage.ring else ""
        if not isinstance(storage, PageStorage):
            return f"its cache has storage={storage.kind}, which onnxruntime's own attention reads"
        if storage.key_scheme != "channel":
            return "its keys are balanced: their parameters belong to tokens, which bounds no channel"
        if 16 in storage.key_bits[: 1 + storage.two_classes]:
            return "its pages hold keys of 16 bits, which have no parameters that bound them"
        if (storage.sinks, storage.recent, storage.page) != (self.sinks, self.recent, self.block):
            return "the selection has other sinks, recent tokens or blocks than the pages"
        return ""

    def read_at(self, tokens: int) -> int:
        """Sinks, the blocks that are wanted, and the rest at the end."""
        blocks = max(0, tokens - self.sinks - self.recent) // self.block
        wanted = self.wanted(blocks)
        if tokens < self.dense_below or wanted >= blocks:
            return tokens
        return tokens - (blocks - wanted) * self.block

    def wanted(self, blocks: int) -> int:
        """Blocks that are read of so many."""
        return max(1, self.budget // self.block, math.ceil(float(np.float32(self.share)) * blocks))


@dataclass(frozen=True)
class WindowSelection(TokenSelection):
    """The window of the attention and, beyond it, the first tokens.

    StreamingLLM (Xiao et al. 2023, arXiv 2309.17453) keeps the first tokens and renumbers all that is kept; LM-Infinite
    (Han et al. 2023, arXiv 2308.16137, section 4) reads them at a bounded distance.

    Attributes:
        sinks: Tokens at the start that are read beyond the window.
        positions: Their distance from a query that reads them so: `keep`: what it is; `compact`: as if they came right
            before the window; `cap`: the length of the window for all of them.

    Raises:
        InputError: A value that the op does not have.
    """

    kind: ClassVar[str] = "window"
    sinks: int = 4
    positions: str = "compact"

    def __post_init__(self) -> None:
        _require(1 <= self.sinks <= MOST_SINKS, f"sinks is {self.sinks}, it must be from 1 to {MOST_SINKS}")
        text = ", ".join(POSITIONS)
        _require(self.positions in POSITIONS, f"positions is {self.positions!r}, it must be one of {text}")

    def attributes(self) -> dict[str, int | float | str]:
        """All of this selection."""
        return {"select_sinks": self.sinks, "select_positions": self.positions}

    def tensors(self, storage: Storage, sizes: HeadSizes) -> tuple[StateTensor, ...]:
        """`sink_key` and `sink_value`."""
        assert isinstance(storage, DenseStorage)
        return tuple(
            StateTensor(name, storage.dtype, (BATCH, sizes.kv_heads, self.sinks, size))
            for name, size in (("sink_key", sizes.head_size), ("sink_value", sizes.value_size))
        )

    def reason_against(self, form: AttentionForm, storage: Storage) -> str:
        """A causal window in a ring, rotated by the op where sinks move."""
        if not isinstance(storage, DenseStorage):
            return f"its cache has storage={storage.kind}, which keeps every token; sinks and window are a dense ring"
        if not form.causal:
            return "it is not causal"
        if self.positions != "keep" and form.rotary == "none":
            return (
                "it does not rotate its keys itself, so its sinks cannot move; put cached-attention{rotary=inside} "
                "before, or take positions=keep"
            )
        return "" if storage.ring else "its cache is no ring"

    def read_at(self, tokens: int) -> int:
        """The sinks at most, besides what the window bounds."""
        return min(tokens, self.sinks)

    def far_position(self, window: int) -> int | None:
        """Position of queries as they meet the sinks, and that of sinks is theirs or, capped, 0; None: their own."""
        return {"keep": None, "compact": self.sinks + window - 1, "cap": window}[self.positions]


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise InputError(problem)
