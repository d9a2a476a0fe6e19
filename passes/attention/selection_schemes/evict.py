"""Scheme `evict` of `sparse-attention`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from effc.errors import InputError, UsageError
from effc.ir.analysis.cached_attention import CachedAttentionSite
from effc.ir.dialect.cache_storage import DenseStorage
from effc.ir.dialect.selections import EvictSelection
from effc.passes.attention.selection_schemes.base import Change, SelectionScheme

BLOCKS, MOST_BLOCK = 16, 256
"""Of a budget: a block is one in so many, and at most so many tokens, where none is given."""
BETA = 20
"""PyramidKV: the last layer keeps one in so many of what it would keep without a pyramid, recent tokens aside."""


@dataclass(frozen=True)
class EvictScheme(SelectionScheme):
    """The tokens that the last queries attend to, the others dropped.

    Attributes: those of the pass.

    Raises:
        UsageError: A value that there is not.
    """

    budget: int = 2048
    sinks: int = 4
    recent: int = 32
    block: int | None = None
    pool: int = 15
    pyramid: bool = False

    def __post_init__(self) -> None:
        least = self.recent + BETA * max(self.sinks, 1)
        if self.pyramid and self.budget < least:
            raise UsageError(
                f"budget is {self.budget}, a pyramid needs at least recent + {BETA} * sinks = {least}, so that its "
                "last layer has room for them. Raise the budget, or leave pyramid out."
            )
        try:
            self._selection()
        except InputError as error:
            raise UsageError(f"sparse-attention: {error}.") from error

    def for_layer(self, index: int, layers: int) -> EvictScheme:
        """With a pyramid, a budget that falls evenly from layer to layer.

        PyramidKV (Cai et al. 2024, arXiv 2406.02069) over all layers of the model, without its bound by the length of
        the prompt, which is not known here.
        """
        if not self.pyramid or layers < 2:
            return replace(self, pyramid=False)
        middle = self.budget - self.recent
        least = middle // BETA
        most = 2 * middle - least
        budget = most - index * ((most - least) // (layers - 1)) + self.recent
        return replace(self, budget=budget, pyramid=False)

    def change(self, site: CachedAttentionSite) -> Change:
        """Another selection, and a cache with its places."""
        storage, selection = site.storage, self._selection()
        if isinstance(storage, DenseStorage):
            storage = DenseStorage(storage.dtype, selection.places)
        return Change(site.form, storage, selection)

    def _selection(self) -> EvictSelection:
        block = min(MOST_BLOCK, max(1, self.budget // BLOCKS)) if self.block is None else self.block
        return EvictSelection(self.budget, self.sinks, self.recent, block, self.pool)
