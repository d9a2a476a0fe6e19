"""The table of every selection: with what it is tested, what it must read, and what it cannot have.

`test_selection_invariants.py` runs the invariants over it, and fails when a selection has no case here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from attention_oracle import Form
from cluster_oracle import Clusters
from selected_cache import PAGED, STORAGES, Cache, form_for

from effc.ir.dialect.selections import (
    AllTokens,
    ClusterSelection,
    EvictSelection,
    PageSelection,
    RetainSelection,
    StrideSelection,
    TokenSelection,
    TopKSelection,
    WindowSelection,
)

PROMPT, TOKENS = 200, 240
FULL = 256
"""More tokens than any test has."""


@dataclass(frozen=True)
class Setup:
    """A selection and what goes with it.

    Attributes:
        selection: It.
        window: Of the attention.
        prepare: What happens to a cache between the prompt and the steps after it.
    """

    selection: TokenSelection
    window: int = 0
    prepare: Callable[[Cache], None] = lambda cache: None


@dataclass(frozen=True)
class Refusal:
    """Why a selection cannot have something.

    Attributes:
        reason: Of `reason_against`; empty where only the kernel, or the node, refuses it.
        kernel: Part of the message of the op.
    """

    reason: str
    kernel: str


CODED = ("int8", "int4", "mixed")
WINDOW = Refusal("its window of 40 tokens bounds what it reads", "takes no window")
NOT_CAUSAL = Refusal("it is not causal", "needs causal attention")
NEGATIVE = Refusal("its scale is negative", "takes no negative scale")
NO_RING = Refusal("its cache is a ring", "a ring must hold the window")
ORT_READS = Refusal("its cache has storage=static, which onnxruntime's own attention reads", "must be one of 'dense'")
BIAS = Refusal("it has a bias", "takes no bias")


class Case(ABC):
    """A selection as the invariants see it. `steps` are the tokens that a row got in each step, one in the last.

    Class attributes:
        rotates: Whether the op must rotate.
        exact: Whether a full budget has the bits of no selection.
        per_key_head: Whether key heads choose by their own queries, or their own number. Else all heads together
            choose, or nobody, and a key head that is repeated for each of its query heads changes nothing.
        pads: Whether rows may begin with padding.
        row_tolerance: Of a row in a batch and the row alone.
        refused: Storage or situation (see `test_selection_refusals.py`) -> why the selection cannot have it.
    """

    rotates: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    per_key_head: ClassVar[bool] = False
    pads: ClassVar[bool] = True
    row_tolerance: ClassVar[float] = 0
    refused: ClassVar[dict[str, Refusal]] = {}

    @property
    def kind(self) -> str:
        """Value of the attribute `selection`."""
        return self.small("float32").selection.kind

    @property
    def storages(self) -> tuple[str, ...]:
        """Names of those it can have."""
        return tuple(name for name in STORAGES if name not in self.refused)

    def form(self, name: str, storage: str, setup: Setup) -> Form:
        """The form of that name with what the selection needs."""
        form = replace(form_for(name, storage), window=setup.window)
        if self.rotates and form.rotary == "none":
            form = replace(form, rotary="interleaved", rotary_size=16)
        return form

    @abstractmethod
    def full(self, storage: str) -> list[Setup]:
        """Those that read every token."""

    @abstractmethod
    def small(self, storage: str) -> Setup:
        """One that reads some of them."""

    def tied(self, storage: str) -> Setup:
        """One for tokens that are all alike."""
        return self.small(storage)

    def prompt(self, setup: Setup) -> list[int]:
        """Steps before those of one token."""
        return [PROMPT]

    def cuts(self, setup: Setup) -> list[tuple[list[int], list[int]]]:
        """Ways to cut a prompt, and a text after it, that are alike."""
        return [([PROMPT], [9]), ([90, 2, PROMPT - 92], [4, 5])]

    @abstractmethod
    def forced(self, setup: Setup, steps: Sequence[int], head: int) -> Iterable[int]:
        """Tokens that the last step must read, with the new one."""

    def count(self, setup: Setup, steps: Sequence[int], head: int) -> int | None:
        """How many it reads; None: any number."""
        return len(set(self.forced(setup, steps, head)))

    def chosen_of_alike(self, setup: Setup, steps: Sequence[int], head: int) -> Iterable[int]:
        """What it reads when all tokens are alike."""
        return self.forced(setup, steps, head)


def singles(steps: Sequence[int]) -> int:
    """Steps of one token before the last one."""
    return len(steps) - 1 - max((i for i, step in enumerate(steps) if step > 1), default=-1) - 1


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
    exact = False
    row_tolerance = 1e-6
    dense: ClassVar[Refusal] = Refusal(
        "which keeps every token; sinks and window are a dense ring", "has the selections 'all', 'pages' and 'topk'"
    )
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
        return [Setup(WindowSelection(self.sinks, self.positions), FULL)]

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
    """`clusters` of a prefix of 180 tokens: those whose share is above the threshold, not at it."""

    prefix: ClassVar[int] = 180
    exact = False
    per_key_head = True
    pads = False
    refused = {
        **dict.fromkeys(
            (*CODED, "static"),
            Refusal("clusters reorder the tokens of a dense one", "has the selections 'all', 'pages' and 'topk'"),
        ),
        "a window": WINDOW,
        "another ring": Refusal("", "a ring must hold the window"),
        "a bias": BIAS,
    }

    def full(self, storage: str) -> list[Setup]:
        return [
            Setup(ClusterSelection(20), prepare=self.giver(-1, -1)),
            Setup(ClusterSelection(20)),  # no prefix
        ]

    def small(self, storage: str) -> Setup:
        return Setup(ClusterSelection(20), prepare=self.giver(0.005, 0.006))

    def tied(self, storage: str) -> Setup:
        """Clusters of 128 keys that share alike; each is exactly at the threshold."""
        return Setup(ClusterSelection(20), prepare=self.alike)

    def forced(self, setup: Setup, steps: Sequence[int], head: int) -> Iterable[int]:
        return range(self.prefix, sum(steps))

    def count(self, setup: Setup, steps: Sequence[int], head: int) -> None:
        return None

    def chosen_of_alike(self, setup: Setup, steps: Sequence[int], head: int) -> Iterable[int]:
        return range(128, sum(steps))

    def giver(self, *thresholds: float) -> Callable[[Cache], None]:
        """Gives a cache 15 clusters in 5 parents, other ones for each key head."""

        def give(cache: Cache) -> None:
            form, rng = cache.form, np.random.default_rng(1)
            ends = np.sort(rng.integers(0, self.prefix, (1, form.kv_heads, 15)), axis=2)
            ends[:, :, -1] = self.prefix
            parent_ends = np.broadcast_to([2, 5, 9, 10, 15], (1, form.kv_heads, 5))
            vectors = [rng.standard_normal((1, form.kv_heads, n, form.head_size)) / 4 for n in (15, 5)]
            give_clusters(cache, vectors[0], ends, vectors[1], parent_ends, thresholds)

        return give

    def alike(self, cache: Cache) -> None:
        """Gives a cache 16 clusters of 8 keys with one centroid."""
        form = cache.form
        ends = np.broadcast_to(np.arange(8, 129, 8), (1, form.kv_heads, 16))
        parent_ends = np.broadcast_to([16], (1, form.kv_heads, 1))
        vectors = [np.ones((1, form.kv_heads, n, form.head_size)) for n in (16, 1)]
        give_clusters(cache, vectors[0], ends, vectors[1], parent_ends, (-1, 1 / 128))


def give_clusters(
    cache: Cache,
    centroids: np.ndarray,
    ends: np.ndarray,
    parents: np.ndarray,
    parent_ends: np.ndarray,
    thresholds: Sequence[float],
) -> None:
    """As inputs, centroids and parents in the type of the cache."""
    dtype = cache.past[0].dtype
    given = Clusters(
        centroids.astype(dtype),
        ends.astype(np.int32),
        parents.astype(dtype),
        parent_ends.astype(np.int32),
        np.array(thresholds, np.float32),
    )
    cache.give(given.inputs())


class Evicted(Case):
    """`evict`: key heads keep as many tokens, not the same ones; of equal votes, the earlier token."""

    per_key_head = True
    refused = {
        **dict.fromkeys(
            (*CODED, "static"),
            Refusal(
                "which keeps every token; evict keeps some in a dense cache",
                "has the selections 'all', 'pages' and 'topk'",
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
    exact = False
    refused = {
        **dict.fromkeys(
            (*CODED, "static"),
            Refusal(
                "which keeps every token; retain keeps some in a dense cache",
                "has the selections 'all', 'pages' and 'topk'",
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
        return [Setup(RetainSelection(budget=FULL, sinks=2, recent=6, block=4))]

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
        **dict.fromkeys((*CODED, "static"), Refusal("stride reads a dense one", "has the selections 'all', 'pages'")),
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
    "evict": Evicted(),
    "retain": Retained(),
    "stride": Stride(),
}
