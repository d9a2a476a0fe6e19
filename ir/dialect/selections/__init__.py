"""Which cached tokens a step of `CachedAttention` reads: the attributes of each selection and the tensors it adds.

`docs/cached-attention.md`, section "Selection", gives the exact meaning.
"""

from __future__ import annotations

from effc.ir.dialect.selections.all_tokens import AllTokens
from effc.ir.dialect.selections.base import TokenSelection
from effc.ir.dialect.selections.clusters import ClusterSelection
from effc.ir.dialect.selections.evict import EvictSelection
from effc.ir.dialect.selections.lowrank import LowRankSelection
from effc.ir.dialect.selections.pages import PageSelection
from effc.ir.dialect.selections.retain import RetainSelection
from effc.ir.dialect.selections.stride import StrideSelection
from effc.ir.dialect.selections.topk import TopKSelection
from effc.ir.dialect.selections.window import WindowSelection

SELECTIONS: dict[str, type[TokenSelection]] = {
    one.kind: one
    for one in (
        AllTokens,
        PageSelection,
        TopKSelection,
        WindowSelection,
        ClusterSelection,
        EvictSelection,
        RetainSelection,
        StrideSelection,
        LowRankSelection,
    )
}
"""Value of the attribute `selection` -> its class."""

__all__ = [
    "SELECTIONS",
    "AllTokens",
    "ClusterSelection",
    "EvictSelection",
    "LowRankSelection",
    "PageSelection",
    "RetainSelection",
    "StrideSelection",
    "TokenSelection",
    "TopKSelection",
    "WindowSelection",
]
