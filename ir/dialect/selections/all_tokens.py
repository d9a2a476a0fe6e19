"""Selection `all`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import onnx_ir as ir

from effc.ir.dialect.cache_storage import HeadSizes, StateTensor, Storage
from effc.ir.dialect.selections.base import TokenSelection

if TYPE_CHECKING:
    from effc.ir.dialect.cached_attention import AttentionForm


@dataclass(frozen=True)
class AllTokens(TokenSelection):
    """Every token is read."""

    kind: ClassVar[str] = "all"

    @classmethod
    def read(cls, attributes: Mapping[str, ir.Attr]) -> Self:
        """The only one."""
        return cls()

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
