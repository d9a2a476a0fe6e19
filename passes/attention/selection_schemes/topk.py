"""Scheme `topk` of `sparse-attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effc.ir.analysis.cached_attention import CachedAttentionSite
from effc.ir.dialect.cache_storage import PageStorage
from effc.ir.dialect.selections import TopKSelection
from effc.passes.attention.selection_schemes.base import Change, SelectionScheme

BUDGET, SINKS, RECENT = 1024, 4, 32
SIMILARITY = 0.9


@dataclass(frozen=True)
class TopKScheme(SelectionScheme):
    """Single tokens by the votes of all heads; a coded cache brings its own sinks and recent tokens.

    Attributes: those of the pass.
    """

    first: ClassVar[int] = 2
    budget: int | None = None
    share: float | None = None
    sinks: int | None = None
    recent: int | None = None
    dense_below: int = 0
    refresh: int = 0
    similarity: float = SIMILARITY

    @property
    def rotates(self) -> bool:
        """Queries are compared before they are rotated, since positions alone turn them apart."""
        return self.refresh > 0

    def change(self, site: CachedAttentionSite) -> Change:
        """Another selection; form and storage stay."""
        sinks, recent = SINKS, RECENT
        if isinstance(site.storage, PageStorage):
            sinks, recent = site.storage.sinks, site.storage.recent
        selection = TopKSelection(
            sinks=sinks if self.sinks is None else self.sinks,
            recent=recent if self.recent is None else self.recent,
            budget=self.budget if self.budget is not None else 0 if self.share is not None else BUDGET,
            share=self.share or 0.0,
            dense_below=self.dense_below,
            refresh=self.refresh,
            similarity=self.similarity if self.refresh else 0.0,
        )
        return Change(site.form, site.storage, selection)
