"""The `sparse-attention` pass: attention reads only the part of the cache that matters to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import onnx_ir as ir

from effc.errors import UsageError
from effc.ir.analysis.cached_attention import CachedAttentionSite, cached_attention_sites, selection_figures
from effc.ir.dialect.selections import AllTokens
from effc.ir.program import Program
from effc.ir.rewrite.dataflow import producer
from effc.passes.attention.cache_change import change_cache
from effc.passes.attention.cached_attention import CachedAttention
from effc.passes.attention.far_angles import FarAngles
from effc.passes.attention.prefix_inputs import prefix_inputs
from effc.passes.attention.raising import other_attention
from effc.passes.attention.selection_schemes import SCHEMES, Change, SelectionScheme
from effc.passes.attention.token_scores import token_scores
from effc.passes.base import Contract, LeftAlone, Match, Pass, PassReport, Site
from effc.passes.canonical.simplify import simplify_program

LIMITS = {
    "budget": (0, 2**31 - 1),
    "block": (1, 256),
    "sinks": (0, 1024),
    "recent": (0, 2**20),
    "pool": (1, 255),
    "stride": (1, 2**20),
    "longest": (1, 2**22),
    "dense_below": (0, 2**31 - 1),
    "refresh": (0, 2**20),
    "first": (0, 10**6),
    "last": (0, 10**6),
}
FILTERED = "its prompts are filtered by a second graph over the first layers, which is told no scores of tokens"
LAYERS = ("scheme", "first", "last", "skip")
"""Options that every scheme has."""


@dataclass(frozen=True)
class SparseAttention(Pass):
    """Read only a part of the cached tokens.

    `pages`: a step of one new token chooses the blocks of tokens that may get much attention, anew for every token.
    Nothing is dropped: every token stays in the cache, at its position, and may be read by a later step; prompts are
    read in full. `topk`: the same with single tokens; all keys are read, and the values of those that matter. `window`:
    every token reads the last ones and the first ones only, so that memory and time stay constant however long the text
    gets; what leaves the window is gone. `evict`: the cache has room for a constant number of tokens; when it is full,
    those that the last queries attend to stay and the others are gone; a prompt that is read in one step is read in
    full. `retain`: the same, but those stay that surprised the model most, and positions are places of the cache, so
    that a dialogue may go on for ever; a caller gives the surprise, as `effc chat` and `effc generate` do. `stride`:
    every token, of prompts too, reads a fixed pattern of blocks; it is meant for models that were trained with it.
    `clusters` and `lowrank` read less of a prefix that `effc prefix` made, and all that follows it.
    `docs/sparse-attention.md` has what each costs and saves.

    Before:

        y, present.0.key, present.0.value = effc.CachedAttention(…, past_key_values.0.key, past_key_values.0.value)
            {selection="all"}

    After (`sparse-attention{budget=1024}`):

        y, present.0.key, present.0.value, present.0.bounds = effc.CachedAttention(
            …, past_key_values.0.key, past_key_values.0.value, past_key_values.0.bounds)
            {selection="pages", select_block=8, select_budget=1024, …}

    After `kv-cache{scheme=int4}` the pages of the cache are the blocks, and their parameters the bounds: no tensor is
    added.

    Attributes:
        scheme: `pages`: blocks of tokens by the bounds of their channels (Quest), or by their mean key. `topk`:
            single tokens by the attention of all heads together (TokenSelect). `window`: the last tokens in a ring and
            the first ones (StreamingLLM, LM-Infinite). `clusters`: of a prefix made with `effc prefix`, the clusters of
            keys that matter to a query (Squeezed Attention). `evict`: those that the last queries attend to, the others
            dropped (SnapKV). `retain`: those that surprised the model most, the others dropped (SirLLM). `stride`: the
            last blocks and one in so many of those before (LongGen). `lowrank`: of a prefix made with `effc prefix` the
            chunks that matter to a query, their keys rebuilt from a product of two small matrices (ShadowKV).
        budget: `pages`: tokens in blocks that a step reads, `topk`: tokens that it reads the values of, at least; None:
            1024, and 0 with `share`. `lowrank`: tokens of a prefix that it reads, at least; None: 2048, and 0 with
            `share`. `evict`: tokens that stay when the cache is full, sinks and recent ones included;
            None: 2048. `retain`: tokens that the cache has room for; None: 2048.
        share: `pages`, `topk`, `lowrank`: share of the blocks, tokens or chunks that a step reads, at least.
        block: `pages`: tokens of a block of a dense cache; None: 8. A coded cache has its pages. `evict`: tokens
            beyond the budget that a full cache has and loses then; None: one in 16 of the budget, at most 256.
            `retain`: tokens that a full cache makes room for, at least; None: one in 64 of the budget, at most 256.
            `stride`: tokens of a block; None: 64. `lowrank`: tokens of a chunk, to 128; None: 8.
        sinks: Tokens at the start that every step reads; None: 4, or as the coded cache keeps them.
        recent: Tokens at the end that every step reads: with `pages` at least so many, None: 32, or as the coded cache
            keeps them; with `topk` exactly so many, None: 32; with `window` too, the new one included, None: 1024; with
            `clusters` those of a prefix whose queries set its thresholds, None: 100; with `evict` those whose queries
            choose what stays, None: 32; with `retain` those that stay whatever they are worth, None: one in 8 of the
            budget; with `stride` those of the near blocks, that of the new token included, None: 512.
        positions: `window`: how far the sinks are from a query that reads them beyond its window. `compact`: as if they
            came right before the window (StreamingLLM). `cap`: as far as the window is long (LM-Infinite). `keep`: as
            far as they are, which a model knows only up to the length it was trained on. None: `compact`.
        pool: `evict`: tokens over which the attention is averaged before the best ones are chosen, odd; None: 15.
        pyramid: `evict`: budgets that fall from layer to layer, `budget` on average (PyramidKV); None: all alike.
        stride: `stride`: of the blocks that are not near, one in so many is read; None: 16.
        middle: `stride`: whether the middle third of the layers reads the pattern, too; None: it reads everything.
        longest: `lowrank`: most tokens of a prefix; None: 32768. The engine has cosines and sines of so many positions.
        dense_below: `pages`, `topk`, `lowrank`: with fewer cached tokens than this, everything is read.
        reach: `pages`: what ranks a block, from 0, the score of the mean of its keys, or of the middle of its bounds in
            a coded cache, to 1, the largest score that bounds allow (Quest); None: 0.6.
        refresh: `topk`: most steps that one choice of tokens serves, over a dense cache; None: 1.
        similarity: `topk` with `refresh`: cosine of a query with the one that chose, from which on the choice serves
            it; None: 0.9.
        first: Layers at the start that are left alone; None: 2 with `pages` and `topk`, since attention is spread most
            widely there, else 0.
        last: Layers at the end that are left alone.
        skip: Glob patterns of layers to leave alone, joined by `|`, such as `*layer?3`.
    """

    name: ClassVar[str] = "sparse-attention"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    scheme: Literal["pages", "topk", "window", "clusters", "evict", "retain", "stride", "lowrank"] = "pages"
    budget: int | None = field(default=None, metadata={"range": "0 or more"})
    share: float | None = field(default=None, metadata={"range": "above 0, to 1"})
    block: int | None = field(default=None, metadata={"range": "1 to 256"})
    sinks: int | None = field(default=None, metadata={"range": "0 to 1024; window: 1 to 128"})
    recent: int | None = field(default=None, metadata={"range": "0 to 1048576"})
    positions: Literal["compact", "cap", "keep"] | None = None
    pool: int | None = field(default=None, metadata={"range": "1 to 255, odd"})
    pyramid: bool | None = None
    stride: int | None = field(default=None, metadata={"range": "1 to 1048576"})
    middle: bool | None = None
    longest: int | None = field(default=None, metadata={"range": "1 to 4194304"})
    dense_below: int | None = field(default=None, metadata={"range": "0 or more"})
    reach: float | None = field(default=None, metadata={"range": "0 to 1"})
    refresh: int | None = field(default=None, metadata={"range": "0 or more"})
    similarity: float | None = field(default=None, metadata={"range": "-1 to 1"})
    first: int | None = field(default=None, metadata={"range": "0 or more"})
    last: int = field(default=0, metadata={"range": "0 or more"})
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"{name.replace('_', '-')} is {value}, it must be from {low} to {high}.")
        if self.share is not None and not 0 < self.share <= 1:
            raise UsageError(f"share is {self.share}, it must be above 0 and at most 1.")
        if self.reach is not None and not 0 <= self.reach <= 1:
            raise UsageError(f"reach is {self.reach}, it must be from 0 to 1.")
        if self.similarity is not None and not -1 <= self.similarity <= 1:
            raise UsageError(f"similarity is {self.similarity}, it must be from -1 to 1.")
        self._scheme()

    def _scheme(self) -> SelectionScheme:
        """The scheme with the options that were given."""
        scheme = SCHEMES[self.scheme]
        known = {one.name for one in fields(scheme)}
        names = [one.name for one in fields(self) if one.name not in LAYERS]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        for name in given:
            if name not in known:
                raise UsageError(f"scheme={self.scheme} has no {name.replace('_', '-')}. Leave the option out.")
        return scheme(**given)

    def requires(self) -> Sequence[Pass]:
        """Attention and its cache must be one op, which rotates where it is to move sinks."""
        return (CachedAttention(rotary="inside" if self._scheme().rotates else "outside"),)

    def match(self, program: Program) -> Match:
        """Find every layer that the selection can read."""
        sites, left = [], []
        attentions = cached_attention_sites(program.graph)
        if self._scheme().whole and program.prompt_filter is not None:
            return Match((), [LeftAlone(one.name, FILTERED) for one in attentions])
        angles, scheme = FarAngles(program.graph), self._scheme()
        for index, attention in enumerate(attentions):
            layer = scheme.for_layer(index, len(attentions))
            change = None if layer is None else layer.change(attention)
            reason = self._skipped(attention, index, len(attentions)) or self._reason(attention, change, angles)
            if reason:
                left.append(LeftAlone(attention.name, reason))
            else:
                sites.append(Site(attention.name, (attention, change)))
        if scheme.whole:
            sites, left = _all_or_none(sites, left, {one.name for one in attentions if one.form.window})
        return Match(sites, [*left, *other_attention(program, bool(attentions))])

    def apply(self, program: Program, sites: Sequence[Site]) -> PassReport:
        """Give every site its selection."""
        angles = FarAngles(program.graph)
        for site in sites:
            attention, change = site.payload
            change_cache(
                attention,
                form=change.form,
                storage=change.storage,
                selection=change.selection,
                constants=_constants(attention, change, angles),
            )
        simplify_program(program)
        layers = [selection_figures(site) for site in cached_attention_sites(program.graph)]
        return PassReport([site.name for site in sites], details={"selection": layers})

    def _skipped(self, site: CachedAttentionSite, index: int, count: int) -> str:
        """Why the options leave a layer alone; empty when they do not."""
        if any(fnmatchcase(site.name, pattern) for pattern in self.skip):
            return "skipped by the option `skip`"
        first = SCHEMES[self.scheme].first if self.first is None else self.first
        return "skipped by the options `first` and `last`" if index < first or index >= count - self.last else ""

    def _reason(self, site: CachedAttentionSite, change: Change | None, angles: FarAngles) -> str:
        """Why a layer is left alone; empty when it is not."""
        if change is None:
            return "it is in the middle third of the layers, which read everything"
        if not isinstance(site.selection, AllTokens):
            return f"it has selection={site.selection.kind} already"
        if site.node.inputs[4] is not None:
            return "its mask is only known as numbers added to the scores, so what it hides cannot be told"
        if site.form.window:
            return f"its window of {site.form.window} tokens bounds what it reads"
        if self._scheme().rotates and producer(site.node.inputs[1], "RotaryEmbedding") is not None:
            return "its keys are rotated before they reach it; put cached-attention{rotary=inside} before"
        reason = change.selection.reason_against(change.form, change.storage)
        if reason or change.far is None:
            return reason
        return angles.reason_against(site, constant=bool(change.selection.prefix))


def _constants(site: CachedAttentionSite, change: Change, angles: FarAngles) -> Sequence[ir.Value]:
    """The inputs behind the cache."""
    tables = angles.at(site, change.far) if change.far is not None else []
    if change.selection.prefix:
        return [*tables, *prefix_inputs(site, change.form, change.selection)]
    valid = site.node.inputs[3]
    assert valid is not None and isinstance(site.node.graph, ir.Graph)
    return [*tables, token_scores(site.node.graph, valid)] if change.selection.reads_scores else tables


def _all_or_none(sites: list[Site], left: list[LeftAlone], windowed: set[str]) -> tuple[list[Site], list[LeftAlone]]:
    """Nothing is taken when a layer without a window of its own is left: its positions would be others."""
    missing = next((one for one in left if one.site not in windowed), None)
    if missing is None:
        return sites, left
    reason = f"{missing.site} cannot have it ({missing.reason}), and the layers must share one place for every token"
    return [], [*left, *(LeftAlone(site.name, reason) for site in sites)]
