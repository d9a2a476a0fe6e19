"""What a pass is: frozen options, a contract, `match` that only looks and `apply` that only edits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from effc.ir.program import Program


class Contract(StrEnum):
    """What a pass promises about the outputs of the program it rewrites.

    `exact`: the same bits. `equivalent`: the same up to float rounding. `approximate`: within the
    budget the user sets.
    """

    EXACT = "exact"
    EQUIVALENT = "equivalent"
    APPROXIMATE = "approximate"


@dataclass(frozen=True)
class Site:
    """One place a pass could change.

    Attributes:
        name: The node or weight, as the user would find it in the graph.
        payload: What `apply` needs to edit it; private to the pass.
    """

    name: str
    payload: Any = None


@dataclass(frozen=True)
class LeftAlone:
    """A place a pass looked at and did not take, and why."""

    site: str
    reason: str


@dataclass(frozen=True)
class Match:
    """What `Pass.match` found: the sites to rewrite, and those left alone with the reason."""

    sites: Sequence[Site] = ()
    left: Sequence[LeftAlone] = ()


@dataclass(frozen=True)
class PassReport:
    """What `Pass.apply` did: names of the rewritten sites, further sites left alone, JSON-ready figures."""

    rewritten: Sequence[str] = ()
    left: Sequence[LeftAlone] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


class Pass(ABC):
    """Base of all passes. Subclasses are frozen dataclasses; their fields are their options.

    Class attributes:
        name: Kebab-case name in pipeline text.
        contract: What the pass promises.
        uses_calibration: Whether the pass measures on `program.calibration` when there is one. Data that no
            pass of a pipeline uses are refused.

    A subclass validates its options in `__post_init__` and raises `UsageError` with the range.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract]
    uses_calibration: ClassVar[bool] = False

    def requires(self) -> Sequence[Pass]:
        """Passes that must have run before this one; the pipeline inserts those that are missing."""
        return ()

    @abstractmethod
    def match(self, program: Program) -> Match:
        """Find the sites this pass would change. Must not change the program."""

    @abstractmethod
    def apply(self, program: Program, sites: Sequence[Site]) -> PassReport:
        """Rewrite the given sites in place. A pass with nothing to do returns an empty report."""
