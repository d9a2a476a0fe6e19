"""Raise layer normalization, `(x - mean(x)) / sqrt(var(x) + eps) * w + b`, to ONNX `LayerNormalization`.

Found from the mean of the squared difference outwards, in the spellings of `rms_norm`, with x centred by
`Sub(x, ReduceMean(x))`. Ba, Kiros and Hinton, "Layer Normalization", 2016.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effc.ir.rewrite.constants import new_constant
from effc.ir.rewrite.dataflow import attribute_int, is_op, operands, producer, sole_consumer
from effc.ir.rewrite.edit import insert_value, replace
from effc.ir.rewrite.shape_rules import axes_of
from effc.ir.rewrite.sizes import same, shape_of
from effc.passes.canonical.rms_norm import RmsNormSite

OP = "LayerNormalization"


@dataclass(frozen=True)
class LayerNormSite:
    """A normalization spelled out: what it computes, of what, with which weight, bias and epsilon."""

    output: ir.Value
    x: ir.Value
    weight: ir.Value | None
    bias: ir.Value | None
    epsilon: float


def match_layer_norm(rms: RmsNormSite) -> LayerNormSite | None:
    """The layer normalization that a root-mean-square normalization of a centred x is part of."""
    centred = producer(rms.x, "Sub")
    if centred is None or centred.inputs[0] is None:
        return None
    x, mean = centred.inputs[0], producer(centred.inputs[1], "ReduceMean")
    shape = shape_of(x)
    if mean is None or shape is None or mean.inputs[0] is not x or not attribute_int(mean, "keepdims", 1):
        return None
    if axes_of(mean, len(shape)) != (len(shape) - 1,):
        return None
    biased = _biased(rms.output, shape[-1])
    output, bias = biased if biased is not None else (rms.output, None)
    return LayerNormSite(output, x, rms.weight, bias, rms.epsilon)


def _biased(value: ir.Value, width: int | ir.SymbolicDim) -> tuple[ir.Value, ir.Value] | None:
    node = sole_consumer(value)
    if node is None or not is_op(node, "Add"):
        return None
    for operand, other in operands(node):
        shape = shape_of(other)
        if (
            operand is value
            and shape is not None
            and len(shape) == 1
            and same(shape[0], width)
            and other.is_initializer()
        ):
            return node.outputs[0], other
    return None


def raise_layer_norm(graph: ir.Graph, site: LayerNormSite) -> None:
    """Put the one node in place of the spelled-out computation."""
    before = site.output.producer()
    assert before is not None and site.x.dtype is not None and site.x.shape is not None
    width = site.x.shape[-1]
    assert isinstance(width, int)
    weight = site.weight or new_constant(graph, np.ones(width, dtype=site.x.dtype.numpy()), "ones")
    attributes = {"epsilon": site.epsilon, "stash_type": 1}
    inputs = [site.x, weight, site.bias] if site.bias is not None else [site.x, weight]
    replace(site.output, insert_value(before, OP, inputs, attributes))
