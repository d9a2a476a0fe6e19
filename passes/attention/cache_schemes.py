"""The schemes of the `kv-cache` pass as storages of `CachedAttention`: each is a choice of parameters of one design."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from effc.ir.dialect.cache_storage import LANE_BLOCK, DenseStorage, PageStorage, Storage

DTYPES = {
    "bfloat16": ir.DataType.BFLOAT16,
    "float16": ir.DataType.FLOAT16,
    "float32": ir.DataType.FLOAT,
}


@dataclass(frozen=True)
class Scheme:
    """What a scheme fixes; an option of the pass replaces a value where it is given.

    Attributes:
        key_scheme: See `PageStorage`.
        value_scheme: See `PageStorage`.
        high: Bits of the first class.
        low: Bits of the second class.
        group: Tokens of a key channel, and channels of a value, that share parameters; 0: all.
        ratio: Share of the tokens of a page in the first class.
        importance: Which tokens those are; `none` with one class.
        sinks: Exact tokens at the start.
        recent: Exact tokens at the end.
        page: Tokens of a page.
    """

    key_scheme: str = "channel"
    value_scheme: str = "token"
    high: int = 8
    low: int = 8
    group: int = 0
    ratio: float = 1.0
    importance: str = "none"
    sinks: int = 4
    recent: int = 32
    page: int = 128

    def storage(self, dtype: ir.DataType, window: int) -> Storage:
        """The storage; a dense one of bfloat16 where every token would be kept in 16 bits."""
        salient = min(self.page, max(LANE_BLOCK, round(self.ratio * self.page / LANE_BLOCK) * LANE_BLOCK))
        if self.high == 16 and (self.low == 16 or salient == self.page):
            return DenseStorage(ir.DataType.BFLOAT16, window)
        return PageStorage(
            dtype=dtype,
            sinks=self.sinks,
            recent=self.recent,
            page=self.page,
            key_scheme=self.key_scheme,
            value_scheme=self.value_scheme,
            key_bits=(self.high, self.low),
            value_bits=(self.high, self.low),
            key_group=self.group if self.key_scheme == "channel" else 0,
            value_group=self.group if self.value_scheme == "token" else 0,
            salient=salient,
            importance=self.importance if salient < self.page else "none",
            window=window,
        )


SCHEMES = {
    "int8": Scheme(),
    "int4": Scheme(high=4, low=4),
    "kivi": Scheme(high=4, low=4, group=32, sinks=0, recent=64, page=64),
    "zipcache": Scheme(value_scheme="separable", high=4, low=2, ratio=0.6, importance="normalised", page=160),
    "mikv": Scheme(key_scheme="balanced", high=8, low=4, ratio=0.4, importance="accumulated", page=160),
}
"""Scheme name -> what it is.

`int8`, `int4`: asymmetric, keys by channel and page, values by token. `kivi`: groups of 32 (Liu et al. 2024, arXiv
2402.02750). `zipcache`: two precisions by normalised attention, channel-separable values (He et al. 2024, arXiv
2405.14256). `mikv`: what would be evicted stays in few bits, keys balanced against queries (Yang et al. 2024, arXiv
2402.18096).
"""
