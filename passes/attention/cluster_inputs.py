"""Inputs of a graph that bring the clusters of a prefix."""

from __future__ import annotations

import onnx_ir as ir

from effc.ir.analysis.cached_attention import CachedAttentionSite
from effc.ir.dialect.cached_attention import AttentionForm
from effc.ir.dialect.selections import ClusterSelection
from effc.passes.attention.cache_change import cache_prefix

THRESHOLDS = "thresholds"
TYPES = {
    "ends": ir.DataType.INT32,
    "radii": ir.DataType.FLOAT,
    "parent_ends": ir.DataType.INT32,
    "parent_radii": ir.DataType.FLOAT,
    THRESHOLDS: ir.DataType.FLOAT,
}
"""Of inputs; centroids and parents have the type of the keys."""


def cluster_inputs(site: CachedAttentionSite, form: AttentionForm, selection: ClusterSelection) -> list[ir.Value]:
    """New inputs of the graph for one attention, in the order of the op; all attentions share the thresholds.

    Those of the cache `past_key_values.3.key` are called `clusters.3.centroids`, …, `clusters.thresholds`.
    """
    graph = site.node.graph
    assert isinstance(graph, ir.Graph)
    present = {value.name: value for value in graph.inputs}
    layer = cache_prefix(site.past[0]).rpartition(".")[2]
    values = []
    for name, axes in selection.constants(form).items():
        full = f"clusters.{name}" if name == THRESHOLDS else f"clusters.{layer}.{name}"
        value = present.get(full)
        if value is None:
            dtype = TYPES.get(name) or site.past[0].dtype
            assert dtype is not None
            value = ir.Value(name=full, type=ir.TensorType(dtype), shape=ir.Shape(axes))
            graph.inputs.append(value)
        values.append(value)
    return values
