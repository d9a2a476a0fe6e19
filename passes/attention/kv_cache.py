"""The `kv-cache` pass: keeps the cache of attention in fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal

from effc.errors import InputError, UsageError
from effc.ir.analysis.cached_attention import CachedAttentionSite, cache_figures, cached_attention_sites
from effc.ir.dialect.cache_storage import BITS, LANE_BLOCK, DenseStorage, StaticStorage, Storage
from effc.ir.dialect.selections import AllTokens
from effc.ir.program import Program
from effc.passes.attention.cache_change import cache_prefix, change_cache
from effc.passes.attention.cache_schemes import DTYPES, SCHEMES, Scheme
from effc.passes.attention.cached_attention import CachedAttention
from effc.passes.attention.raising import other_attention
from effc.passes.attention.static_scales import Scales, measured_scales, read_scales, scale_tensors
from effc.passes.base import Contract, LeftAlone, Match, Pass, PassReport, Site

STATIC_BITS = {"int8": 8, "int4": 4}
"""Schemes with a native form."""


@dataclass(frozen=True)
class KvCache(Pass):
    """Keep keys and values of past tokens in 8, 4 or 2 bits.

    The first tokens and the last ones stay as they are. Those between lie in pages: keys quantized by channel, values
    by token. A page is written once, when it is full, and never again. `docs/cached-attention.md` has every byte.

    Before:

        y, present.0.key, present.0.value = effc.CachedAttention(…, past_key_values.0.key, past_key_values.0.value)
            {storage="dense"}

    After (`kv-cache{scheme=int4}`):

        y, present.0.exact_key, present.0.exact_value, present.0.pages = effc.CachedAttention(
            …, past_key_values.0.exact_key, past_key_values.0.exact_value, past_key_values.0.pages)
            {storage="pages", page=128, key_bits=[4, 4], …}

    Attributes:
        scheme: `int8`, `int4`: one precision. `kivi`: 4 or 2 bits with parameters for every 32 elements. `zipcache`:
            tokens that get much attention in more bits than the others. `mikv`: the same by accumulated attention,
            keys balanced against queries. `dense`: no pages, only the element type `dtype`.
        bits: Bits of the (first) class of tokens; None: as the scheme has them (8; 4; kivi 4; zipcache 4; mikv 8).
        low_bits: Bits of the other tokens; None: zipcache 2, mikv 4.
        ratio: Share of the tokens in the first class, rounded to a multiple of 16 tokens of a page; None: zipcache 0.6,
            mikv 0.4.
        importance: How zipcache and mikv tell important tokens; None: as the scheme does. `causal-count` is the
            normaliser of ZipCache's reference code.
        dtype: Element type of tokens that are kept as they are.
        sinks: Tokens kept as they are at the start; None: 4, kivi 0.
        recent: Tokens kept as they are at the end, at least; None: 32, kivi 64.
        page: Tokens of a page; None: 128, kivi 64, zipcache and mikv 160.
        window_layers: `ring`: layers with a window keep it whole, in `dtype`. `quantize`: they get pages too.
        first: Layers at the start that are left alone.
        last: Layers at the end that are left alone.
        native: `int8` and `int4` only: fixed scales for each channel, for targets whose own attention has such caches
            (onnxruntime's GroupQueryAttention). Every token is quantized, with the scales of calibration data
            (`--calibrate`). Layers with a window keep every token.
        scales: `.npz` file with scales of your own for `native`: `key.N` and `value.N`, [kv heads, head size].
        skip: Glob patterns of layers to leave alone, joined by `|`, such as `*layer?3`.
    """

    name: ClassVar[str] = "kv-cache"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    scheme: Literal["int8", "int4", "kivi", "zipcache", "mikv", "dense"] = "int8"
    bits: int | None = field(default=None, metadata={"range": "2, 4, 8 or 16"})
    low_bits: int | None = field(default=None, metadata={"range": "2, 4, 8 or 16"})
    ratio: float | None = field(default=None, metadata={"range": "above 0, to 1"})
    importance: Literal["normalised", "causal-count", "accumulated"] | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    sinks: int | None = field(default=None, metadata={"range": "0 to 1024"})
    recent: int | None = field(default=None, metadata={"range": "0 to 4096"})
    page: int | None = field(default=None, metadata={"range": "a multiple of 16 from 16 to 256"})
    window_layers: Literal["ring", "quantize"] = "ring"
    first: int = field(default=0, metadata={"range": "0 or more"})
    last: int = field(default=0, metadata={"range": "0 or more"})
    native: bool = False
    scales: str | None = None
    skip: tuple[str, ...] = ()

    @property
    def uses_calibration(self) -> bool:  # type: ignore[override]
        """Static scales are measured, where they are not given."""
        return self.native and self.scales is None

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_scheme()
        if self.scheme != "dense":
            try:
                self._parameters().storage(DTYPES[self.dtype], 0)
            except InputError as error:
                raise UsageError(f"kv-cache: {error}.") from error

    def requires(self) -> Sequence[Pass]:
        """Attention and its cache must be one op."""
        return (CachedAttention(ring="off" if self.native else "auto"),)

    def match(self, program: Program) -> Match:
        """Find every layer whose cache the scheme takes."""
        sites, left = [], []
        attentions = cached_attention_sites(program.graph)
        for index, attention in enumerate(attentions):
            reason = self._reason(attention, index, len(attentions))
            if reason:
                left.append(LeftAlone(attention.name, reason))
            else:
                sites.append(Site(attention.name, (attention, self._storage(attention))))
        return Match(sites, [*left, *other_attention(program, bool(attentions))])

    def apply(self, program: Program, sites: Sequence[Site]) -> PassReport:
        """Give every site its storage."""
        scales = self._scales(program, [site.payload[0] for site in sites]) if self.native else [None] * len(sites)
        for site, constants in zip(sites, scales, strict=True):
            attention, storage = site.payload
            prefix = cache_prefix(attention.past[0])
            tensors = scale_tensors(program.graph, prefix, constants) if constants is not None else []
            change_cache(attention, storage=storage, constants=tensors)
        layers = [cache_figures(site) for site in cached_attention_sites(program.graph)]
        return PassReport([site.name for site in sites], details={"cache": layers})

    def _scales(self, program: Program, sites: Sequence[CachedAttentionSite]) -> Sequence[Scales]:
        if self.scales is None:
            return measured_scales(program, sites, STATIC_BITS[self.scheme])
        every = cached_attention_sites(program.graph)
        given = dict(zip([site.node for site in every], read_scales(Path(self.scales), every), strict=True))
        return [given[site.node] for site in sites]

    def _check_numbers(self) -> None:
        limits = {"sinks": (0, 1024), "recent": (0, 4096), "first": (0, 10**6), "last": (0, 10**6)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"{name} is {value}, it must be from {low} to {high}.")
        for name in ("bits", "low_bits"):
            value = getattr(self, name)
            if value is not None and value not in BITS:
                raise UsageError(f"{name.replace('_', '-')} is {value}, it must be 2, 4, 8 or 16.")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise UsageError(f"ratio is {self.ratio}, it must be above 0 and at most 1.")

    def _check_scheme(self) -> None:
        """Refuse options the scheme would ignore."""
        ignored = {"low_bits", "ratio", "importance"} if self.scheme not in ("zipcache", "mikv") else set()
        if self.scheme in ("int8", "int4", "dense"):
            ignored.add("bits")
        if self.scheme == "dense":
            ignored |= {"sinks", "recent", "page"}
        if self.native:
            if self.scheme not in STATIC_BITS:
                raise UsageError(f"scheme={self.scheme} is never native. Take int8 or int4, or leave `native` out.")
            ignored |= {"sinks", "recent", "page"}
        elif self.scales is not None:
            raise UsageError("scales are for `native=true`; other caches make their own as they go.")
        given = sorted(name for name in ignored if getattr(self, name) is not None)
        if given:
            raise UsageError(f"scheme={self.scheme} has no {given[0].replace('_', '-')}. Leave the option out.")
        if self.scheme == "kivi" and self.bits not in (None, 2, 4):
            raise UsageError(f"bits is {self.bits}, scheme=kivi has 2 or 4.")

    def _parameters(self) -> Scheme:
        """The scheme with the options that were given."""
        options: dict[str, Any] = {
            "high": self.bits,
            "low": self.low_bits if self.scheme in ("zipcache", "mikv") else self.bits,
            "ratio": self.ratio,
            "importance": self.importance,
            "sinks": self.sinks,
            "recent": self.recent,
            "page": self.page,
        }
        return replace(SCHEMES[self.scheme], **{name: value for name, value in options.items() if value is not None})

    def _storage(self, site: CachedAttentionSite) -> Storage:
        if self.native:
            return StaticStorage(STATIC_BITS[self.scheme])
        dtype, window = DTYPES[self.dtype], site.form.window
        keeps_window = bool(window) and self.window_layers == "ring"
        if self.scheme == "dense" or keeps_window:
            assert isinstance(site.storage, DenseStorage)
            return DenseStorage(dtype, site.storage.ring)
        return self._parameters().storage(dtype, window)

    def _reason(self, site: CachedAttentionSite, index: int, count: int) -> str:
        """Why a layer is left alone; empty when it is not."""
        if any(fnmatchcase(site.name, pattern) for pattern in self.skip):
            return "skipped by the option `skip`"
        if index < self.first or index >= count - self.last:
            return "skipped by the options `first` and `last`"
        if not isinstance(site.storage, DenseStorage):
            return f"its cache has storage={site.storage.kind} already"
        if not isinstance(site.selection, AllTokens):
            return "its tokens are selected already; put kv-cache before sparse-attention"
        storage = self._storage(site)
        if storage == site.storage:
            window = f"; its window of {site.form.window} tokens bounds it" if site.form.window else ""
            return f"its cache is {self.dtype} already{window}"
        if isinstance(storage, DenseStorage):
            return ""
        if site.node.inputs[4] is not None:
            return "its mask is only known as numbers added to the scores, so padding cannot be told from tokens"
        sizes = (site.form.head_size, site.form.value_size)
        if self.native:
            return _reason_against_static(site)
        if any(size % LANE_BLOCK for size in sizes):
            return f"its heads have {sizes[0]} and {sizes[1]} elements, pages take multiples of {LANE_BLOCK}"
        return ""


def _reason_against_static(site: CachedAttentionSite) -> str:
    """Why a layer cannot have static scales; empty when it can."""
    form = site.form
    if form.head_size != form.value_size or form.head_size % 2:
        return f"its heads have {form.head_size} and {form.value_size} elements, static scales take one even number"
    if form.rotary != "none":
        return "it rotates its keys itself; leave rotary=inside out of cached-attention"
    if isinstance(site.storage, DenseStorage) and site.storage.ring:
        return "its cache is a ring; run cached-attention{ring=off} before"
    return ""
