"""Scheme `clusters` of `sparse-attention`."""

from __future__ import annotations

from dataclasses import dataclass

from effc.errors import InputError, UsageError
from effc.ir.analysis.cached_attention import CachedAttentionSite
from effc.ir.dialect.selections import ClusterSelection
from effc.passes.attention.selection_schemes.base import Change, SelectionScheme


@dataclass(frozen=True)
class ClustersScheme(SelectionScheme):
    """Clusters of the keys of a prefix, which `effc prefix` makes.

    Attributes: those of the pass.

    Raises:
        UsageError: A value that there is not.
    """

    recent: int = 100

    def __post_init__(self) -> None:
        try:
            self._selection()
        except InputError as error:
            raise UsageError(f"sparse-attention: {error}.") from error

    def change(self, site: CachedAttentionSite) -> Change:
        """Another selection; form and storage stay."""
        return Change(site.form, site.storage, self._selection())

    def _selection(self) -> ClusterSelection:
        return ClusterSelection(self.recent)
