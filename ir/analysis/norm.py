"""Normalization sites of a canonical graph."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from effc.ir.analysis.layer_names import named_by_layer
from effc.ir.rewrite.dataflow import attribute_float, attribute_int, is_op
from effc.ir.rewrite.sizes import shape_of

KINDS = {"RMSNormalization": "rms", "LayerNormalization": "layer"}


@dataclass(frozen=True)
class NormSite:
    """A normalization over the last axis.

    Attributes:
        name: `norm` and its layer, for reports only.
        node: The node.
        kind: `rms` or `layer`.
        x: What is normalized.
        output: The result.
        weight: Weight of the last axis.
        bias: Bias of the last axis; None when there is none.
        epsilon: What is added to the mean of squares or the variance.
        width: Length of the last axis; None when it is not a plain number.
    """

    name: str
    node: ir.Node
    kind: str
    x: ir.Value
    output: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    epsilon: float
    width: int | None


def norm_sites(graph: ir.Graph) -> tuple[NormSite, ...]:
    """All normalizations over the last axis, in order."""
    return named_by_layer([site for node in graph if (site := norm_site(node)) is not None], "norm")


def norm_site(node: ir.Node) -> NormSite | None:
    """The site of one node; None when it is no normalization over the last axis alone."""
    if not is_op(node, *KINDS) or node.inputs[0] is None or node.inputs[1] is None:
        return None
    shape = shape_of(node.inputs[0])
    if attribute_int(node, "axis", -1) not in (-1, len(shape or ()) - 1):
        return None
    width = shape[-1] if shape else None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    epsilon = attribute_float(node, "epsilon", 1e-5)
    size = width if isinstance(width, int) else None
    return NormSite(
        "norm", node, KINDS[node.op_type], node.inputs[0], node.outputs[0], node.inputs[1], bias, epsilon, size
    )
