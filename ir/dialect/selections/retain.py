"""Selection `retain`: a constant number of tokens, chosen by scores from outside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from effc.ir.dialect.cache_storage import BATCH, DenseStorage, HeadSizes, StateTensor, Storage
from effc.ir.dialect.selections.base import TokenSelection, require, require_between

if TYPE_CHECKING:
    from effc.ir.dialect.cached_attention import AttentionForm

MOST = 2**20


@dataclass(frozen=True)
class RetainSelection(TokenSelection):
    """The tokens with the largest scores, at positions that are places of the cache; the others leave it.

    SirLLM (Yao et al. 2024, arXiv 2405.12528, section 3), whose scores are the surprise of the model.

    Attributes:
        budget: Tokens that the cache has room for.
        sinks: Tokens at the start that always stay.
        recent: Tokens at the end that always stay.
        block: Tokens that a full cache makes room for, at least; 1 is the rule of SirLLM.

    Raises:
        InputError: A value that the op does not have.
    """

    kind: ClassVar[str] = "retain"
    keeps_slots: ClassVar[bool] = False
    turns_by_place: ClassVar[bool] = True
    reads_scores: ClassVar[bool] = True
    budget: int = 2048
    sinks: int = 4
    recent: int = 256
    block: int = 32

    def __post_init__(self) -> None:
        require_between(self, ("sinks", "recent"), 0, MOST)
        require_between(self, ("block",), 1, MOST)
        least = max(self.sinks + self.recent + self.block, self.sinks + 2)
        fits = least <= self.budget < 2**31
        require(fits, f"budget is {self.budget}, it must be from sinks + recent + block = {least} to {2**31 - 1}")

    def tensors(self, storage: Storage, sizes: HeadSizes) -> tuple[StateTensor, ...]:
        """`token`, which one every place holds, for all heads."""
        return (StateTensor("token", ir.DataType.INT32, (BATCH, self.budget)),)

    def constants(self, form: AttentionForm) -> dict[str, tuple[int | str, ...]]:
        """Cosines and sines of all places, and the score of every token."""
        angles = ("batch", self.budget, form.rotary_size // 2)
        return {"place cos": angles, "place sin": angles, "scores": ("batch", "total")}

    def reason_against(self, form: AttentionForm, storage: Storage) -> str:
        """Causal, rotated by the op, without a window, in a dense cache with its places."""
        if not isinstance(storage, DenseStorage):
            return f"its cache has storage={storage.kind}, which keeps every token; retain keeps some in a dense cache"
        if form.window:
            return f"its window of {form.window} tokens bounds what it reads"
        if not form.causal:
            return "it is not causal"
        if form.rotary == "none":
            return (
                "it does not rotate its keys itself, so they cannot be turned to their places; put "
                "cached-attention{rotary=inside} before"
            )
        if storage.ring != self.budget:
            return f"its cache has a ring of {storage.ring} places, it must have budget = {self.budget}"
        return ""

    def read_at(self, tokens: int) -> int:
        """All that the cache has room for, at most."""
        return min(tokens, self.budget)

    @property
    def longest_step(self) -> int:
        """Sinks and one more token must have room beside the new ones."""
        return self.budget - self.sinks - 1
