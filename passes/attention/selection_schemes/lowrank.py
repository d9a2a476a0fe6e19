"""Scheme `lowrank` of `sparse-attention`."""

from __future__ import annotations

from dataclasses import dataclass

from effc.errors import InputError, UsageError
from effc.ir.analysis.cached_attention import CachedAttentionSite
from effc.ir.dialect.selections import LowRankSelection
from effc.passes.attention.selection_schemes.base import Change, SelectionScheme

BUDGET, LONGEST = 2048, 32768


@dataclass(frozen=True)
class LowRankScheme(SelectionScheme):
    """Chunks of a prefix whose keys `effc prefix` replaces by a product.

    Attributes: those of the pass.

    Raises:
        UsageError: A value that there is not.
    """

    budget: int | None = None
    share: float | None = None
    block: int = 8
    longest: int = LONGEST
    dense_below: int = 0

    def __post_init__(self) -> None:
        try:
            self._selection()
        except InputError as error:
            raise UsageError(f"sparse-attention: {error}.") from error

    @property
    def rotates(self) -> bool:
        """Keys are rotated after they are rebuilt."""
        return True

    def change(self, site: CachedAttentionSite) -> Change:
        """Another selection, and the positions of a prefix where keys are rotated; form and storage stay."""
        rotated = site.form.rotary != "none"
        return Change(site.form, site.storage, self._selection(), range(self.longest) if rotated else None)

    def _selection(self) -> LowRankSelection:
        budget = self.budget if self.budget is not None else 0 if self.share is not None else BUDGET
        return LowRankSelection(self.block, budget, self.share or 0.0, self.dense_below)
