"""Scheme `pages` of `sparse-attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effc.ir.analysis.cached_attention import CachedAttentionSite
from effc.ir.dialect.cache_storage import PageStorage
from effc.ir.dialect.selections import PageSelection
from effc.passes.attention.selection_schemes.base import Change, SelectionScheme

BUDGET, SINKS, RECENT, BLOCK = 1024, 4, 32, 8


@dataclass(frozen=True)
class PagesScheme(SelectionScheme):
    """Blocks by bounds, or by the mean, of their keys; a coded cache brings its own blocks, and their bounds.

    Attributes: those of the pass.
    """

    first: ClassVar[int] = 2
    budget: int | None = None
    share: float | None = None
    block: int | None = None
    sinks: int | None = None
    recent: int | None = None
    dense_below: int = 0
    reach: float = 0.6

    def change(self, site: CachedAttentionSite) -> Change:
        """Another selection; form and storage stay."""
        sinks, recent, block = SINKS, RECENT, BLOCK
        if isinstance(site.storage, PageStorage):
            sinks, recent, block = site.storage.sinks, site.storage.recent, site.storage.page
        budget = self.budget if self.budget is not None else 0 if self.share is not None else BUDGET
        selection = PageSelection(
            sinks=sinks if self.sinks is None else self.sinks,
            recent=recent if self.recent is None else self.recent,
            block=block if self.block is None else self.block,
            budget=budget,
            share=self.share or 0.0,
            dense_below=self.dense_below,
            reach=self.reach,
        )
        return Change(site.form, site.storage, selection)
