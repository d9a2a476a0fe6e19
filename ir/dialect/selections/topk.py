"""Selection `topk`: the tokens that most heads attend to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

from effc.ir.dialect.cache_storage import (
    BATCH,
    PAST,
    DenseStorage,
    HeadSizes,
    PageStorage,
    StateTensor,
    StaticStorage,
    Storage,
)
from effc.ir.dialect.selections.base import TokenSelection, require, require_between

if TYPE_CHECKING:
    from effc.ir.dialect.cached_attention import AttentionForm


@dataclass(frozen=True)
class TopKSelection(TokenSelection):
    """The tokens with the largest sum of attention over all heads; only their values are read.

    TokenSelect (Wu et al. 2024, arXiv 2411.02886, section 4): every head votes with its softmax over the tokens to
    choose from, and all heads of a layer read the same tokens. Here scores are scaled, and tokens keep their positions.

    Attributes:
        sinks: Tokens at the start that are always read.
        recent: Tokens at the end that are always read.
        budget: Tokens that are chosen, at least.
        share: Share of the tokens to choose from that are chosen, at least; float32.
        dense_below: With fewer cached tokens than this, everything is read.
        refresh: Most steps that one choice serves; 0: it is made at every step.
        similarity: Cosine of a query with the one that chose, all heads together, from which on the choice serves it.

    Raises:
        InputError: A value that the op does not have.
    """

    kind: ClassVar[str] = "topk"
    sinks: int = 4
    recent: int = 32
    budget: int = 0
    share: float = 0.0
    dense_below: int = 0
    refresh: int = 0
    similarity: float = 0.0

    def __post_init__(self) -> None:
        require_between(self, ("sinks", "recent", "budget", "dense_below", "refresh"), 0)
        require_between(self, ("share",), 0, 1)
        require_between(self, ("similarity",), -1, 1)

    @classmethod
    def read(cls, attributes: Mapping[str, ir.Attr]) -> Self:
        """From `select_*` and `dense_below`."""
        require(attributes["select_block"].as_int() == 1, "select_block is not 1, topk chooses single tokens")
        return super().read(attributes)

    def attributes(self) -> dict[str, int | float | str]:
        """All of this selection."""
        return super().attributes() | {"select_block": 1}

    def tensors(self, storage: Storage, sizes: HeadSizes) -> tuple[StateTensor, ...]:
        """With `refresh`, what was chosen, by which query, and when."""
        if not self.refresh:
            return ()
        return (
            StateTensor("chosen", ir.DataType.UINT8, (BATCH, PAST)),
            StateTensor("voter", ir.DataType.FLOAT, (BATCH, sizes.heads * sizes.head_size)),
            StateTensor("age", ir.DataType.INT32, (BATCH, 2)),
        )

    def reason_against(self, form: AttentionForm, storage: Storage) -> str:
        """No window, no ring, and a cache that our kernels read."""
        if form.window:
            return f"its window of {form.window} tokens bounds what it reads"
        if form.scale < 0:
            return "its scale is negative"
        if isinstance(storage, StaticStorage):
            return f"its cache has storage={storage.kind}, which onnxruntime's own attention reads"
        if isinstance(storage, PageStorage) and self.refresh:
            return "its cache is coded, whose keys are read by whole pages, so a choice of tokens cannot serve again"
        if isinstance(storage, PageStorage) and (storage.sinks, storage.recent) != (self.sinks, self.recent):
            return "the selection has other sinks or recent tokens than the pages"
        return "its cache is a ring" if isinstance(storage, DenseStorage) and storage.ring else ""

    def read_at(self, tokens: int) -> int:
        """Sinks, recent ones and those that are chosen; of all others only the keys are read."""
        middle = max(0, tokens - self.sinks - self.recent)
        wanted = max(1, self.budget, math.ceil(float(np.float32(self.share)) * middle))
        return tokens if tokens < self.dense_below or wanted >= middle else tokens - middle + wanted
