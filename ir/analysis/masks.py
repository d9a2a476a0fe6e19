"""What a boolean attention mask says: causal, sliding window, padding.

The expression behind the mask is interpreted over the indices of its axes. Integer values become *ramps* (a
size plus the index along one axis), comparisons of ramps become bands, and the rest of a conjunction is looked
up in a mask of tokens. Any spelling made of `Range`, arithmetic, layout nodes, comparisons, `And` and gathers
by index is understood; anything else makes the whole mask unknown, never partly known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx_ir as ir

from effc.ir.rewrite import sizes
from effc.ir.rewrite.constants import constant_array
from effc.ir.rewrite.dataflow import STANDARD, attribute_int, permutation
from effc.ir.rewrite.inference import content_of
from effc.ir.rewrite.sizes import Size, shape_of


@dataclass(frozen=True)
class Ramp:
    """An integer value `offset + index along axis`; axes count from the last (-1), None means constant."""

    offset: Size
    axis: int | None = None


@dataclass(frozen=True)
class Difference:
    """An integer value `offset + index along plus - index along minus`, or its absolute value."""

    plus: int
    minus: int
    offset: Size
    absolute: bool = False


@dataclass(frozen=True)
class Band:
    """`key index - query index <= upper` and `> lower`, for two axes counted from the last; None is unbounded."""

    query: int
    key: int
    upper: Size | None = None
    lower: Size | None = None


@dataclass(frozen=True)
class Lookup:
    """`table[index along axes[0], index along axes[1], …]` of a boolean table."""

    table: ir.Value
    axes: tuple[int, ...]


Condition = frozenset[Band | Lookup]
Meaning = Ramp | Difference | Condition | None


@dataclass(frozen=True)
class MaskMeaning:
    """A mask `[batch, 1, queries, keys]` understood completely.

    Attributes:
        upper: Query i sees keys up to `i + upper`; None when there is no such bound. Causal attention has
            `upper = keys - queries`.
        lower: Query i sees keys above `i + lower` only; None when there is no such bound.
        padding: Boolean `[batch, keys]`, true for tokens that may be seen; None when all may.
    """

    upper: Size | None
    lower: Size | None
    padding: ir.Value | None


def mask_meaning(mask: ir.Value) -> MaskMeaning | None:
    """What a boolean mask of rank 2 to 4 says; None when any part of it is not understood."""
    if mask.dtype != ir.DataType.BOOL:
        return None
    condition = _meaning(mask, {})
    if not isinstance(condition, frozenset):
        return None
    upper: Size | None = None
    lower: Size | None = None
    padding: ir.Value | None = None
    for term in condition:
        if isinstance(term, Lookup):
            if padding is not None or term.axes != (-4, -1):
                return None
            padding = term.table
            continue
        if (term.query, term.key) != (-2, -1):
            return None
        if term.upper is not None:
            if upper is not None and not sizes.same(upper, term.upper):
                return None
            upper = term.upper
        if term.lower is not None:
            if lower is not None and not sizes.same(lower, term.lower):
                return None
            lower = term.lower
    return MaskMeaning(upper, lower, padding)


def window_of(meaning: MaskMeaning) -> int | None:
    """How many keys, its own included, a query of a causal mask sees at most; None when it is not limited."""
    if meaning.upper is None or meaning.lower is None:
        return None
    width = sizes.subtract(meaning.upper, meaning.lower)
    return width if isinstance(width, int) else None


def _rank(value: ir.Value) -> int:
    return len(shape_of(value) or ())


def _meaning(value: ir.Value | None, known: dict[ir.Value, Meaning]) -> Meaning:
    if value is None:
        return None
    if value not in known:
        known[value] = None
        known[value] = _interpret(value, known)
    return known[value]


def _interpret(value: ir.Value, known: dict[ir.Value, Meaning]) -> Meaning:
    content = content_of(value)
    if content is not None and len(content) == 1:
        return Ramp(content[0])
    constant = constant_array(value)
    if constant is not None and constant.dtype == bool and constant.all():
        return frozenset()
    node = value.producer()
    rule = _RULES.get(node.op_type) if node is not None and node.domain in STANDARD else None
    meaning = rule(node, known) if rule is not None and node is not None else None
    if meaning is None and value.dtype == ir.DataType.BOOL and _rank(value) == 2:
        return frozenset({Lookup(value, (-2, -1))})
    return meaning


def _range(node: ir.Node, known: dict[ir.Value, Meaning]) -> Meaning:
    start, step = content_of(node.inputs[0]), content_of(node.inputs[2])
    return Ramp(start[0], -1) if start is not None and step == (1,) else None


def _sum(sign: int) -> Callable[[ir.Node, dict[ir.Value, Meaning]], Meaning]:
    def rule(node: ir.Node, known: dict[ir.Value, Meaning]) -> Meaning:
        left, right = _meaning(node.inputs[0], known), _meaning(node.inputs[1], known)
        if not isinstance(left, Ramp) or not isinstance(right, Ramp):
            return None
        if sign < 0 and left.axis is not None and right.axis is not None and left.axis != right.axis:
            return Difference(left.axis, right.axis, sizes.subtract(left.offset, right.offset))
        if right.axis is not None and (left.axis is not None or sign < 0):
            return None
        axis = left.axis if left.axis is not None else right.axis
        return Ramp(sizes.add(left.offset, sizes.multiply(right.offset, sign)), axis)

    return rule


def _remapped(meaning: Meaning, mapping: dict[int, int]) -> Meaning:
    """The meaning with its axes renamed; None when one of them is lost."""
    if isinstance(meaning, Ramp):
        if meaning.axis is None:
            return meaning
        return Ramp(meaning.offset, mapping[meaning.axis]) if meaning.axis in mapping else None
    if isinstance(meaning, Difference):
        if meaning.plus not in mapping or meaning.minus not in mapping:
            return None
        return replace(meaning, plus=mapping[meaning.plus], minus=mapping[meaning.minus])
    if meaning is None:
        return None
    terms: set[Band | Lookup] = set()
    for term in meaning:
        axes = term.axes if isinstance(term, Lookup) else (term.query, term.key)
        if any(axis not in mapping for axis in axes):
            return None
        new = tuple(mapping[axis] for axis in axes)
        if isinstance(term, Lookup):
            terms.add(Lookup(term.table, new))
        else:
            terms.add(Band(new[0], new[1], term.upper, term.lower))
    return frozenset(terms)


def _view(node: ir.Node, known: dict[ir.Value, Meaning]) -> Meaning:
    """`Unsqueeze`, `Squeeze`, `Expand`, or a `Reshape` that only adds or drops axes of size 1."""
    before, after = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if before is None or after is None:
        return None
    if node.op_type == "Expand":
        mapping = {-i: -i for i in range(1, len(before) + 1) if before[-i] != 1 or after[-i] == 1}
        return _remapped(_meaning(node.inputs[0], known), mapping)
    old = [axis for axis, size in enumerate(before) if size != 1]
    new = [axis for axis, size in enumerate(after) if size != 1]
    if not sizes.same_shape([before[axis] for axis in old], [after[axis] for axis in new]):
        return None
    mapping = {a - len(before): b - len(after) for a, b in zip(old, new)}
    return _remapped(_meaning(node.inputs[0], known), mapping)


def _transpose(node: ir.Node, known: dict[ir.Value, Meaning]) -> Meaning:
    order = permutation(node)
    if order is None:
        return None
    rank = len(order)
    return _remapped(_meaning(node.inputs[0], known), {source - rank: axis - rank for axis, source in enumerate(order)})


def _cast(node: ir.Node, known: dict[ir.Value, Meaning]) -> Meaning:
    target = node.outputs[0].dtype
    source = node.inputs[0].dtype if node.inputs[0] is not None else None
    if target == ir.DataType.BOOL and source != ir.DataType.BOOL:
        return None
    return (
        _meaning(node.inputs[0], known) if target in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL) else None
    )


def _compare(strict: bool, swapped: bool) -> Callable[[ir.Node, dict[ir.Value, Meaning]], Meaning]:
    """`left < right` or `left <= right`; `swapped` for the greater-than forms."""

    def rule(node: ir.Node, known: dict[ir.Value, Meaning]) -> Meaning:
        left, right = _meaning(node.inputs[0], known), _meaning(node.inputs[1], known)
        if swapped:
            left, right = right, left
        if isinstance(left, Difference) and isinstance(right, Ramp) and right.axis is None:
            return _near(left, sizes.subtract(right.offset, 1) if strict else right.offset)
        if not isinstance(left, Ramp) or not isinstance(right, Ramp):
            return None
        bound = sizes.subtract(right.offset, left.offset)
        return _band(left, right, sizes.subtract(bound, 1) if strict else bound)

    return rule


def _near(difference: Difference, bound: Size) -> Meaning:
    """`difference <= bound`: one band, or two for an absolute difference."""
    plus, minus = Ramp(0, difference.plus), Ramp(0, difference.minus)
    above = _band(plus, minus, sizes.subtract(bound, difference.offset))
    if not difference.absolute:
        return above
    below = _band(minus, plus, sizes.add(bound, difference.offset))
    return above | below if isinstance(above, frozenset) and isinstance(below, frozenset) else None


def _absolute(node: ir.Node, known: dict[ir.Value, Meaning]) -> Meaning:
    inner = _meaning(node.inputs[0], known)
    return replace(inner, absolute=True) if isinstance(inner, Difference) else None


def _band(left: Ramp, right: Ramp, bound: Size) -> Meaning:
    """`index of left - index of right <= bound`."""
    if not sizes.is_known(bound):
        return None
    if left.axis is None and isinstance(bound, int) and bound >= 0 and right.axis is not None:
        return frozenset()  # a number not above an index that starts at or above it: always true
    if left.axis is None or right.axis is None or left.axis == right.axis:
        return None
    if left.axis > right.axis:
        return frozenset({Band(right.axis, left.axis, upper=bound)})
    return frozenset({Band(left.axis, right.axis, lower=sizes.subtract(sizes.multiply(bound, -1), 1))})


def _and(node: ir.Node, known: dict[ir.Value, Meaning]) -> Meaning:
    left, right = _meaning(node.inputs[0], known), _meaning(node.inputs[1], known)
    return left | right if isinstance(left, frozenset) and isinstance(right, frozenset) else None


def _not(node: ir.Node, known: dict[ir.Value, Meaning]) -> Meaning:
    inner = _meaning(node.inputs[0], known)
    if not isinstance(inner, frozenset) or len(inner) != 1:
        return None
    (term,) = inner
    if isinstance(term, Lookup) or (term.upper is None) == (term.lower is None):
        return None
    return frozenset({Band(term.query, term.key, upper=term.lower, lower=term.upper)})


def _gather_nd(node: ir.Node, known: dict[ir.Value, Meaning]) -> Meaning:
    """A table looked up at indices that are ramps from zero: `table[axis a, axis b]`."""
    table, indices = node.inputs[0], node.inputs[1]
    parts = indices.producer() if indices is not None else None
    if table is None or table.dtype != ir.DataType.BOOL or attribute_int(node, "batch_dims", 0) or parts is None:
        return None
    rank = _rank(node.outputs[0])
    if (
        parts.op_type != "Concat"
        or attribute_int(parts, "axis", 0) not in (-1, rank)
        or len(parts.inputs) != _rank(table)
    ):
        return None
    axes = []
    for axis, part in enumerate(parts.inputs):
        ramp = _meaning(part, known)
        sizes_match = _covers(part, ramp, (shape_of(table) or ())[axis]) if isinstance(ramp, Ramp) else False
        if not isinstance(ramp, Ramp) or ramp.axis is None or ramp.offset != 0 or not sizes_match:
            return None
        axes.append(ramp.axis + 1)
    return frozenset({Lookup(table, tuple(axes))}) if len(set(axes)) == len(axes) else None


def _covers(part: ir.Value | None, ramp: Ramp, size: Size) -> bool:
    shape = shape_of(part)
    return shape is not None and ramp.axis is not None and sizes.same(shape[ramp.axis], size)


_RULES: dict[str, Callable[[ir.Node, dict[ir.Value, Meaning]], Meaning]] = {
    "Range": _range,
    "Add": _sum(1),
    "Sub": _sum(-1),
    **dict.fromkeys(("Unsqueeze", "Squeeze", "Expand", "Reshape"), _view),
    "Transpose": _transpose,
    "Cast": _cast,
    "Identity": lambda node, known: _meaning(node.inputs[0], known),
    "LessOrEqual": _compare(strict=False, swapped=False),
    "Less": _compare(strict=True, swapped=False),
    "GreaterOrEqual": _compare(strict=False, swapped=True),
    "Greater": _compare(strict=True, swapped=True),
    "And": _and,
    "Not": _not,
    "Abs": _absolute,
    "GatherND": _gather_nd,
}
