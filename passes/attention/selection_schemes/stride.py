"""Scheme `stride` of `sparse-attention`."""

from __future__ import annotations

from dataclasses import dataclass

from effc.errors import InputError, UsageError
from effc.ir.analysis.cached_attention import CachedAttentionSite
from effc.ir.dialect.selections import StrideSelection
from effc.passes.attention.selection_schemes.base import Change, SelectionScheme


@dataclass(frozen=True)
class StrideScheme(SelectionScheme):
    """A fixed pattern of blocks, with the middle third of the layers left alone.

    Attributes: those of the pass.

    Raises:
        UsageError: A value that there is not.
    """

    sinks: int = 4
    recent: int = 512
    block: int = 64
    stride: int = 16
    middle: bool = False

    def __post_init__(self) -> None:
        try:
            self._selection()
        except InputError as error:
            raise UsageError(f"sparse-attention: {error}.") from error

    def for_layer(self, index: int, layers: int) -> StrideScheme | None:
        """None in the middle third, as LongGen has it."""
        third = max(1, layers // 3)
        return self if self.middle or not third <= index < layers - third else None

    def change(self, site: CachedAttentionSite) -> Change:
        """Another selection; form and storage stay."""
        return Change(site.form, site.storage, self._selection())

    def _selection(self) -> StrideSelection:
        return StrideSelection(self.sinks, self.recent, self.block, self.stride)
