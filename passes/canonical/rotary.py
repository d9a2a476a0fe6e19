"""Raise rotary position embedding to ONNX `RotaryEmbedding`.

Both spellings of the rotation are found from the sum outwards: `x * cos + rotated(x) * sin` where `rotated(x)` is
`Concat(-second half, first half)` (halves) or the stack of `-odd, even` elements (interleaved). A rotation of the
first elements only, joined with the rest by `Concat`, becomes the attribute `rotary_embedding_dim`.
The caches become `[batch, seq, head_size / 2]`: the half whose repetition (`Concat(f, f)` under elementwise
nodes) is proven. Su et al., "RoFormer", 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as changed

import onnx_ir as ir

from effc.ir.rewrite.constants import new_integers, scalar
from effc.ir.rewrite.dataflow import attribute_int, is_op, operands, producer, sole_consumer
from effc.ir.rewrite.edit import insert, insert_value, replace
from effc.ir.rewrite.shape_rules import axes_of, slice_bounds
from effc.ir.rewrite.sizes import Size, same, same_shape, shape_of, shape_text

OP = "RotaryEmbedding"


@dataclass(frozen=True)
class RotarySite:
    """A rotation spelled out.

    Attributes:
        output: The value the raised node will compute.
        x: `[batch, heads, seq, head_size]`, or `[batch, seq, heads, head_size]` when `heads_last` says so.
        cos: Full-width cosines, one row per token shared by all heads, of repeated halves (or pairs when
            interleaved).
        sin: Same for the sines.
        width: How many leading elements of a head are rotated.
        interleaved: Whether neighbours form the pairs instead of halves.
        heads_last: Whether tokens come before heads in x.
    """

    output: ir.Value
    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    width: int
    interleaved: bool
    heads_last: bool


def match_rotary(node: ir.Node) -> RotarySite | str | None:
    """The rotation a sum is the end of; a reason when it comes close; None when it is something else."""
    if not is_op(node, "Add"):
        return None
    for straight, turned in operands(node):
        found = _rotation(straight, turned)
        if found is None:
            continue
        x, cos, sin, interleaved = found
        shape = shape_of(x)
        if shape is None or len(shape) != 4 or not isinstance(shape[3], int):
            return f"rotation found, but x has shape {shape_text(shape)}, not [batch, heads, seq, head_size]"
        reasons: list[str] = []
        for heads_last in (False, True):
            unfit = [_unfit(table, shape, interleaved, heads_last) for table in (cos, sin)]
            if unfit == [None, None]:
                return _widened(RotarySite(node.outputs[0], x, cos, sin, shape[3], interleaved, heads_last))
            reasons += [reason for reason in unfit if reason is not None]
        return reasons[0]
    return None


def _rotation(straight: ir.Value, turned: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value, bool] | None:
    """`(x, cos, sin, interleaved)` when `straight = x * cos` and `turned = rotated(x) * sin`."""
    left, right = producer(straight, "Mul"), producer(turned, "Mul")
    if left is None or right is None:
        return None
    for rotated, sin in operands(right):
        for rotation, interleaved in ((_halves, False), (_pairs, True)):
            x = rotation(rotated)
            for operand, cos in operands(left):
                if x is not None and operand is x:
                    return x, cos, sin, interleaved
    return None


def _halves(value: ir.Value) -> ir.Value | None:
    """The x of `Concat(-x[half:], x[:half])` on the last axis."""
    node = producer(value, "Concat")
    shape = shape_of(value)
    if (
        node is None
        or shape is None
        or len(node.inputs) != 2
        or attribute_int(node, "axis", 0) % len(shape) != len(shape) - 1
    ):
        return None
    negated = producer(node.inputs[0], "Neg")
    second = _part(negated.inputs[0]) if negated is not None else None
    first = _part(node.inputs[1])
    width = shape[-1]
    if first is None or second is None or first[0] is not second[0] or not isinstance(width, int):
        return None
    return first[0] if first[1:] == (0, width // 2, 1) and second[1:] == (width // 2, width, 1) else None


def _part(value: ir.Value | None) -> tuple[ir.Value, Size, Size, int] | None:
    """`(x, start, stop, step)` of a slice of the last axis, spelled `Slice` or an output of `Split`."""
    node = value.producer() if value is not None else None
    if node is None or value is None or node.inputs[0] is None:
        return None
    rank = len(shape_of(node.inputs[0]) or ())
    if is_op(node, "Slice"):
        bounds = slice_bounds(node)
        if bounds is None or set(bounds) != {rank - 1}:
            return None
        return (node.inputs[0], *bounds[rank - 1])
    if is_op(node, "Split") and attribute_int(node, "axis", 0) % max(rank, 1) == rank - 1:
        widths = [(shape_of(output) or (None,))[-1] for output in node.outputs]
        if all(isinstance(width, int) for width in widths):
            start = sum(width for width in widths[: value.index()] if isinstance(width, int))
            width = widths[value.index() or 0]
            assert isinstance(width, int)
            return node.inputs[0], start, start + width, 1
    return None


def _pairs(value: ir.Value) -> ir.Value | None:
    """The x of `stack(-x[1::2], x[0::2], axis=-1)` flattened."""
    view = producer(value, "Reshape")
    stack = producer(view.inputs[0], "Concat") if view is not None else None
    shape = shape_of(value)
    if stack is None or shape is None or len(stack.inputs) != 2 or not isinstance(shape[-1], int):
        return None
    if attribute_int(stack, "axis", 0) % (len(shape) + 1) != len(shape):
        return None
    lifted = [_unsqueezed_last(part) for part in stack.inputs]
    negated = producer(lifted[0], "Neg")
    odd = _part(negated.inputs[0]) if negated is not None else None
    even = _part(lifted[1])
    if odd is None or even is None or odd[0] is not even[0]:
        return None
    return even[0] if even[1:] == (0, shape[-1], 2) and odd[1:] == (1, shape[-1], 2) else None


def _unsqueezed_last(value: ir.Value | None) -> ir.Value | None:
    node = producer(value, "Unsqueeze")
    rank = len(shape_of(value) or ())
    return node.inputs[0] if node is not None and axes_of(node, rank) == (rank - 1,) else None


def _unfit(table: ir.Value, x_shape: tuple[Size, ...], interleaved: bool, heads_last: bool) -> str | None:
    """Why a table of cosines or sines does not fit the standard operation; None when it does."""
    shape = shape_of(table)
    if shape is None or len(shape) not in (2, 3, 4):
        return f"rotation found, but its table has shape {shape_text(shape)}"
    padded = (1,) * (4 - len(shape)) + shape
    heads, tokens = (2, 1) if heads_last else (1, 2)
    if padded[heads] != 1 or not same(padded[3], x_shape[3]) or not same(padded[tokens], x_shape[tokens]):
        return f"rotation found, but its table of shape {shape_text(shape)} is not one row per token for all heads"
    if not (padded[0] == 1 or same(padded[0], x_shape[0])):
        return f"rotation found, but its table of shape {shape_text(shape)} has another batch size"
    return (
        None
        if _repetition(table, interleaved) is not None
        else "rotation found, but its table is not proven to repeat its half"
    )


_UNARY = ("Cos", "Sin", "Cast", "Neg")
Builder = Callable[[ir.Node], ir.Value]


def _repetition(table: ir.Value, interleaved: bool) -> Builder | None:
    """How to build the half of a table; None when its halves (pairs) are not proven equal."""
    repeated = _is_repeat(table, interleaved)
    if repeated is not None:
        return repeated
    node = table.producer()
    if node is None or not node.inputs or node.inputs[0] is None:
        return None
    if is_op(node, *_UNARY):
        return _repeated(node, _repetition(node.inputs[0], interleaved))
    if is_op(node, "Mul"):
        for operand, other in operands(node):
            inner = _repetition(operand, interleaved) if scalar(other) is not None else None
            if inner is not None:
                return _repeated(node, inner, other)
        return None
    rank = len(shape_of(node.outputs[0]) or ())
    if not is_op(node, "Unsqueeze") or (axes_of(node, rank) or (rank - 1,))[-1] == rank - 1:
        return None
    return _repeated(node, _repetition(node.inputs[0], interleaved), node.inputs[1])


def _repeated(node: ir.Node, inner: Builder | None, *rest: ir.Value | None) -> Builder | None:
    """The node once more, over what `inner` builds."""
    if inner is None:
        return None
    build = inner
    return lambda before: insert_value(before, node.op_type, [build(before), *rest], node.attributes)


def _is_repeat(value: ir.Value, interleaved: bool) -> Builder | None:
    """The f of `Concat(f, f)` on the last axis, or of its elements doubled one by one when interleaved."""
    shape = shape_of(value)
    if shape is None:
        return None
    if interleaved:
        return _doubled(value, len(shape))
    node = producer(value, "Concat")
    if node is None or len(node.inputs) != 2 or attribute_int(node, "axis", 0) % len(shape) != len(shape) - 1:
        return None
    half = node.inputs[0]
    return (lambda before: half) if half is not None and half is node.inputs[1] else None


def _doubled(value: ir.Value, rank: int) -> Builder | None:
    """The f of f with a new last axis, that axis twice (`Concat`, `Expand`, `Tile`), and the last two flattened."""
    view = producer(value, "Reshape")
    twice = producer(view.inputs[0], "Concat", "Expand", "Tile") if view is not None else None
    lifted = producer(twice.inputs[0], "Unsqueeze") if twice is not None else None
    if twice is None or lifted is None or lifted.inputs[0] is None:
        return None
    narrow, wide = shape_of(twice.inputs[0]), shape_of(twice.outputs[0])
    axes = axes_of(lifted, rank + 1)
    if narrow is None or wide is None or axes is None or rank not in axes or not same_shape((*narrow[:-1], 2), wide):
        return None
    if twice.op_type == "Concat" and any(part is not twice.inputs[0] for part in twice.inputs):
        return None
    half, others, graph = lifted.inputs[0], [axis for axis in axes if axis != rank], lifted.graph
    if not others or graph is None:
        return lambda before: half
    return lambda before: insert_value(before, "Unsqueeze", [half, new_integers(graph, *others)])


def _widened(site: RotarySite) -> RotarySite:
    """Take in the elements that pass unrotated: `Concat(rotation of x[:w], x[w:])` is one partial rotation of x."""
    joined = sole_consumer(site.output)
    part = _part(site.x)
    if (
        joined is None
        or part is None
        or not is_op(joined, "Concat")
        or len(joined.inputs) != 2
        or joined.inputs[0] is not site.output
    ):
        return site
    rest = _part(joined.inputs[1])
    whole, shape = part[0], shape_of(part[0])
    out = shape_of(joined.outputs[0])
    if rest is None or rest[0] is not whole or shape is None or out is None or not same_shape(shape, out):
        return site
    if part[1:] != (0, site.width, 1) or rest[1:] != (site.width, shape[-1], 1):
        return site
    return changed(site, output=joined.outputs[0], x=whole)


def raise_rotary(graph: ir.Graph, site: RotarySite) -> None:
    """Put the one node in place of the spelled-out rotation."""
    before = site.output.producer()
    assert before is not None
    cos, sin = (_half_table(graph, table, site, before) for table in (site.cos, site.sin))
    attributes: dict[str, int] = {"interleaved": int(site.interleaved)}
    x_shape = shape_of(site.x)
    if x_shape is not None and x_shape[-1] != site.width:
        attributes["rotary_embedding_dim"] = site.width
    x = _swapped(site.x, before) if site.heads_last else site.x
    result = insert(before, OP, [x, cos, sin], attributes).outputs[0]
    replace(site.output, _swapped(result, before) if site.heads_last else result)


def _swapped(value: ir.Value, before: ir.Node) -> ir.Value:
    return insert_value(before, "Transpose", [value], {"perm": [0, 2, 1, 3]})


def _half_table(graph: ir.Graph, table: ir.Value, site: RotarySite, before: ir.Node) -> ir.Value:
    """The table as `[batch, seq, width / 2]`."""
    build = _repetition(table, site.interleaved)
    assert build is not None
    half = build(before)
    shape, x_shape = shape_of(half), shape_of(site.x)
    assert shape is not None and x_shape is not None
    if len(shape) == 4:
        half = insert_value(before, "Squeeze", [half, new_integers(graph, 2 if site.heads_last else 1)])
    elif len(shape) == 2:
        half = insert_value(before, "Unsqueeze", [half, new_integers(graph, 0)])
    rows = shape_of(half)
    assert rows is not None
    if not same(rows[0], x_shape[0]):
        target = insert_value(
            before,
            "Concat",
            [insert_value(before, "Shape", [site.x], {"start": 0, "end": 1}), new_integers(graph, 1, 1)],
            {"axis": 0},
        )
        half = insert_value(before, "Expand", [half, target])
    return half
