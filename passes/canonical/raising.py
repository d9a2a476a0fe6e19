"""Run the raised operations over a graph in the order they build on each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from effc.ir.analysis.layer_names import layer_of
from effc.ir.rewrite.edit import remove_dead
from effc.ir.rewrite.inference import infer_graph
from effc.passes.base import LeftAlone
from effc.passes.canonical import attention, attention_heads, attention_mask, gelu, layer_norm, rms_norm, rotary
from effc.passes.canonical.shape_arithmetic import SizeSources
from effc.passes.canonical.simplify import simplify


@dataclass
class Raised:
    """What was raised and what was left, by site name."""

    rewritten: list[str] = field(default_factory=list)
    left: list[LeftAlone] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def name(self, kind: str, node: ir.Node) -> str:
        """A name for the next site of a kind: `attention layers.3`, numbered when a layer has several."""
        layer = layer_of(node)
        base = f"{kind} {layer}" if layer else kind
        self.counts[base] += 1
        return base if self.counts[base] == 1 else f"{base} #{self.counts[base]}"


@dataclass(frozen=True)
class _Kind:
    name: str
    match: Callable[[ir.Node], Any]
    rewrite: Callable[[ir.Graph, Any], Any]


_KINDS = (
    _Kind("rms-norm", rms_norm.match_rms_norm, rms_norm.raise_rms_norm),
    _Kind("gelu", gelu.match_gelu, lambda graph, site: gelu.raise_gelu(site)),
    _Kind("rotary", rotary.match_rotary, rotary.raise_rotary),
    _Kind("attention", attention.match_attention, attention.raise_attention),
)


def raise_operations(model: ir.Model, names: set[str] | None) -> Raised:
    """Raise every site, or those with the given names only, and say why others were left."""
    raised = Raised()
    for kind in _KINDS:
        _raise_kind(model.graph, kind, raised, names)
        simplify(model)
    _widen_attention(model, raised)
    return raised


def _raise_kind(graph: ir.Graph, kind: _Kind, raised: Raised, names: set[str] | None) -> None:
    for node in list(graph):
        if node.graph is None:
            continue
        site = kind.match(node)
        if site is None:
            continue
        label, rewrite = kind.name, kind.rewrite
        layered = layer_norm.match_layer_norm(site) if isinstance(site, rms_norm.RmsNormSite) else None
        if layered is not None:
            label, site, rewrite = "layer-norm", layered, layer_norm.raise_layer_norm
        last = None if isinstance(site, str) else site.output.producer()
        name = raised.name(label, last or node)
        if isinstance(site, str):
            raised.left.append(LeftAlone(name, site))
        elif names is not None and name not in names:
            raised.left.append(LeftAlone(name, "not among the sites that were asked for"))
        else:
            rewrite(graph, site)
            raised.rewritten.append(name)


def _widen_attention(model: ir.Model, raised: Raised) -> None:
    graph = model.graph
    split = [attention_heads.split_heads(graph, node) for node in list(graph) if attention_heads.is_attention(node)]
    if any(split):
        simplify(model)
    names = Raised()
    for node in [node for node in graph if attention_heads.is_attention(node)]:
        name = names.name("attention", node)
        widened = attention_heads.unrepeat_heads(graph, node)
        remove_dead(graph)
        reason = attention_heads.absorb_cache(node)
        if reason is not None:
            raised.left.append(LeftAlone(name, reason))
        if (widened or node.graph is None) and name not in raised.rewritten:
            raised.rewritten.append(name)
    infer_graph(graph)
    sources = SizeSources(graph)
    for node in list(graph):
        if attention_heads.is_attention(node):
            attention_mask.rebuild_mask(graph, node, sources)
