"""Selection `window`: the last tokens and the first ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from effc.ir.dialect.cache_storage import BATCH, DenseStorage, HeadSizes, StateTensor, Storage
from effc.ir.dialect.selections.base import TokenSelection, require, require_between

if TYPE_CHECKING:
    from effc.ir.dialect.cached_attention import AttentionForm

MOST_SINKS = 128
POSITIONS = ("keep", "compact", "cap")


@dataclass(frozen=True)
class WindowSelection(TokenSelection):
    """The window of the attention and, beyond it, the first tokens.

    StreamingLLM (Xiao et al. 2023, arXiv 2309.17453) keeps the first tokens and renumbers all that is kept; LM-Infinite
    (Han et al. 2023, arXiv 2308.16137, section 4) reads them at a bounded distance.

    Attributes:
        sinks: Tokens at the start that are read beyond the window.
        positions: Their distance from a query that reads them so: `keep`: what it is; `compact`: as if they came right
            before the window; `cap`: the length of the window for all of them.

    Raises:
        InputError: A value that the op does not have.
    """

    kind: ClassVar[str] = "window"
    sinks: int = 4
    positions: str = "compact"

    def __post_init__(self) -> None:
        require_between(self, ("sinks",), 1, MOST_SINKS)
        text = ", ".join(POSITIONS)
        require(self.positions in POSITIONS, f"positions is {self.positions!r}, it must be one of {text}")

    def tensors(self, storage: Storage, sizes: HeadSizes) -> tuple[StateTensor, ...]:
        """`sink_key` and `sink_value`."""
        assert isinstance(storage, DenseStorage)
        return tuple(
            StateTensor(name, storage.dtype, (BATCH, sizes.kv_heads, self.sinks, size))
            for name, size in (("sink_key", sizes.head_size), ("sink_value", sizes.value_size))
        )

    def constants(self, form: AttentionForm) -> dict[str, tuple[int | str, ...]]:
        """Cosines and sines of the position of queries that meet sinks that move."""
        if self.positions == "keep":
            return {}
        return dict.fromkeys(("far cos", "far sin"), ("batch", 1, form.rotary_size // 2))

    def reason_against(self, form: AttentionForm, storage: Storage) -> str:
        """A causal window in a ring, rotated by the op where sinks move."""
        if not isinstance(storage, DenseStorage):
            return f"its cache has storage={storage.kind}, which keeps every token; sinks and window are a dense ring"
        if not form.causal:
            return "it is not causal"
        if self.positions != "keep" and form.rotary == "none":
            return (
                "it does not rotate its keys itself, so its sinks cannot move; put cached-attention{rotary=inside} "
                "before, or take positions=keep"
            )
        return "" if storage.ring else "its cache is no ring"

    def read_at(self, tokens: int) -> int:
        """The sinks at most, besides what the window bounds."""
        return min(tokens, self.sinks)

    def far_position(self, window: int) -> int | None:
        """Position of queries as they meet the sinks, and that of sinks is theirs or, capped, 0; None: their own."""
        return {"keep": None, "compact": self.sinks + window - 1, "cap": window}[self.positions]
