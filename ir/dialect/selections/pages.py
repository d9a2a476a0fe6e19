"""Selection `pages`: blocks by bounds of their keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from effc.ir.dialect.cache_storage import BATCH, PAST, DenseStorage, HeadSizes, PageStorage, StateTensor, Storage
from effc.ir.dialect.selections.base import TokenSelection, require_between

if TYPE_CHECKING:
    from effc.ir.dialect.cached_attention import AttentionForm

MOST_BLOCK = 256
"""Tokens of a block."""


@dataclass(frozen=True)
class PageSelection(TokenSelection):
    """The blocks whose keys may have the largest scores, by their mean or by the bounds of their channels.

    Quest (Tang et al. 2024, arXiv 2406.10774, section 3): a query's score is at most the sum over channels of the
    larger of its products with the least and the largest element of a block. No key comes near that bound; a score on
    the way to it from the middle of the bounds ranks blocks better. The mean of the keys takes half of the bytes and
    finds nearly as much. Query heads that share a key head share its blocks.

    Attributes:
        sinks: Tokens at the start that are always read.
        recent: Tokens at the end that are always read, at least.
        block: Tokens of a block.
        budget: Tokens in blocks that are read, at least.
        share: Share of the blocks that are read, at least; float32.
        dense_below: With fewer cached tokens than this, everything is read.
        reach: What ranks a block: 0: the score of the mean of its keys, where a dense cache has them, else of the
            middle of their bounds; 1: the largest score that the bounds allow (Quest), or between the two; float32.

    Raises:
        InputError: A value that the op does not have.
    """

    kind: ClassVar[str] = "pages"
    sinks: int = 4
    recent: int = 32
    block: int = 8
    budget: int = 0
    share: float = 0.0
    dense_below: int = 0
    reach: float = 0.6

    def __post_init__(self) -> None:
        require_between(self, ("sinks", "recent", "budget", "dense_below"), 0)
        require_between(self, ("block",), 1, MOST_BLOCK)
        require_between(self, ("share", "reach"), 0, 1)

    def tensors(self, storage: Storage, sizes: HeadSizes) -> tuple[StateTensor, ...]:
        """`means` or `bounds` of a dense cache; coded pages have bounds in their parameters.

        Keys of 32 bits have them in half of that: they only rank.
        """
        if not isinstance(storage, DenseStorage):
            return ()
        dtype = ir.DataType.BFLOAT16 if storage.dtype == ir.DataType.FLOAT else storage.dtype
        name, width = ("bounds", 2 * sizes.head_size) if self.reach else ("means", sizes.head_size)
        return (StateTensor(name, dtype, (BATCH, sizes.kv_heads, f"{PAST} // {self.block}", width)),)

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
