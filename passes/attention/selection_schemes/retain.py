"""Scheme `retain` of `sparse-attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effc.errors import InputError, UsageError
from effc.ir.analysis.cached_attention import CachedAttentionSite
from effc.ir.dialect.cache_storage import DenseStorage
from effc.ir.dialect.selections import RetainSelection
from effc.passes.attention.selection_schemes.base import Change, SelectionScheme

RECENT, BLOCKS, MOST_BLOCK = 8, 64, 256
"""Of a budget: the last tokens are one in so many, and a block one in so many and at most so long, unless given."""


@dataclass(frozen=True)
class RetainScheme(SelectionScheme):
    """The tokens that surprised the model most, the others dropped.

    Attributes: those of the pass.

    Raises:
        UsageError: A value that there is not.
    """

    whole: ClassVar[bool] = True
    budget: int = 2048
    sinks: int = 4
    recent: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        try:
            self._selection()
        except InputError as error:
            raise UsageError(f"sparse-attention: {error}.") from error

    @property
    def rotates(self) -> bool:
        """Keys are turned to their places by the op."""
        return True

    def change(self, site: CachedAttentionSite) -> Change:
        """Another selection, and a cache with its places and their positions."""
        storage, selection = site.storage, self._selection()
        if isinstance(storage, DenseStorage):
            storage = DenseStorage(storage.dtype, selection.budget)
        return Change(site.form, storage, selection, range(selection.budget))

    def _selection(self) -> RetainSelection:
        recent = self.budget // RECENT if self.recent is None else self.recent
        block = min(MOST_BLOCK, max(1, self.budget // BLOCKS)) if self.block is None else self.block
        return RetainSelection(self.budget, self.sinks, recent, block)
