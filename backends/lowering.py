"""Lowering as steps that instruments can surround like passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from effc.backends.base import Backend
from effc.ir.program import Program
from effc.passes.base import Contract, Match, Pass, PassReport, Site

STEPS = ("lower-static-caches", "lower")
"""Names of the steps, which no user asks for."""


@dataclass(frozen=True)
class StaticCacheLowering(Pass):
    """The lowering of caches of codes: each attention is the same up to float rounding, and the model is not.

    Rounding that falls across the border of two codes moves a key or a value by a whole step, so the outputs of a model
    are bounded by the budget only.
    """

    name: ClassVar[str] = "lower-static-caches"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    backend: Backend

    def match(self, program: Program) -> Match:
        """The attentions with static scales."""
        return Match([Site(name) for name in self.backend.static_caches(program)])

    def apply(self, program: Program, sites: Sequence[Site]) -> PassReport:
        """Lower them in place."""
        self.backend.lower_static_caches(program)
        return PassReport([site.name for site in sites], details={"target": self.backend.name})


@dataclass(frozen=True)
class Lowering(Pass):
    """The lowering of a backend: promises to compute the same up to float rounding."""

    name: ClassVar[str] = "lower"
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    backend: Backend
    portable: bool = False

    def match(self, program: Program) -> Match:
        """The whole program is the one site."""
        return Match([Site("program")])

    def apply(self, program: Program, sites: Sequence[Site]) -> PassReport:
        """Lower the program in place."""
        program.model = self.backend.lower(program, portable=self.portable).model
        return PassReport([site.name for site in sites], details={"target": self.backend.name})
