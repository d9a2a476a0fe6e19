"""Raise scaled dot-product attention to ONNX `Attention`.

Found from the softmax in both directions: forwards through casts and NaN guards to the product with v; backwards through masks
(additive, or `Where` with a very negative filling), softcap and scale to the product of q with the transposed k. Scales on
q and on k are taken into the attribute. What q, k and v went through before (reshapes, transposes, expands) does not matter.
Vaswani et al., "Attention Is All You Need", 2017, section 3.2.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as changed

import numpy as np
import onnx_ir as ir

from effc.ir.rewrite import sizes
from effc.ir.rewrite.constants import new_integers, new_scalar, scalar
from effc.ir.rewrite.dataflow import attribute_int, consumers, is_op, operands, producer, scaled
from effc.ir.rewrite.edit import insert, insert_value, replace
from effc.ir.rewrite.sizes import shape_of

OP = "Attention"
FILLING = -1e4
"""A `Where` filling at or below this number masks; float16 masks use -65504, float32 ones -3.4e38 or -inf."""


@dataclass(frozen=True)
class Scores:
    """What a softmax is taken of.

    Attributes:
        q: Queries, rank 3 or 4.
        k_transposed: Keys with the last two axes swapped.
        scale: Factor on `q @ k_transposed`.
        softcap: `softcap * tanh(scores / softcap)`; 0 when there is none.
        masks: `(value, kind)` in the order of application; kind `add`, `keep` (true keeps) or `drop` (true drops).
        precision: Element type the softmax is computed in when it is not that of q.
    """

    q: ir.Value
    k_transposed: ir.Value
    scale: float = 1.0
    softcap: float = 0.0
    masks: tuple[tuple[ir.Value, str], ...] = ()
    precision: ir.DataType | None = None


@dataclass(frozen=True)
class AttentionSite:
    """An attention spelled out: its scores, its values and the value it ends in."""

    output: ir.Value
    scores: Scores
    v: ir.Value


def match_attention(node: ir.Node) -> AttentionSite | str | None:
    """The attention around a `Softmax`; a reason when it comes close; None when it is something else."""
    if not is_op(node, "Softmax") or node.inputs[0] is None:
        return None
    shape = shape_of(node.inputs[0])
    if shape is None or attribute_int(node, "axis", -1) not in (-1, len(shape) - 1):
        return None
    product = _product_with_values(node.outputs[0])
    scores = _scores(node.inputs[0])
    if product is None or isinstance(scores, str):
        return _near_miss(product, scores)
    output, v = product
    if len(shape) not in (3, 4):
        return f"attention found, but its scores have {len(shape)} axes; 3 or 4 are handled"
    for name, value in (("q", scores.q), ("k", scores.k_transposed), ("v", v)):
        if len(shape_of(value) or ()) != len(shape):
            return f"attention found, but {name} and the scores have different ranks"
    return AttentionSite(output, scores, v)


def _near_miss(product: tuple[ir.Value, ir.Value] | None, scores: Scores | str) -> str | None:
    if product is None and isinstance(scores, str):
        return None
    if product is None:
        return "scores -> softmax found, but the weights are not only multiplied with values"
    assert isinstance(scores, str)
    return f"softmax -> product with values found, but {scores}"


def _product_with_values(weights: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """`(output, v)` of the product that reads the attention weights, if nothing else does."""
    while True:
        users = [user for user in consumers(weights) if not is_op(user, "IsNaN")]
        if len(users) != 1 or weights.is_graph_output():
            return None
        user = users[0]
        if is_op(user, "MatMul"):
            v = user.inputs[1]
            return (user.outputs[0], v) if user.inputs[0] is weights and v is not None and v is not weights else None
        if not (is_op(user, "Cast") or _is_nan_guard(user, weights)):
            return None
        weights = user.outputs[0]


def _is_nan_guard(node: ir.Node, weights: ir.Value) -> bool:
    """`Where(IsNaN(p), 0, p)`: fully masked rows become 0, as the standard operation has it."""
    test = producer(node.inputs[0], "IsNaN") if is_op(node, "Where") else None
    return test is not None and test.inputs[0] is weights and scalar(node.inputs[1]) == 0.0 and node.inputs[2] is weights


def _scores(value: ir.Value) -> Scores | str:
    """Walk back from the input of a softmax to `q @ kᵀ`; a reason when the walk ends elsewhere."""
    node = value.producer()
    if is_op(node, "Add"):
        return _added_mask(node)
    if is_op(node, "Where"):
        return _where_mask(node)
    if is_op(node, "Cast"):
        found = _scores(node.inputs[0]) if node.inputs[0] is not None else "a Cast has no input"
        return found if isinstance(found, str) else changed(found, precision=value.dtype)
    return _capped(value)


def _added_mask(node: ir.Node) -> Scores | str:
    for inner, mask in operands(node):
        found = _scores(inner)
        if not isinstance(found, str):
            return changed(found, masks=(*found.masks, (mask, "add")))
    return "neither operand of the Add before the softmax leads back to q @ kᵀ"


def _where_mask(node: ir.Node) -> Scores | str:
    condition = node.inputs[0]
    for position, kind in ((1, "keep"), (2, "drop")):
        inner, filling = node.inputs[position], scalar(node.inputs[3 - position])
        if filling is None:
            filling = _expanded_number(node.inputs[3 - position])
        if condition is None or inner is None or filling is None:
            continue
        if filling > FILLING:
            return f"the mask fills with {filling:g}, which is not a masking number"
        found = _scores(inner)
        return found if isinstance(found, str) else changed(found, masks=(*found.masks, (condition, kind)))
    return "the Where before the softmax has no constant filling"


def _expanded_number(value: ir.Value | None) -> float | None:
    node = producer(value, "Expand", "Cast", "ConstantOfShape")
    if node is not None and node.op_type == "ConstantOfShape":
        attribute = node.attributes.get("value")
        return 0.0 if attribute is None else float(attribute.as_tensor().numpy().reshape(-1)[0])
    return scalar(node.inputs[0]) if node is not None else None


def _capped(value: ir.Value) -> Scores | str:
    """`c * tanh(s / c)`, a scaled product, or the product itself."""
    factor, inner = 1.0, value
    while (step := scaled(inner)) is not None:
        inner, factor = step[0], factor * step[1]
    node = producer(inner, "Tanh")
    if node is None:
        return _scaled_product(inner, factor)
    assert node.inputs[0] is not None
    product, inside = node.inputs[0], 1.0
    while (step := scaled(product)) is not None:
        product, inside = step[0], inside * step[1]
    found = _scaled_product(product, inside * factor)
    return found if isinstance(found, str) else changed(found, softcap=factor)


def _scaled_product(value: ir.Value, scale: float) -> Scores | str:
    node = producer(value, "MatMul")
    if node is None or node.inputs[0] is None or node.inputs[1] is None:
        before = value.producer()
        return f"the scores come from {before.op_type if before is not None else 'an input'}, not from a MatMul of q and kᵀ"
    return Scores(node.inputs[0], node.inputs[1], scale)


def raise_attention(graph: ir.Graph, site: AttentionSite) -> ir.Node:
    """Put the one node in place of the spelled-out computation."""
    before = site.output.producer()
    assert before is not None
    scores = site.scores
    q, q_scale = strip_scale(scores.q, before)
    k, k_scale = strip_scale(scores.k_transposed, before)
    rank = len(shape_of(q) or ())
    k = insert_value(before, "Transpose", [k], {"perm": [*range(rank - 2), rank - 1, rank - 2]})
    mask = _mask(graph, scores, before)
    if mask is not None:
        mask = full_mask(mask, q, k, before)
    values = [q, k, site.v]
    if rank == 3:
        values = [insert_value(before, "Unsqueeze", [value, new_integers(graph, 1)]) for value in values]
        mask = insert_value(before, "Unsqueeze", [mask, new_integers(graph, 1)]) if mask is not None else None
    attributes: dict[str, float | int] = {"scale": scores.scale * q_scale * k_scale}
    if scores.softcap:
        attributes["softcap"] = scores.softcap
    if scores.precision is not None and scores.precision != q.dtype:
        attributes["softmax_precision"] = int(scores.precision)
    node = insert(before, OP, [*values, mask] if mask is not None else values, attributes)
    result = node.outputs[0]
    if rank == 3:
        result = insert_value(before, "Squeeze", [result, new_integers(graph, 1)])
    replace(site.output, result)
    return node


_LAYOUT = ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Expand")


def strip_scale(value: ir.Value, before: ir.Node) -> tuple[ir.Value, float]:
    """The value without constant factors on its way, and their product; layout nodes in between are repeated."""
    step = scaled(value)
    if step is not None:
        inner, factor = strip_scale(step[0], before)
        return inner, factor * step[1]
    node = producer(value, *_LAYOUT)
    if node is None or node.inputs[0] is None:
        return value, 1.0
    inner, factor = strip_scale(node.inputs[0], before)
    if inner is node.inputs[0]:
        return value, 1.0
    return insert_value(before, node.op_type, [inner, *node.inputs[1:]], node.attributes), factor


def _mask(graph: ir.Graph, scores: Scores, before: ir.Node) -> ir.Value | None:
    """One mask for the operation: boolean when all parts are, else additive."""
    if not scores.masks:
        return None
    booleans = [_kept(mask, kind, before) for mask, kind in scores.masks if kind != "add"]
    added = [_boolean_of(mask, before) for mask, kind in scores.masks if kind == "add"]
    booleans += [mask for mask in added if mask.dtype == ir.DataType.BOOL]
    numbers = [mask for mask in added if mask.dtype != ir.DataType.BOOL]
    keep = _joined("And", booleans, before)
    bias = _joined("Add", numbers, before)
    if keep is not None and bias is not None:
        assert bias.dtype is not None
        lowest = new_scalar(graph, float(np.finfo(np.float32).min if bias.dtype == ir.DataType.FLOAT else -65504.0), bias.dtype)
        bias, keep = insert_value(before, "Where", [keep, bias, lowest]), None
    return keep if keep is not None else bias


def _kept(mask: ir.Value, kind: str, before: ir.Node) -> ir.Value:
    return mask if kind == "keep" else insert_value(before, "Not", [mask])


def _joined(op_type: str, masks: list[ir.Value], before: ir.Node) -> ir.Value | None:
    joined: ir.Value | None = None
    for mask in masks:
        joined = mask if joined is None else insert_value(before, op_type, [joined, mask])
    return joined


def _boolean_of(mask: ir.Value, before: ir.Node) -> ir.Value:
    """The condition of an additive mask `Where(keep, 0, very negative)`, also under layout nodes; else the mask itself."""
    node = mask.producer()
    if is_op(node, "Where") and node is not None:
        yes, no = scalar(node.inputs[1]), scalar(node.inputs[2])
        yes = yes if yes is not None else _expanded_number(node.inputs[1])
        no = no if no is not None else _expanded_number(node.inputs[2])
        condition = node.inputs[0]
        if condition is None or yes is None or no is None:
            return mask
        if yes == 0.0 and no <= FILLING:
            return condition
        return insert_value(before, "Not", [condition]) if no == 0.0 and yes <= FILLING else mask
    if node is not None and is_op(node, *_LAYOUT, "Cast", "Slice") and node.inputs[0] is not None:
        inner = _boolean_of(node.inputs[0], before)
        if inner.dtype == ir.DataType.BOOL:
            return inner if is_op(node, "Cast") else insert_value(before, node.op_type, [inner, *node.inputs[1:]], node.attributes)
    return mask


def full_mask(mask: ir.Value, q: ir.Value, k: ir.Value, before: ir.Node) -> ir.Value:
    """The mask expanded so that its last two axes are those of the scores: onnxruntime does not broadcast them."""
    own, queries, keys = shape_of(mask) or (), shape_of(q) or (), shape_of(k) or ()
    if len(own) >= 2 and sizes.same(own[-2], queries[-2]) and sizes.same(own[-1], keys[-2]):
        return mask
    rows = [insert_value(before, "Shape", [value], {"start": len(queries) - 2, "end": len(queries) - 1}) for value in (q, k)]
    return insert_value(before, "Expand", [mask, insert_value(before, "Concat", rows, {"axis": 0})])
