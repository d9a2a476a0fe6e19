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
    """What a layer becomes, and the positions whose cosines and sines follow its cache, where it takes some."""

    form: AttentionForm
    storage: Storage
    selection: TokenSelection
    far: range | None = None


@dataclass(frozen=True)
class SelectionScheme(ABC):
    """A scheme: a frozen dataclass whose fields are its options, checked when it is made.

    Class attributes:
        first: Layers at the start that it leaves alone unless told otherwise.
        whole: Whether it takes all layers without a window of their own, or none.
    """

    first: ClassVar[int] = 0
    whole: ClassVar[bool] = False

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
