"""How far apart two graphs may be that compute the same thing in another order of rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from effc.ir.analysis.cached_attention import cached_attention_sites
from effc.ir.rewrite.dataflow import read_values

CONTRACTIONS = {
    ("", "MatMul"): 1,
    ("", "Gemm"): 1,
    ("", "Conv"): 1,
    ("", "Einsum"): 1,
    ("", "Attention"): 2,
    ("com.microsoft", "GroupQueryAttention"): 2,
    ("com.microsoft", "MultiHeadAttention"): 2,
    ("effc", "CachedAttention"): 2,
    ("effc", "CodedMatMul"): 1,
}
"""Ops that sum products over an axis, and how many such sums in a row they hold."""

ROUNDOFF = {ir.DataType.FLOAT16: 2.0**-11, ir.DataType.BFLOAT16: 2.0**-8, ir.DataType.DOUBLE: 2.0**-53}
SAFETY = 4.0


@dataclass(frozen=True)
class Tolerance:
    """Bound of `max_rel` for an equivalent rewrite, and what it was derived from.

    Attributes:
        max_rel: `SAFETY * roundoff * sqrt(length) * depth`.
        roundoff: Unit roundoff of the coarsest float type that is computed in.
        length: Longest sum, the largest inner size of a product with a weight.
        depth: Sums of products in a row on the longest path from an input to an output, at least 1.
    """

    max_rel: float
    roundoff: float
    length: int
    depth: int


def equivalence_tolerance(graph: ir.Graph) -> Tolerance:
    """Tolerance of a graph, relative to the root mean square of an output.

    Reordering a sum of n products moves it by about sqrt(n) roundoffs of its typical size (random-walk model;
    Higham and Mary 2019, sec. 2). Each of `depth` sums in a row adds such an error, and residual
    connections carry all of them on, so the errors are added. `SAFETY` covers the largest of many elements.
    """
    roundoff = max((ROUNDOFF.get(dtype, 2.0**-24) for dtype in _compute_dtypes(graph)), default=2.0**-24)
    length, depth = _longest_sum(graph), max(1, contraction_depth(graph))
    return Tolerance(SAFETY * roundoff * math.sqrt(length) * depth, roundoff, length, depth)


def contraction_depth(graph: ir.Graph) -> int:
    """Sums of products in a row on the longest path through the graph."""
    depths: dict[ir.Value, int] = {}
    for node in graph:
        before = max((depths.get(value, 0) for value in read_values(node)), default=0)
        after = before + CONTRACTIONS.get((node.domain, node.op_type), 0)
        depths.update(dict.fromkeys(node.outputs, after))
    return max((depths.get(value, 0) for value in graph.outputs), default=0)


def _compute_dtypes(graph: ir.Graph) -> set[ir.DataType]:
    """Float types of inputs, outputs and sums; a cache is only stored in its type."""
    caches = {value for site in cached_attention_sites(graph) for value in (*site.past, *site.node.outputs[1:])}
    values = [*graph.inputs, *graph.outputs]
    for node in graph:
        if (node.domain, node.op_type) in CONTRACTIONS:
            values += node.outputs
    kept = (value for value in values if value not in caches)
    return {value.dtype for value in kept if value.dtype is not None and value.dtype.is_floating_point()}


def _longest_sum(graph: ir.Graph) -> int:
    """Largest axis of a weight with two axes, without the vocabulary axis of embeddings; 1 when there is none."""
    longest = 1
    for value in graph.initializers.values():
        if value.const_value is not None and len(value.const_value.shape) >= 2:
            longest = max(longest, min(value.const_value.shape.numpy()[-2:]))
    return longest
