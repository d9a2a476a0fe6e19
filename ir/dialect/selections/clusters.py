"""Selection `clusters`: clusters of the keys of a prefix, by their centroids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import onnx_ir as ir

from effc.ir.dialect.cache_storage import BATCH, DenseStorage, HeadSizes, StateTensor, Storage
from effc.ir.dialect.selections.base import TokenSelection, require

if TYPE_CHECKING:
    from effc.ir.dialect.cached_attention import AttentionForm

MOST_OBSERVED = 1 << 20
CLUSTERS, PARENTS = "clusters", "parents"
"""Axes of the inputs behind the cache; both are 0 without a prefix."""


@dataclass(frozen=True)
class ClusterSelection(TokenSelection):
    """Of a prefix that was clustered, the clusters whose keys may expect much of the softmax; the rest in full.

    Squeezed Attention (Hooper et al. 2024, arXiv 2411.09688): a step compares its query with centroids of two levels,
    the second only below what passes the first. Radii, by which keys lie around a centroid, are ours. The clusters are
    inputs that a prefix brings; without one they are empty, and everything is read.

    Attributes:
        observed: Tokens whose queries the cache keeps, the last ones: a prefix sets its thresholds by them.

    Raises:
        InputError: A value that the op does not have.
    """

    kind: ClassVar[str] = "clusters"
    prefix: ClassVar[Mapping[str, ir.DataType | None]] = {
        "centroids": None,
        "ends": ir.DataType.INT32,
        "radii": ir.DataType.FLOAT,
        "parents": None,
        "parent_ends": ir.DataType.INT32,
        "parent_radii": ir.DataType.FLOAT,
        "thresholds": ir.DataType.FLOAT,
    }
    observed: int = 100

    def __post_init__(self) -> None:
        text = f"recent is {self.observed}, it must be from 1 to {MOST_OBSERVED}"
        require(1 <= self.observed <= MOST_OBSERVED, text)

    @classmethod
    def read(cls, attributes: Mapping[str, ir.Attr]) -> Self:
        """From `select_recent`."""
        return cls(attributes["select_recent"].as_int())

    def attributes(self) -> dict[str, int | float | str]:
        """All of this selection."""
        return {"select_recent": self.observed}

    def tensors(self, storage: Storage, sizes: HeadSizes) -> tuple[StateTensor, ...]:
        """`queries`: those of the last tokens, as attention uses them."""
        shape = (BATCH, sizes.heads, self.observed, sizes.head_size)
        return (StateTensor("queries", ir.DataType.FLOAT, shape),)

    def constants(self, form: AttentionForm) -> dict[str, tuple[int | str, ...]]:
        """The clusters of a prefix, which are inputs of the graph."""
        heads, size = form.kv_heads, form.head_size
        return {
            "centroids": (1, heads, CLUSTERS, size),
            "ends": (1, heads, CLUSTERS),
            "radii": (1, heads, CLUSTERS),
            "parents": (1, heads, PARENTS, size),
            "parent_ends": (1, heads, PARENTS),
            "parent_radii": (1, heads, PARENTS),
            "thresholds": (2,),
        }

    def reason_against(self, form: AttentionForm, storage: Storage) -> str:
        """No window; tokens as they are, which can be put in another order."""
        if form.window:
            return f"its window of {form.window} tokens bounds what it reads"
        if not isinstance(storage, DenseStorage):
            return f"its cache has storage={storage.kind}; clusters reorder the tokens of a dense one"
        return ""

    def read_at(self, tokens: int) -> int:
        """All: what a prefix leaves out depends on its thresholds."""
        return tokens
