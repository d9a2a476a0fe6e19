"""A pass of one's own: `Pow(x, 2)` becomes `Mul(x, x)`, which no runtime computes by exponentials."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from effc.errors import UsageError
from effc.ir.program import Program
from effc.ir.rewrite.constants import scalar
from effc.ir.rewrite.edit import insert_value, remove_dead, replace
from effc.passes.base import Contract, LeftAlone, Match, Pass, PassReport, Site


@dataclass(frozen=True)
class SquareByProduct(Pass):
    """Square by a product instead of a power.

    Before:

        y = Pow(x, 2.0)

    After:

        y = Mul(x, x)

    Attributes:
        largest: Largest exponent that becomes a chain of products, 2 to 4.
    """

    name: ClassVar[str] = "square-by-product"
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    largest: int = 2

    def __post_init__(self) -> None:
        if not 2 <= self.largest <= 4:
            raise UsageError(f"largest is {self.largest}, it must be from 2 to 4.")

    def match(self, program: Program) -> Match:
        """Every power, with its exponent if it can be taken."""
        sites, left = [], []
        for node in program.graph:
            if node.op_type != "Pow":
                continue
            exponent = scalar(node.inputs[1])
            if exponent is None:
                left.append(LeftAlone(str(node.outputs[0].name), "its exponent is computed"))
            elif exponent not in range(2, self.largest + 1):
                left.append(
                    LeftAlone(str(node.outputs[0].name), f"its exponent is {exponent}, not 2 to {self.largest}")
                )
            else:
                sites.append(Site(str(node.outputs[0].name), (node, int(exponent))))
        return Match(sites, left)

    def apply(self, program: Program, sites: Sequence[Site]) -> PassReport:
        """Put products in place of the powers."""
        for site in sites:
            node, exponent = site.payload
            replace(node.outputs[0], _power(node, exponent), before=node)
        remove_dead(program.graph)
        return PassReport(rewritten=[site.name for site in sites])


def _power(node: ir.Node, exponent: int) -> ir.Value:
    base = node.inputs[0]
    product = base
    for _ in range(exponent - 1):
        product = insert_value(node, "Mul", [product, base])
    return product
