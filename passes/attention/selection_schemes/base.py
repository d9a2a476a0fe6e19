"""What a scheme of `sparse-attention` is: its options, and what a layer becomes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from effc.ir.analysis.cached_attention import CachedAttentionSite
from effc.ir.dialect.cache_storage import Storage
from effc.ir.dialect.cached_attention import AttentionForm
from effc.ir.dialect.selections import TokenSelection


@dataclass(frozen=True)
class Change:
    """What a layer becomes, and the position of queries that meet far sinks where that is not their own."""

    form: AttentionForm
    storage: Storage
    selection: TokenSelection
    far: int | None = None


@dataclass(frozen=True)
class SelectionScheme(ABC):
    """A scheme: a frozen dataclass whose fields are its options, checked when it is made.

    Class attributes:
        first: Layers at the start that it leaves alone unless told otherwise.
    """

    first: ClassVar[int] = 0

    @property
    def rotates(self) -> bool:
        """Whether the op must rotate queries and keys itself."""
        return False

    def for_layer(self, index: int, layers: int) -> SelectionScheme | None:
        """What it is in one layer of so many; None: it leaves the layer alone."""
        return self

    @abstractmethod
    def change(self, site: CachedAttentionSite) -> Change:
        """What a layer would become."""
