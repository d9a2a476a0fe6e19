"""Run the raised operations over a graph in the order they build on each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from effc.ir.analysis.layer_names import layer_of
from effc.ir.program import OPSET
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
    op_type: str
    since: int
    match: Callable[[ir.Node], Any]
    rewrite: Callable[[ir.Graph, Any], Any]


_KINDS = (
    _Kind("rms-norm", rms_norm.OP, 23, rms_norm.match_rms_norm, rms_norm.raise_rms_norm),
    _Kind("gelu", gelu.OP, 20, gelu.match_gelu, lambda graph, site: gelu.raise_gelu(site)),
    _Kind("rotary", rotary.OP, 23, rotary.match_rotary, rotary.raise_rotary),
    _Kind("attention", attention.OP, 23, attention.match_attention, attention.raise_attention),
)
NOT_ASKED_FOR = "not among the sites that were asked for"


def raise_operations(model: ir.Model, names: set[str] | None) -> Raised:
    """Raise every site, or those with the given names only, and say why others were left."""
    raised = Raised()
    for kind in _KINDS:
        _raise_kind(model.graph, kind, raised, names, model.graph.opset_imports.get("", OPSET))
        simplify(model)
    _widen_attention(model, raised, names)
    return raised


def _raise_kind(graph: ir.Graph, kind: _Kind, raised: Raised, names: set[str] | None, opset: int) -> None:
    for node in list(graph):
        site = kind.match(node) if node.graph is not None else None
        if site is None:
            continue
        label, op_type, since, rewrite = kind.name, kind.op_type, kind.since, kind.rewrite
        layered = layer_norm.match_layer_norm(site) if isinstance(site, rms_norm.RmsNormSite) else None
        if layered is not None:
            label, op_type, since = "layer-norm", layer_norm.OP, 17
            site, rewrite = layered, layer_norm.raise_layer_norm
        last = None if isinstance(site, str) else site.output.producer()
        name = raised.name(label, last or node)
        if isinstance(site, str):
            raised.left.append(LeftAlone(name, site))
        elif not since <= opset <= OPSET:
            raised.left.append(LeftAlone(name, f"the model is at opset {opset}, {op_type} needs {since} to {OPSET}"))
        elif names is not None and name not in names:
            raised.left.append(LeftAlone(name, NOT_ASKED_FOR))
        else:
            rewrite(graph, site)
            raised.rewritten.append(name)


def _widen_attention(model: ir.Model, raised: Raised, names: set[str] | None) -> None:
    """Take groups and caches into every `Attention`, and write its mask in the shared form."""
    graph = model.graph
    split = [attention_heads.split_heads(graph, node) for node in list(graph) if attention_heads.is_attention(node)]
    if any(split):
        simplify(model)
    naming = Raised()
    for node in [node for node in graph if attention_heads.is_attention(node)]:
        name = naming.name("attention", node)
        if names is None or name in names:
            _widen(graph, node, name, raised)
    infer_graph(graph)
    sources = SizeSources(graph)
    for node in [node for node in graph if attention_heads.is_attention(node)]:
        attention_mask.rebuild_mask(graph, node, sources)


def _widen(graph: ir.Graph, node: ir.Node, name: str, raised: Raised) -> None:
    widened = attention_heads.unrepeat_heads(graph, node)
    remove_dead(graph)
    reason = attention_heads.absorb_cache(node)
    if reason is not None:
        raised.left.append(LeftAlone(name, reason))
    if (widened or node.graph is None) and name not in raised.rewritten:
        raised.rewritten.append(name)
