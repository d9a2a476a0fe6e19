"""Raise scaled dot-product attention to ONNX `Attention`.

Found from the softmax in both directions: forwards through casts and NaN guards to the product with v;
backwards through masks (additive, or `Where` with a very negative filling), softcap and scale to the product of
q with the transposed k. Scales on q and on k are taken into the attribute. What q, k and v went through before
(reshapes, transposes, expands) does not matter. Vaswani et al., "Attention Is All You Need", 2017, section
3.2.1.
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
from effc.ir.rewrite.sizes import Size, shape_of, shape_text

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
        lead: Batch and heads, where a `Reshape` on the way splits them; None when the scores have them as they are.
    """

    q: ir.Value
    k_transposed: ir.Value
    scale: float = 1.0
    softcap: float = 0.0
    masks: tuple[tuple[ir.Value, str], ...] = ()
    precision: ir.DataType | None = None
    lead: tuple[Size, Size] | None = None


@dataclass(frozen=True)
class AttentionSite:
    """An attention spelled out.

    Attributes:
        output: The value it ends in: `weights @ v`.
        scores: What the softmax is taken of.
        v: Values, rank 3 or 4.
        lead: Batch and heads of the scores; products may have them as one axis.
    """

    output: ir.Value
    scores: Scores
    v: ir.Value
    lead: tuple[Size, Size]


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
    lead = scores.lead or ((shape[0], shape[1]) if len(shape) == 4 else (shape[0], 1))
    for name, value in (("q", scores.q), ("k", scores.k_transposed), ("v", v)):
        own = shape_of(value) or ()
        split = len(own) == 4 or (len(own) == 3 and sizes.same(own[0], sizes.product(lead)))
        if not split or not isinstance(lead[1], int):
            return f"attention found, but {name} of shape {shape_text(own)} does not split into the heads of the scores"
    for mask, _ in scores.masks:
        if not _covers(shape_of(mask), lead):
            return f"attention found, but its mask of shape {shape_text(shape_of(mask))} does not fit batch and heads"
    return AttentionSite(output, scores, v, lead)


def _covers(mask: tuple[Size, ...] | None, lead: tuple[Size, Size]) -> bool:
    """Whether a mask is one per batch and head, or shared by them."""
    if mask is None or len(mask) > 4:
        return False
    if len(mask) == 4:
        return all(own == 1 or sizes.same(own, size) for own, size in zip(mask, lead))
    return len(mask) < 3 or mask[0] == 1 or sizes.same(mask[0], sizes.product(lead)) or sizes.same(mask[0], lead[1])


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
        if not (is_op(user, "Cast") or _is_nan_guard(user, weights) or regroups_heads(user)):
            return None
        weights = user.outputs[0]


def regroups_heads(node: ir.Node | None) -> bool:
    """Whether a `Reshape` only joins or splits batch and heads: `[batch, heads, a, b]` and `[batch * heads, a, b]`."""
    if node is None or not is_op(node, "Reshape"):
        return False
    before, after = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if before is None or after is None or {len(before), len(after)} != {3, 4}:
        return False
    return sizes.same_shape(before[-2:], after[-2:])


def _is_nan_guard(node: ir.Node, weights: ir.Value) -> bool:
    """`Where(IsNaN(p), 0, p)`: fully masked rows become 0, as the standard operation has it."""
    test = producer(node.inputs[0], "IsNaN") if is_op(node, "Where") else None
    return (
        test is not None and test.inputs[0] is weights and scalar(node.inputs[1]) == 0.0 and node.inputs[2] is weights
    )


def _scores(value: ir.Value) -> Scores | str:
    """Walk back from the input of a softmax to `q @ kᵀ`; a reason when the walk ends elsewhere."""
    node = value.producer()
    if node is None:
        return _capped(value)
    if is_op(node, "Add"):
        return _added_mask(node)
    if is_op(node, "Where"):
        return _where_mask(node)
    if is_op(node, "Cast"):
        found = _scores(node.inputs[0]) if node.inputs[0] is not None else "a Cast has no input"
        return found if isinstance(found, str) else changed(found, precision=value.dtype)
    if regroups_heads(node) and node.inputs[0] is not None:
        found = _scores(node.inputs[0])
        shape = next(s for s in (shape_of(node.inputs[0]), shape_of(value)) if s is not None and len(s) == 4)
        return found if isinstance(found, str) else changed(found, lead=(shape[0], shape[1]))
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
        source = before.op_type if before is not None else "an input"
        return f"the scores come from {source}, not from a MatMul of q and kᵀ"
    return Scores(node.inputs[0], node.inputs[1], scale)


