"""The schemes of `sparse-attention`, one file each."""

from __future__ import annotations

from effc.passes.attention.selection_schemes.base import Change, SelectionScheme
from effc.passes.attention.selection_schemes.clusters import ClustersScheme
from effc.passes.attention.selection_schemes.evict import EvictScheme
from effc.passes.attention.selection_schemes.lowrank import LowRankScheme
from effc.passes.attention.selection_schemes.pages import PagesScheme
from effc.passes.attention.selection_schemes.retain import RetainScheme
from effc.passes.attention.selection_schemes.stride import StrideScheme
from effc.passes.attention.selection_schemes.topk import TopKScheme
from effc.passes.attention.selection_schemes.window import WindowScheme

SCHEMES: dict[str, type[SelectionScheme]] = {
    "pages": PagesScheme,
    "topk": TopKScheme,
    "window": WindowScheme,
    "clusters": ClustersScheme,
    "evict": EvictScheme,
    "retain": RetainScheme,
    "stride": StrideScheme,
    "lowrank": LowRankScheme,
}
"""Option `scheme` of the pass -> its class."""

__all__ = ["SCHEMES", "Change", "SelectionScheme"]
