"""Selection `stride`: a fixed pattern of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from effc.ir.dialect.cache_storage import DenseStorage, HeadSizes, StateTensor, Storage
from effc.ir.dialect.selections.base import TokenSelection, require, require_between

if TYPE_CHECKING:
    from effc.ir.dialect.cached_attention import AttentionForm

MOST = 2**20


@dataclass(frozen=True)
class StrideSelection(TokenSelection):
    """The first tokens, the blocks near a query and, of those before, every `stride`-th.

    LongGen (Ge et al. 2024, arXiv 2410.01485). Key head h begins with block `h mod stride`. Prompts read the same
    pattern.

    Attributes:
        sinks: Tokens at the start.
        recent: Tokens of the near blocks, that of the query included; a multiple of `block`.
        block: Tokens of a block.
        stride: Of the blocks before, one in so many is read.

    Raises:
        InputError: A value that the op does not have.
    """

    kind: ClassVar[str] = "stride"
    sinks: int = 4
    recent: int = 512
    block: int = 64
    stride: int = 16

    def __post_init__(self) -> None:
        require_between(self, ("sinks",), 0, MOST)
        require_between(self, ("block", "stride"), 1, MOST)
        fits = self.recent >= self.block and self.recent % self.block == 0
        require(fits, f"recent is {self.recent}, it must be a multiple of block, which is {self.block}")

    def tensors(self, storage: Storage, sizes: HeadSizes) -> tuple[StateTensor, ...]:
        """None."""
        return ()

    def reason_against(self, form: AttentionForm, storage: Storage) -> str:
        """Causal, without a window, over a dense cache of all tokens."""
        if not isinstance(storage, DenseStorage):
            return f"its cache has storage={storage.kind}, stride reads a dense one"
        if form.window:
            return f"its window of {form.window} tokens bounds what it reads"
        if not form.causal:
            return "it is not causal"
        return "its cache is a ring" if storage.ring else ""

    def read_at(self, tokens: int) -> int:
        """Of the first key head; the others read one block more or less."""
        near = max(0, tokens // self.block - self.recent // self.block + 1) * self.block
        before = [token < self.sinks or token // self.block % self.stride == 0 for token in range(near)]
        return min(tokens, sum(before) + tokens - near)
