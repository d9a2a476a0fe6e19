"""Lowering as a step that instruments can surround like a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from effc.backends.base import Backend
from effc.ir.program import Program
from effc.passes.base import Contract, Match, Pass, PassReport, Site


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
