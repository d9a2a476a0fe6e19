"""Selection `all`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from effc.ir.dialect.cache_storage import HeadSizes, StateTensor, Storage
from effc.ir.dialect.selections.base import TokenSelection

if TYPE_CHECKING:
    from effc.ir.dialect.cached_attention import AttentionForm


@dataclass(frozen=True)
class AllTokens(TokenSelection):
    """Every token is read."""

    kind: ClassVar[str] = "all"

    def tensors(self, storage: Storage, sizes: HeadSizes) -> tuple[StateTensor, ...]:
        """None."""
        return ()

    def reason_against(self, form: AttentionForm, storage: Storage) -> str:
        """There is none."""
        return ""

    def read_at(self, tokens: int) -> int:
        """All."""
        return tokens
