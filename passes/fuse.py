"""`fuse`: the last pass of an onnxruntime engine, for forms its CPU kernels run faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from effc.errors import UsageError
from effc.ir.analysis.attention import attention_sites
from effc.ir.program import Program
from effc.passes.base import Contract, LeftAlone, Match, Pass, PassReport, Site
from effc.passes.canonical.simplify import simplify_program
from effc.passes.fusions import packed_heads, plain_sums

FUSIONS = (packed_heads.NAME, plain_sums.NAME)


@dataclass(frozen=True)
class Fuse(Pass):
    """Rewrite what onnxruntime's CPU kernels run faster in another form. Every form here was measured to pay.

        Reshape, Transpose, Attention, Transpose, Reshape   ->   Attention on [batch, seq, heads * head_size]
        LayerNormalization(Add(x, y))                       ->   LayerNormalization(Sum(x, y))

    Measured and left out, because they gain nothing or lose (onnxruntime 1.32, CPU, float32):
    SkipSimplifiedLayerNormalization for a sum and an RMSNormalization (0.89 against 0.91 µs for one row of 640, 32
    against 66 µs for 256 rows of 384), SkipLayerNormalization (15 to 80 times slower than its parts), BiasGelu
    (same for one row, slower for many), FastGelu (39 against 42 µs), SimplifiedLayerNormalization for
    RMSNormalization (the same kernel), QuickGelu for SiLU (onnxruntime does that by itself), MultiHeadAttention
    (276 against 190 µs for 128 tokens).

    Attributes:
        fusions: Which ones; all by default.
    """

    fusions: tuple[str, ...] = field(default=FUSIONS, metadata={"range": ", ".join(FUSIONS)})

    name: ClassVar[str] = "fuse"
    contract: ClassVar[Contract] = Contract.EQUIVALENT

    def __post_init__(self) -> None:
        unknown = [name for name in self.fusions if name not in FUSIONS]
        if unknown:
            raise UsageError(f"unknown fusion {unknown[0]!r}. Fusions: {', '.join(FUSIONS)}.")

    def match(self, program: Program) -> Match:
        """Find the sites of each fusion that was asked for."""
        sites: list[Site] = []
        left: list[LeftAlone] = []
        if packed_heads.NAME in self.fusions:
            for attention in attention_sites(program.graph):
                found = packed_heads.match(attention)
                if isinstance(found, str):
                    left.append(LeftAlone(attention.name, found))
                else:
                    sites.append(Site(attention.name, found))
        if plain_sums.NAME in self.fusions:
            sums = [one for node in program.graph if (one := plain_sums.match(node)) is not None]
            sites += [Site(f"sum {one.node.name or index}", one) for index, one in enumerate(sums)]
        return Match(sites, left)

    def apply(self, program: Program, sites: Sequence[Site]) -> PassReport:
        """Rewrite the given sites."""
        before = len(program.graph)
        for site in sites:
            if isinstance(site.payload, packed_heads.PackedHeads):
                packed_heads.rewrite(site.payload)
            else:
                plain_sums.rewrite(site.payload)
        simplify_program(program)
        return PassReport(
            [site.name for site in sites], (), {"nodes_before": before, "nodes_after": len(program.graph)}
        )
