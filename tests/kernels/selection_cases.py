"""The table of every selection: with what it is tested, what it must read, and what it cannot have.

`test_selection_invariants.py` runs the invariants over it, and fails when a selection has no case here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import ClassVar

from given_prefixes import (
    CLUSTERED,
    LOW_RANK,
    clusters_above,
    clusters_at_the_threshold,
    low_rank,
    low_rank_alike,
    outlier_chunks,
    own_tokens,
)
from lowrank_oracle import BLOCK
from selected_cache import PAGED
from selection_case import FULL, PROMPT, Case, Refusal, Setup, singles

from effc.ir.dialect.selections import (
    AllTokens,
    ClusterSelection,
    EvictSelection,
    LowRankSelection,
    PageSelection,
    RetainSelection,
    StrideSelection,
    TopKSelection,
    WindowSelection,
)

PAGES_HAVE = "has the selections 'all', 'pages' and 'topk'"
CODED = ("int8", "int4", "mixed")
WINDOW = Refusal("its window of 40 tokens bounds what it reads", "takes no window")
NOT_CAUSAL = Refusal("it is not causal", "needs causal attention")
NEGATIVE = Refusal("its scale is negative", "takes no negative scale")
NO_RING = Refusal("its cache is a ring", "a ring must hold the window")
ORT_READS = Refusal("its cache has storage=static, which onnxruntime's own attention reads", "must be one of 'dense'")
BIAS = Refusal("it has a bias", "takes no bias")


class EveryToken(Case):
    """`all`."""

    refused = {
        "static": Refusal("", "must be one of 'dense'"),  # onnxruntime's own attention reads it
        "another ring": Refusal("", "a ring must hold the window"),
    }

    def full(self, storage: str) -> list[Setup]:
        return [self.small(storage)]

    def small(self, storage: str) -> Setup:
        return Setup(AllTokens())

    def forced(self, setup: Setup, steps: Sequence[int], head: int) -> Iterable[int]:
        return range(sum(steps))


def page_selection(storage: str, **options: float) -> PageSelection:
    """With the tokens that a coded cache keeps as they are."""
    block = PAGED[storage].page if storage in PAGED else 16
    return replace(PageSelection(sinks=4, recent=12, block=block), **options)


def topk_selection(**options: float) -> TopKSelection:
    """With the tokens that a coded cache keeps as they are."""
    return replace(TopKSelection(sinks=4, recent=12), **options)


class Blocks(Case):
    """`pages`: of equal blocks, the earlier."""

    per_key_head = True
    refused = {
        "static": ORT_READS,
        "a window": WINDOW,
        "a negative scale": NEGATIVE,
        "another ring": NO_RING,
        "a bias": BIAS,
    }

    def full(self, storage: str) -> list[Setup]:
        options = ({"budget": FULL}, {"share": 1.0}, {"budget": 16, "dense_below": FULL})
        return [Setup(page_selection(storage, **one)) for one in options]

    def small(self, storage: str) -> Setup:
        return Setup(page_selection(storage, budget=64))

    def forced(self, setup: Setup, steps: Sequence[int], head: int) -> Iterable[int]:
        total, block = sum(steps), self.block(setup)
        blocks = (total - 1 - 16) // block
        return [*range(4), *range(4 + blocks * block, total)]

    def count(self, setup: Setup, steps: Sequence[int], head: int) -> int:
        return len([*self.forced(setup, steps, head)]) + self.chosen(setup)

    def chosen_of_alike(self, setup: Setup, steps: Sequence[int], head: int) -> Iterable[int]:
        return [*self.forced(setup, steps, head), *range(4, 4 + self.chosen(setup))]

    def block(self, setup: Setup) -> int:
        """Tokens of a block."""
        assert isinstance(setup.selection, PageSelection)
        return setup.selection.block

    def chosen(self, setup: Setup) -> int:
        """Tokens in the blocks that are read."""
        return 64


class Tokens(Blocks):
    """`topk`: all heads read the same tokens; of equal ones, the earlier."""

    per_key_head = False

    def full(self, storage: str) -> list[Setup]:
        options = ({"budget": FULL}, {"share": 1.0}, {"budget": 16, "dense_below": FULL})
        return [Setup(topk_selection(**one)) for one in options]

    def small(self, storage: str) -> Setup:
        return Setup(topk_selection(budget=24))

    def block(self, setup: Setup) -> int:
        return 1

    def chosen(self, setup: Setup) -> int:
        return 24


class TokensAgain(Tokens):
    """`topk` whose choice serves four steps: those read also what has come since."""

    refused = Tokens.refused | dict.fromkeys(
        CODED,
        Refusal(
            "its cache is coded, whose keys are read by whole pages, so a choice of tokens cannot serve again",
            "select_refresh must be 0",
        ),
    )

    def small(self, storage: str) -> Setup:
        return Setup(topk_selection(budget=24, refresh=4, similarity=-1.0))

    def full(self, storage: str) -> list[Setup]:
        return [Setup(topk_selection(budget=FULL, refresh=4, similarity=-1.0))]

    def forced(self, setup: Setup, steps: Sequence[int], head: int) -> Iterable[int]:
        since = singles(steps) % 4
        return [*range(4), *range(sum(steps) - since - 13, sum(steps))]


class Window(Case):
    """`window`: no choice. What is not in the window is read only if it is a sink."""

    sinks: ClassVar[int] = 5
    row_tolerance = 1e-6
    dense: ClassVar[Refusal] = Refusal("which keeps every token; sinks and window are a dense ring", PAGES_HAVE)
    refused = {
        **dict.fromkeys((*CODED, "static"), dense),
        "not causal": NOT_CAUSAL,
        "another ring": Refusal("its cache is no ring", "needs a ring"),
        "a bias": BIAS,
    }

    def __init__(self, positions: str) -> None:
        self.positions = positions

    @property
    def rotates(self) -> bool:  # type: ignore[override]
        return self.positions != "keep"

    def full(self, storage: str) -> list[Setup]:
        return [Setup(WindowSelection(self.sinks, self.positions), FULL, exact=False)]

    def small(self, storage: str) -> Setup:
        return Setup(WindowSelection(self.sinks, self.positions), 24)

    def forced(self, setup: Setup, steps: Sequence[int], head: int) -> Iterable[int]:
        total = sum(steps)
        near = max(0, total - setup.window)
        return [*range(min(self.sinks, near)), *range(near, total)]


class MovedWindow(Window):
    """`window` whose sinks come near."""

    refused = Window.refused | {"no rotation": Refusal("so its sinks cannot move", "moved by rotation only")}


class ClusteredPrefix(Case):
    """`clusters` of a prefix: those whose share is above the threshold, not at it."""

    per_key_head = True
    pads = False
    refused = {
        **dict.fromkeys(
            (*CODED, "static"),
            Refusal("clusters reorder the tokens of a dense one", PAGES_HAVE),
        ),
        "a window": WINDOW,
        "another ring": Refusal("", "a ring must hold the window"),
        "a bias": BIAS,
    }

    def full(self, storage: str) -> list[Setup]:
        return [
            Setup(ClusterSelection(20), prepare=clusters_above(-1, -1), exact=False),
            Setup(ClusterSelection(20)),  # no prefix
        ]

    def small(self, storage: str) -> Setup:
        return Setup(ClusterSelection(20), prepare=clusters_above(0.005, 0.006))

    def tied(self, storage: str) -> Setup:
        """Clusters of 128 keys that share alike; each is exactly at the threshold."""
        return Setup(ClusterSelection(20), prepare=clusters_at_the_threshold)

    def forced(self, setup: Setup, steps: Sequence[int], head: int) -> Iterable[int]:
        return range(CLUSTERED, sum(steps))

    def count(self, setup: Setup, steps: Sequence[int], head: int) -> None:
        return None

    def chosen_of_alike(self, setup: Setup, steps: Sequence[int], head: int) -> Iterable[int]:
        return range(128, sum(steps))


class LowRankPrefix(Case):
    """`lowrank` of a prefix, of which outliers are always read; of equal chunks, the earlier."""

    budget: ClassVar[int] = 6 * BLOCK
    per_key_head = True
    pads = False
    refused = {
        **dict.fromkeys(
            (*CODED, "static"),
            Refusal(
                "the keys of a prefix of low rank lie before a dense one",
                PAGES_HAVE,
            ),
        ),
        "a window": WINDOW,
        "a negative scale": NEGATIVE,
        "another ring": NO_RING,
        "a bias": BIAS,
    }

    def full(self, storage: str) -> list[Setup]:
        options = ({"budget": FULL}, {"share": 1.0}, {"dense_below": FULL})
        without = Setup(LowRankSelection())
        return [without, *(Setup(LowRankSelection(**one), prepare=own_tokens, exact=False) for one in options)]

    def small(self, storage: str) -> Setup:
        return Setup(LowRankSelection(budget=self.budget), prepare=low_rank)

    def tied(self, storage: str) -> Setup:
        """Landmarks that are alike."""
        return Setup(LowRankSelection(budget=self.budget), prepare=low_rank_alike)

    def forced(self, setup: Setup, steps: Sequence[int], head: int) -> Iterable[int]:
        outliers = [range(BLOCK * chunk, BLOCK * (chunk + 1)) for chunk in outlier_chunks(head)]
        return [*chain(*outliers), *range(LOW_RANK, sum(steps))]

    def count(self, setup: Setup, steps: Sequence[int], head: int) -> int:
        return len([*self.forced(setup, steps, head)]) + self.budget

    def chosen_of_alike(self, setup: Setup, steps: Sequence[int], head: int) -> Iterable[int]:
        forced = set(self.forced(setup, steps, head))
        return forced | set([token for token in range(LOW_RANK) if token not in forced][: self.budget])


class Evicted(Case):
    """`evict`: key heads keep as many tokens, not the same ones; of equal votes, the earlier token."""

    per_key_head = True
    refused = {
        **dict.fromkeys(
            (*CODED, "static"),
            Refusal(
                "which keeps every token; evict keeps some in a dense cache",
                PAGES_HAVE,
            ),
        ),
        "a window": WINDOW,
        "not causal": NOT_CAUSAL,
        "a negative scale": NEGATIVE,
        "another ring": Refusal(
            "its cache has a ring of 0 places, it must have budget + block = 30",
            "needs a ring of select_budget + select_block places, which is 30; it is 0",
        ),
        "a bias": BIAS,
    }

    def full(self, storage: str) -> list[Setup]:
        return [Setup(EvictSelection(budget=FULL, sinks=2, recent=6, block=6, pool=5))]

    def small(self, storage: str) -> Setup:
        return Setup(EvictSelection(budget=24, sinks=2, recent=6, block=6, pool=5))

    def tied(self, storage: str) -> Setup:
        """Without a pool, beyond whose ends there are no votes."""
        return Setup(EvictSelection(budget=24, sinks=2, recent=6, block=6, pool=1))

    def cuts(self, setup: Setup) -> list[tuple[list[int], list[int]]]:
        """Only the last part overflows; the ends of others would choose other tokens."""
        return [([PROMPT], [9]), ([13, 17, PROMPT - 30], [4, 5])]

    def forced(self, setup: Setup, steps: Sequence[int], head: int) -> Iterable[int]:
        total = sum(steps)
        return [*range(2), *range(total - 7, total)]

    def count(self, setup: Setup, steps: Sequence[int], head: int) -> int:
        """A cache that overflows keeps its budget, then grows by its block."""
        return 24 + singles(steps) % 7 + 1

    def chosen_of_alike(self, setup: Setup, steps: Sequence[int], head: int) -> Iterable[int]:
        since = singles(steps) % 7
        return [*range(18), *range(sum(steps) - since - 7, sum(steps))]


class Retained(Case):
    """`retain`: all heads keep the same tokens; of equal scores, the newer token, unlike all others."""

    rotates = True
    refused = {
        **dict.fromkeys(
            (*CODED, "static"),
            Refusal(
                "which keeps every token; retain keeps some in a dense cache",
                PAGES_HAVE,
            ),
        ),
        "a window": WINDOW,
        "not causal": NOT_CAUSAL,
        "no rotation": Refusal("so they cannot be turned to their places", "give rotary"),
        "another ring": Refusal(
            "its cache has a ring of 0 places, it must have budget = 40",
            "needs a ring of select_budget places, which is 40; it is 0",
        ),
        "a bias": BIAS,
    }

    def full(self, storage: str) -> list[Setup]:
        return [Setup(RetainSelection(budget=FULL, sinks=2, recent=6, block=4), exact=False)]

    def small(self, storage: str) -> Setup:
        return Setup(RetainSelection(budget=40, sinks=2, recent=6, block=4))

    def prompt(self, setup: Setup) -> list[int]:
        """No step brings more than there can be room for."""
        longest = setup.selection.longest_step
        assert longest is not None
        return [PROMPT] if longest >= PROMPT else [25] * (PROMPT // 25)

    def cuts(self, setup: Setup) -> list[tuple[list[int], list[int]]]:
        """None overflows: what stays depends on how many come at once."""
        return [([30], [6]), ([10, 2, 18], [2, 4])]

    def forced(self, setup: Setup, steps: Sequence[int], head: int) -> Iterable[int]:
        total = sum(steps)
        return [*range(2), *range(total - 7, total)]

    def count(self, setup: Setup, steps: Sequence[int], head: int) -> int:
        """A cache without room makes some for four tokens, or for those that come."""
        places = 0
        for step in steps:
            places = (places if places + step <= 40 else 40 - max(step, 4)) + step
        return places

    def chosen_of_alike(self, setup: Setup, steps: Sequence[int], head: int) -> Iterable[int]:
        total = sum(steps)
        return [*range(2), *range(total - self.count(setup, steps, head) + 2, total)]


class Stride(Case):
    """`stride`: a pattern, which is another one for every key head."""

    per_key_head = True
    refused = {
        **dict.fromkeys((*CODED, "static"), Refusal("stride reads a dense one", PAGES_HAVE)),
        "a window": WINDOW,
        "not causal": NOT_CAUSAL,
        "another ring": NO_RING,
        "a bias": BIAS,
    }

    def full(self, storage: str) -> list[Setup]:
        small = StrideSelection(sinks=3, recent=24, block=8, stride=3)
        return [Setup(replace(small, **one)) for one in ({"stride": 1}, {"recent": FULL}, {"sinks": FULL})]

    def small(self, storage: str) -> Setup:
        return Setup(StrideSelection(sinks=3, recent=24, block=8, stride=3))

    def forced(self, setup: Setup, steps: Sequence[int], head: int) -> Iterable[int]:
        query = sum(steps) - 1
        return [j for j in range(query + 1) if j < 3 or query // 8 - j // 8 < 3 or (j // 8 - head) % 3 == 0]


CASES: dict[str, Case] = {
    "all": EveryToken(),
    "pages": Blocks(),
    "topk": Tokens(),
    "topk again": TokensAgain(),
    "window keep": Window("keep"),
    "window compact": MovedWindow("compact"),
    "window cap": MovedWindow("cap"),
    "clusters": ClusteredPrefix(),
    "lowrank": LowRankPrefix(),
    "evict": Evicted(),
    "retain": Retained(),
    "stride": Stride(),
}
