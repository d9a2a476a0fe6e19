"""A selection as the invariants of `test_selection_invariants.py` see it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from attention_oracle import Form
from selected_cache import STORAGES, Cache, form_for

from effc.ir.dialect.selections import TokenSelection

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
        exact: Whether it has the bits of no selection, where it reads everything.
    """

    selection: TokenSelection
    window: int = 0
    prepare: Callable[[Cache], None] = lambda cache: None
    exact: bool = True


@dataclass(frozen=True)
class Refusal:
    """Why a selection cannot have something.

    Attributes:
        reason: Of `reason_against`; empty where only the kernel, or the node, refuses it.
        kernel: Part of the message of the op.
    """

    reason: str
    kernel: str


class Case(ABC):
    """A selection as the invariants see it. `steps` are the tokens that a row got in each step, one in the last.

    Class attributes:
        rotates: Whether the op must rotate.
        per_key_head: Whether key heads choose by their own queries, or their own number. Else all heads together
            choose, or nobody, and a key head that is repeated for each of its query heads changes nothing.
        pads: Whether rows may begin with padding.
        row_tolerance: Of a row in a batch and the row alone.
        refused: Storage or situation (see `test_selection_refusals.py`) -> why the selection cannot have it.
    """

    rotates: ClassVar[bool] = False
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
