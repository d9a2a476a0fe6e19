"""Raise root-mean-square normalization, `x / sqrt(mean(x²) + eps) * w`, to ONNX `RMSNormalization`.

Found from the mean outwards: `ReduceMean` over the last axis of a square, a small constant added, a root in any
spelling (`Sqrt` then `Reciprocal` or `Div`, `Pow(-0.5)`), a product with the same x, then a weight of the last
axis if there is one. Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effc.ir.rewrite.constants import new_constant, scalar
from effc.ir.rewrite.dataflow import (
    attribute_int,
    consumers,
    is_op,
    operands,
    producer,
    shifted,
    skip_casts,
    sole_consumer,
)
from effc.ir.rewrite.edit import insert_value, replace
from effc.ir.rewrite.shape_rules import axes_of
from effc.ir.rewrite.sizes import same, shape_of

OP = "RMSNormalization"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class RmsNormSite:
    """A normalization spelled out.

    Attributes:
        output: The value the raised node will compute.
        x: What is normalized, before any `Cast` to the type the mean is computed in.
        weight: Weight of the last axis; None when there is none.
        epsilon: What is added to the mean.
    """

    output: ir.Value
    x: ir.Value
    weight: ir.Value | None
    epsilon: float


def find_mean(node: ir.Node) -> ir.Value | None:
    """The x of a node that computes the mean of x² over the last axis and keeps it."""
    if not is_op(node, "ReduceMean") or not attribute_int(node, "keepdims", 1):
        return None
    shape = shape_of(node.inputs[0])
    if not shape or axes_of(node, len(shape)) != (len(shape) - 1,):
        return None
    return squared(node.inputs[0])


def squared(value: ir.Value | None) -> ir.Value | None:
    """The x when the value is x², spelled `Pow(x, 2)` or `Mul(x, x)`."""
    node = producer(value, "Pow", "Mul")
    if node is None:
        return None
    if node.op_type == "Pow":
        return node.inputs[0] if scalar(node.inputs[1]) == 2.0 else None
    return node.inputs[0] if node.inputs[0] is node.inputs[1] else None


def match_rms_norm(node: ir.Node) -> RmsNormSite | str | None:
    """The site around a `ReduceMean`; a reason when it comes close; None when it is something else."""
    x = find_mean(node)
    if x is None:
        return None
    biased = sole_consumer(node.outputs[0])
    shift = shifted(biased.outputs[0]) if biased is not None else None
    if shift is None or biased is None:
        return "mean of squares found, but no constant is added to it"
    normalized = _normalized(biased.outputs[0], x)
    if normalized is None:
        return "mean of squares found, but x is not divided by its root"
    output, source = _stored(normalized, x)
    if source.dtype not in _FLOATS or x.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return f"the mean is computed in {x.dtype}, RMSNormalization needs float or double"
    weighted = _weighted(output, source)
    final, weight = weighted if weighted is not None else (output, None)
    return RmsNormSite(final, source, weight, shift[1])


def _normalized(biased: ir.Value, x: ir.Value) -> ir.Value | None:
    """`x / sqrt(biased)` in any spelling."""
    for node in consumers(biased):
        if is_op(node, "Sqrt"):
            for user in consumers(node.outputs[0]):
                if is_op(user, "Div") and user.inputs[0] is x and user.inputs[1] is node.outputs[0]:
                    return user.outputs[0]
                inverse = is_op(user, "Reciprocal") or (is_op(user, "Div") and scalar(user.inputs[0]) == 1.0)
                product = _product_with(user.outputs[0], x) if inverse else None
                if product is not None:
                    return product
        elif is_op(node, "Pow") and scalar(node.inputs[1]) == -0.5:
            return _product_with(node.outputs[0], x)
    return None


def _product_with(value: ir.Value, x: ir.Value) -> ir.Value | None:
    for node in consumers(value):
        if is_op(node, "Mul") and x in node.inputs and value in node.inputs:
            return node.outputs[0]
    return None


def _stored(normalized: ir.Value, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Output and input with the casts of a computation in higher precision included, when both sides have them."""
    narrow = skip_casts(x)
    cast = sole_consumer(normalized)
    if (
        narrow is not None
        and narrow is not x
        and is_op(cast, "Cast")
        and cast is not None
        and cast.outputs[0].dtype == narrow.dtype
    ):
        return cast.outputs[0], narrow
    return normalized, x


def _weighted(value: ir.Value, x: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The product with a weight of the last axis that does not depend on x: (output, weight)."""
    node = sole_consumer(value)
    shape = shape_of(x)
    if not is_op(node, "Mul") or node is None or shape is None:
        return None
    for operand, other in operands(node):
        weight_shape = shape_of(other)
        if (
            operand is value
            and weight_shape is not None
            and len(weight_shape) == 1
            and same(weight_shape[0], shape[-1])
            and other.dtype == value.dtype
        ):
            return node.outputs[0], other
    return None


def raise_rms_norm(graph: ir.Graph, site: RmsNormSite) -> None:
    """Put the one node in place of the spelled-out computation."""
    before = site.output.producer()
    assert before is not None
    weight = site.weight if site.weight is not None else _ones(graph, site)
    stash = int(ir.DataType.DOUBLE if site.x.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT)
    attributes = {"axis": -1, "epsilon": site.epsilon, "stash_type": stash}
    replace(site.output, insert_value(before, OP, [site.x, weight], attributes))


def _ones(graph: ir.Graph, site: RmsNormSite) -> ir.Value:
    assert site.x.shape is not None and site.x.dtype is not None
    width = site.x.shape[-1]
    assert isinstance(width, int)
    return new_constant(graph, np.ones(width, dtype=site.x.dtype.numpy()), "ones")
