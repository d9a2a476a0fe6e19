"""The `cached-attention` pass: attention and its cache become one op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from effc.ir.analysis.attention import AttentionSite, attention_sites
from effc.ir.analysis.cached_attention import cache_figures, cached_attention_sites
from effc.ir.program import Program
from effc.ir.rewrite.edit import remove_dead
from effc.passes.attention.raising import raise_cached_attention, reason_against, ring_of, rotation_of
from effc.passes.attention.step_sizes import step_sizes
from effc.passes.base import Contract, LeftAlone, Match, Pass, PassReport, Site
from effc.passes.canonical.simplify import simplify_program
from effc.passes.fusions import packed_heads


@dataclass(frozen=True)
class CachedAttention(Pass):
    """Make attention and its cache one op, which appends in place and knows the window.

    Before:

        keep = And(padding, And(key <= query, key > query - 512))
        y, present_key, present_value = Attention(q, k, v, keep, past_key, past_value)

    After:

        y, present_key, present_value = effc.CachedAttention(q, k, v, padding, past_key, past_value)
            {window=512, ring=512}

    Padding, causality and window are read off the mask, which is then not computed any more. A mask that is not
    understood is added to the scores as it is. `docs/cached-attention.md` has the op.

    Attributes:
        ring: `auto`: a layer with a window keeps the last tokens only, as many as its window; its cache tensors
            change their shape. `off`: every layer keeps every token.
        rotary: `inside`: the op rotates queries and keys itself. `outside`: the rotations stay as they are.
    """

    name: ClassVar[str] = "cached-attention"
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    ring: Literal["auto", "off"] = "auto"
    rotary: Literal["outside", "inside"] = "outside"

    def match(self, program: Program) -> Match:
        """Find every attention with a cache that the op computes."""
        sites, left = [], []
        for site in attention_sites(program.graph):
            reason = reason_against(site, program)
            if reason:
                left.append(LeftAlone(site.name, reason))
            else:
                sites.append(Site(site.name, site))
        return Match(sites, left)

    def apply(self, program: Program, sites: Sequence[Site]) -> PassReport:
        """Raise the given sites; the masks that nothing reads any more go."""
        if not sites:
            return PassReport()
        graph = program.graph
        chosen = {site.payload.past_key: site.name for site in sites}
        _pack([site.payload for site in sites])
        remove_dead(graph)
        sizes = step_sizes(graph)
        biases: dict[ir.Value, ir.Value] = {}
        for attention in attention_sites(graph):
            if attention.past_key not in chosen:
                continue
            if sizes is not None:
                for tensor in (*attention.node.inputs[4:6], *attention.node.outputs[1:3]):
                    assert tensor is not None
                    sizes.replace_shapes_of(tensor)
            ring = ring_of(attention) if self.ring == "auto" and sizes is not None else 0
            rotation = rotation_of(attention) if self.rotary == "inside" else None
            raise_cached_attention(attention, sizes, biases, ring=ring, rotation=rotation)
        program.model.opset_imports["effc"] = 1
        simplify_program(program)
        layers = [cache_figures(site) for site in cached_attention_sites(graph) if site.past[0] in chosen]
        return PassReport(list(chosen.values()), details={"cache": layers})


def _pack(attentions: Sequence[AttentionSite]) -> None:
    """Let attention read [batch, seq, heads * size], which the op wants, where that takes no transpose."""
    for attention in attentions:
        found = packed_heads.match(attention)
        if not isinstance(found, str):
            packed_heads.rewrite(found)
