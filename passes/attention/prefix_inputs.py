"""Inputs of a graph that bring what a prefix holds beside its cache."""

from __future__ import annotations

import onnx_ir as ir

from effc.ir.analysis.cached_attention import CachedAttentionSite
from effc.ir.dialect.cached_attention import AttentionForm
from effc.ir.dialect.selections import TokenSelection
from effc.passes.attention.cache_change import cache_prefix

SHARED = ("thresholds",)
"""Those that are one for all attentions."""


def prefix_inputs(site: CachedAttentionSite, form: AttentionForm, selection: TokenSelection) -> list[ir.Value]:
    """New inputs of the graph for one attention, in the order of the op.

    Those of the cache `past_key_values.3.key` are called `clusters.3.centroids`, …, `clusters.thresholds`.
    """
    graph = site.node.graph
    assert isinstance(graph, ir.Graph)
    present = {value.name: value for value in graph.inputs}
    layer = cache_prefix(site.past[0]).rpartition(".")[2]
    axes = selection.constants(form)
    values = []
    for name, known in selection.prefix.items():
        full = f"{selection.kind}.{name}" if name in SHARED else f"{selection.kind}.{layer}.{name}"
        value = present.get(full)
        if value is None:
            dtype = known or site.past[0].dtype
            assert dtype is not None
            value = ir.Value(name=full, type=ir.TensorType(dtype), shape=ir.Shape(axes[name]))
            graph.inputs.append(value)
        values.append(value)
    return values