def raise_attention(graph: ir.Graph, site: AttentionSite) -> ir.Node:
    """Put the one node in place of the spelled-out computation."""
    before = site.output.producer()
    assert before is not None
    scores = site.scores
    q, q_scale = strip_scale(scores.q, before)
    k, k_scale = strip_scale(scores.k_transposed, before)
    rank = len(shape_of(k) or ())
    k = insert_value(before, "Transpose", [k], {"perm": [*range(rank - 2), rank - 1, rank - 2]})
    q, k, v = (_split(graph, value, site.lead, before) for value in (q, k, site.v))
    mask = _mask(graph, scores, site.lead, before)
    if mask is not None:
        mask = full_mask(mask, q, k, before)
    attributes: dict[str, float | int] = {"scale": scores.scale * q_scale * k_scale}
    if scores.softcap:
        attributes["softcap"] = scores.softcap
    if scores.precision is not None and scores.precision != q.dtype:
        attributes["softmax_precision"] = int(scores.precision)
    node = insert(before, OP, [q, k, v, mask] if mask is not None else [q, k, v], attributes)
    replace(site.output, _joined_heads(graph, node.outputs[0], site.output, before))
    return node


def _split(graph: ir.Graph, value: ir.Value, lead: tuple[Size, Size], before: ir.Node) -> ir.Value:
    """`[batch * heads, a, b]` as `[batch, heads, a, b]`."""
    shape = shape_of(value)
    if shape is None or len(shape) != 3:
        return value
    if lead[1] == 1:
        return insert_value(before, "Unsqueeze", [value, new_integers(graph, 1)])
    assert isinstance(lead[1], int)
    rest = insert_value(before, "Shape", [value], {"start": 1, "end": 3})
    target = insert_value(before, "Concat", [new_integers(graph, -1, lead[1]), rest], {"axis": 0})
    return insert_value(before, "Reshape", [value, target])


def _joined_heads(graph: ir.Graph, result: ir.Value, old: ir.Value, before: ir.Node) -> ir.Value:
    """The result in the shape of the product it replaces."""
    if len(shape_of(old) or ()) == 4:
        return result
    rest = insert_value(before, "Shape", [result], {"start": 2, "end": 4})
    return insert_value(
        before, "Reshape", [result, insert_value(before, "Concat", [new_integers(graph, -1), rest], {"axis": 0})]
    )


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


def _mask(graph: ir.Graph, scores: Scores, lead: tuple[Size, Size], before: ir.Node) -> ir.Value | None:
    """One mask for the operation: boolean when all parts are, else additive."""
    if not scores.masks:
        return None
    masks = [(_split_mask(graph, mask, lead, before), kind) for mask, kind in scores.masks]
    booleans = [_kept(mask, kind, before) for mask, kind in masks if kind != "add"]
    added = [_boolean_of(mask, before) for mask, kind in masks if kind == "add"]
    booleans += [mask for mask in added if mask.dtype == ir.DataType.BOOL]
    numbers = [mask for mask in added if mask.dtype != ir.DataType.BOOL]
    keep = _joined("And", booleans, before)
    bias = _joined("Add", numbers, before)
    if keep is not None and bias is not None:
        assert bias.dtype is not None
        lowest = new_scalar(
            graph, float(np.finfo(np.float32).min if bias.dtype == ir.DataType.FLOAT else -65504.0), bias.dtype
        )
        bias, keep = insert_value(before, "Where", [keep, bias, lowest]), None
    return keep if keep is not None else bias


def _split_mask(graph: ir.Graph, mask: ir.Value, lead: tuple[Size, Size], before: ir.Node) -> ir.Value:
    """A mask of products with one axis for batch and heads, for scores that have two."""
    shape = shape_of(mask)
    if shape is None or len(shape) != 3:
        return mask
    if shape[0] == 1:
        return insert_value(before, "Unsqueeze", [mask, new_integers(graph, 1)])
    return _split(graph, mask, lead, before) if sizes.same(shape[0], sizes.product(lead)) else mask


def _kept(mask: ir.Value, kind: str, before: ir.Node) -> ir.Value:
    return mask if kind == "keep" else insert_value(before, "Not", [mask])


def _joined(op_type: str, masks: list[ir.Value], before: ir.Node) -> ir.Value | None:
    joined: ir.Value | None = None
    for mask in masks:
        joined = mask if joined is None else insert_value(before, op_type, [joined, mask])
    return joined


def _boolean_of(mask: ir.Value, before: ir.Node) -> ir.Value:
    """The condition of an additive mask `Where(keep, 0, very negative)`, also under layout nodes; else the mask."""
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
            return (
                inner
                if is_op(node, "Cast")
                else insert_value(before, node.op_type, [inner, *node.inputs[1:]], node.attributes)
            )
    return mask


def full_mask(mask: ir.Value, q: ir.Value, k: ir.Value, before: ir.Node) -> ir.Value:
    """The mask expanded so that its last two axes are those of the scores: onnxruntime does not broadcast them."""
    own, queries, keys = shape_of(mask) or (), shape_of(q) or (), shape_of(k) or ()
    if len(own) >= 2 and sizes.same(own[-2], queries[-2]) and sizes.same(own[-1], keys[-2]):
        return mask
    rows = [
        insert_value(before, "Shape", [value], {"start": len(queries) - 2, "end": len(queries) - 1}) for value in (q, k)
    ]
    return insert_value(before, "Expand", [mask, insert_value(before, "Concat", rows, {"axis": 0})])
