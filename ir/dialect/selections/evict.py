"""Selection `evict`: a constant number of tokens, chosen by the attention they got."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from effc.ir.dialect.cache_storage import BATCH, DenseStorage, HeadSizes, StateTensor, Storage
from effc.ir.dialect.selections.base import TokenSelection, require, require_between

if TYPE_CHECKING:
    from effc.ir.dialect.cached_attention import AttentionForm

MOST_POOL = 255
MOST_BLOCK = 2**20
MOST_BUDGET = (2**31 - 1) // 2


@dataclass(frozen=True)
class EvictSelection(TokenSelection):
    """The tokens that the last queries attend to; the others leave the cache.

    SnapKV (Li et al. 2024, arXiv 2404.14469), with one choice for the query heads that share a key head, and again
    whenever the cache is full.

    Attributes:
        budget: Tokens that stay when the cache is full, sinks and recent ones included.
        sinks: Tokens at the start that always stay.
        recent: Tokens at the end that always stay, whose queries choose.
        block: Tokens that a full cache has beyond the budget, and loses then.
        pool: Tokens over which the attention is averaged, odd.

    Raises:
        InputError: A value that the op does not have.
    """

    kind: ClassVar[str] = "evict"
    keeps_slots: ClassVar[bool] = False
    budget: int = 2048
    sinks: int = 4
    recent: int = 32
    block: int = 128
    pool: int = 15

    def __post_init__(self) -> None:
        require_between(self, ("sinks",), 0)
        require_between(self, ("recent",), 1)
        least = self.sinks + self.recent
        fits = least <= self.budget <= MOST_BUDGET
        require(fits, f"budget is {self.budget}, it must be from sinks + recent = {least} to {MOST_BUDGET}")
        require_between(self, ("block",), 1, MOST_BLOCK)
        fits = 1 <= self.pool <= MOST_POOL and self.pool % 2 == 1
        require(fits, f"pool is {self.pool}, it must be odd, from 1 to {MOST_POOL}")

    @property
    def places(self) -> int:
        """Tokens that the cache has room for."""
        return self.budget + self.block

    def tensors(self, storage: Storage, sizes: HeadSizes) -> tuple[StateTensor, ...]:
        """`token`, which one every place holds, and `query`, the last queries."""
        queries = sizes.heads // sizes.kv_heads * sizes.head_size
        return (
            StateTensor("token", ir.DataType.INT32, (BATCH, sizes.kv_heads, self.places)),
            StateTensor("query", ir.DataType.FLOAT, (BATCH, sizes.kv_heads, self.recent, queries)),
        )

    def reason_against(self, form: AttentionForm, storage: Storage) -> str:
        """Causal, without a window, in a dense cache with its places."""
        if not isinstance(storage, DenseStorage):
            return f"its cache has storage={storage.kind}, which keeps every token; evict keeps some in a dense cache"
        if form.window:
            return f"its window of {form.window} tokens bounds what it reads"
        if not form.causal:
            return "it is not causal"
        if form.scale < 0:
            return "its scale is negative"
        if storage.ring != self.places:
            return f"its cache has a ring of {storage.ring} places, it must have budget + block = {self.places}"
        return ""

    def read_at(self, tokens: int) -> int:
        """All that the cache has room for, at most."""
        return min(tokens, self.places)
