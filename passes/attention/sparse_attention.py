"""The `sparse-attention` pass: a step of decoding reads only the part of the cache that matters to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from effc.errors import InputError, UsageError
from effc.ir.analysis.cached_attention import CachedAttentionSite, cached_attention_sites, selection_figures
from effc.ir.dialect.cache_storage import PageStorage
from effc.ir.dialect.cached_attention import selection_reason
from effc.ir.dialect.token_selection import AllTokens, PageSelection, TokenSelection
from effc.ir.program import Program
from effc.passes.attention.cache_change import change_cache
from effc.passes.attention.cached_attention import CachedAttention
from effc.passes.attention.raising import other_attention
from effc.passes.base import Contract, LeftAlone, Match, Pass, PassReport, Site

BUDGET = 1024
SINKS, RECENT, BLOCK = 4, 32, 16


@dataclass(frozen=True)
class SparseAttention(Pass):
    """Read only the cached tokens that may get much attention, chosen anew for every new token.

    Nothing is dropped: every token stays in the cache, at its position, and may be read by a later step. Prompts are
    read in full; a step of one new token chooses. `docs/sparse-attention.md` has what it costs and saves.

    Before:

        y, present.0.key, present.0.value = effc.CachedAttention(…, past_key_values.0.key, past_key_values.0.value)
            {selection="all"}

    After (`sparse-attention{budget=1024}`):

        y, present.0.key, present.0.value, present.0.bounds = effc.CachedAttention(
            …, past_key_values.0.key, past_key_values.0.value, past_key_values.0.bounds)
            {selection="pages", select_block=16, select_budget=1024, …}

    After `kv-cache{scheme=int4}` the pages of the cache are the blocks, and their parameters the bounds: no tensor is
    added.

    Attributes:
        scheme: `pages`: blocks of tokens by the least and the largest element of every key channel (Quest).
        budget: Tokens in blocks that a step reads, at least; None: 1024, and 0 with `share`.
        share: Share of the blocks that a step reads, at least.
        block: Tokens of a block of a dense cache; None: 16. A coded cache has its pages.
        sinks: Tokens at the start that every step reads; None: 4, or as the coded cache keeps them.
        recent: Tokens at the end that every step reads, at least; None: 32, or as the coded cache keeps them.
        dense_below: With fewer cached tokens than this, everything is read.
        first: Layers at the start that are left alone; attention is spread most widely there.
        last: Layers at the end that are left alone.
        skip: Glob patterns of layers to leave alone, joined by `|`, such as `*layer?3`.
    """

    name: ClassVar[str] = "sparse-attention"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    scheme: Literal["pages"] = "pages"
    budget: int | None = field(default=None, metadata={"range": "0 or more"})
    share: float | None = field(default=None, metadata={"range": "above 0, to 1"})
    block: int | None = field(default=None, metadata={"range": "1 to 256"})
    sinks: int | None = field(default=None, metadata={"range": "0 to 1024"})
    recent: int | None = field(default=None, metadata={"range": "0 to 4096"})
    dense_below: int = field(default=0, metadata={"range": "0 or more"})
    first: int = field(default=2, metadata={"range": "0 or more"})
    last: int = field(default=0, metadata={"range": "0 or more"})
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        limits = {"budget": (0, 2**31 - 1), "block": (1, 256), "sinks": (0, 1024), "recent": (0, 4096)}
        limits |= {"dense_below": (0, 2**31 - 1), "first": (0, 10**6), "last": (0, 10**6)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"{name.replace('_', '-')} is {value}, it must be from {low} to {high}.")
        if self.share is not None and not 0 < self.share <= 1:
            raise UsageError(f"share is {self.share}, it must be above 0 and at most 1.")

    def requires(self) -> Sequence[Pass]:
        """Attention and its cache must be one op."""
        return (CachedAttention(),)

    def match(self, program: Program) -> Match:
        """Find every layer that the selection can read."""
        sites, left = [], []
        attentions = cached_attention_sites(program.graph)
        for index, attention in enumerate(attentions):
            selection = self._selection(attention)
            reason = self._reason(attention, selection, index, len(attentions))
            if reason:
                left.append(LeftAlone(attention.name, reason))
            else:
                sites.append(Site(attention.name, (attention, selection)))
        return Match(sites, [*left, *other_attention(program, bool(attentions))])

    def apply(self, program: Program, sites: Sequence[Site]) -> PassReport:
        """Give every site its selection."""
        for site in sites:
            attention, selection = site.payload
            change_cache(attention, selection=selection)
        layers = [selection_figures(site) for site in cached_attention_sites(program.graph)]
        return PassReport([site.name for site in sites], details={"selection": layers})

    def _selection(self, site: CachedAttentionSite) -> TokenSelection:
        """The selection of a layer; a coded cache brings its sinks, recent tokens and pages."""
        sinks, recent, block = SINKS, RECENT, BLOCK
        if isinstance(site.storage, PageStorage):
            sinks, recent, block = site.storage.sinks, site.storage.recent, site.storage.page
        budget = self.budget if self.budget is not None else 0 if self.share is not None else BUDGET
        try:
            return PageSelection(
                sinks=sinks if self.sinks is None else self.sinks,
                recent=recent if self.recent is None else self.recent,
                block=block if self.block is None else self.block,
                budget=budget,
                share=self.share or 0.0,
                dense_below=self.dense_below,
            )
        except InputError as error:
            raise UsageError(f"sparse-attention: {error}.") from error

    def _reason(self, site: CachedAttentionSite, selection: TokenSelection, index: int, count: int) -> str:
        """Why a layer is left alone; empty when it is not."""
        if any(fnmatchcase(site.name, pattern) for pattern in self.skip):
            return "skipped by the option `skip`"
        if index < self.first or index >= count - self.last:
            return "skipped by the options `first` and `last`"
        if not isinstance(site.selection, AllTokens):
            return f"it has selection={site.selection.kind} already"
        if site.node.inputs[4] is not None:
            return "its mask is only known as numbers added to the scores, so what it hides cannot be told"
        return selection_reason(site.form, site.storage, selection)
