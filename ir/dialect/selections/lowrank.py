"""Selection `lowrank`: chunks of a prefix whose keys are a product of two small matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from effc.ir.dialect.cache_storage import DenseStorage, HeadSizes, StateTensor, Storage
from effc.ir.dialect.selections.base import TokenSelection, require_between

if TYPE_CHECKING:
    from effc.ir.dialect.cached_attention import AttentionForm

PREFIX, RANK, CHUNKS, OUTLIERS, ANGLES = "prefix", "rank", "chunks", "outliers", "angles"
"""Axes of the inputs behind the cache; all but the last are 0 without a prefix."""
MOST_BLOCK = 128


@dataclass(frozen=True)
class LowRankSelection(TokenSelection):
    """Of a prefix the chunks whose landmarks promise most, their keys rebuilt from a product; the rest in full.

    ShadowKV (Sun et al. 2024, arXiv 2410.21465). Keys of a prefix before they are rotated lie near a space of few
    dimensions, so they are kept as coefficients in it; landmarks are means of the rotated keys of a chunk; chunks of
    keys that differ much from their mean are outliers, which keep their keys and are always read. All of it, and the
    values, are inputs that a prefix brings; without one they are empty, and everything is read.

    Attributes:
        block: Tokens of a chunk.
        budget: Tokens in chunks that a step reads of a prefix, at least, besides outliers.
        share: Share of the chunks that a step reads, at least; float32.
        dense_below: With fewer cached tokens than this, everything is read.

    Raises:
        InputError: A value that the op does not have.
    """

    kind: ClassVar[str] = "lowrank"
    prefix: ClassVar[Mapping[str, ir.DataType | None]] = {
        "tokens": None,
        "basis": None,
        "values": None,
        "landmarks": None,
        "outliers": ir.DataType.INT32,
        "outlier_keys": None,
    }
    block: int = 8
    budget: int = 0
    share: float = 0.0
    dense_below: int = 0

    def __post_init__(self) -> None:
        require_between(self, ("block",), 1, MOST_BLOCK)
        require_between(self, ("budget", "dense_below"), 0)
        require_between(self, ("share",), 0, 1)

    def tensors(self, storage: Storage, sizes: HeadSizes) -> tuple[StateTensor, ...]:
        """None: the prefix does not change."""
        return ()

    def constants(self, form: AttentionForm) -> dict[str, tuple[int | str, ...]]:
        """Cosines and sines of positions, where keys are rotated, and what a prefix brings."""
        heads, size = form.kv_heads, form.head_size
        angles = (1, ANGLES, form.rotary_size // 2)
        return {
            **({"far cos": angles, "far sin": angles} if form.rotary != "none" else {}),
            "tokens": (1, PREFIX, RANK),
            "basis": (1, heads, size, RANK),
            "values": (1, heads, PREFIX, form.value_size),
            "landmarks": (1, heads, CHUNKS, size),
            "outliers": (1, heads, OUTLIERS),
            "outlier_keys": (1, heads, OUTLIERS, self.block, size),
        }

    def reason_against(self, form: AttentionForm, storage: Storage) -> str:
        """No window; a dense cache."""
        if form.window:
            return f"its window of {form.window} tokens bounds what it reads"
        if form.scale < 0:
            return "its scale is negative"
        if not isinstance(storage, DenseStorage):
            return f"its cache has storage={storage.kind}; the keys of a prefix of low rank lie before a dense one"
        return "its cache is a ring" if storage.ring else ""

    def read_at(self, tokens: int) -> int:
        """Of a prefix that has all of them, without outliers."""
        chunks = tokens // self.block
        wanted = max(1, self.budget // self.block, math.ceil(float(np.float32(self.share)) * chunks))
        unread = 0 if tokens < self.dense_below else max(0, chunks - wanted)
        return tokens - unread * self.block
