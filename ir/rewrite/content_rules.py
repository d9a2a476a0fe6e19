"""Contents of small integer values as sizes, from the contents of the inputs of one node."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from effc.ir.rewrite import sizes
from effc.ir.rewrite.dataflow import attribute_int
from effc.ir.rewrite.inference import content_of, known_integers
from effc.ir.rewrite.shape_rules import slice_bounds
from effc.ir.rewrite.sizes import Size, shape_of

Content = tuple[Size, ...] | None
_WHOLE = (ir.DataType.INT64, ir.DataType.INT32)


def _shape(node: ir.Node) -> Content:
    shape = shape_of(node.inputs[0])
    if shape is None:
        return None
    part = shape[slice(attribute_int(node, "start", 0), attribute_int(node, "end", len(shape)))]
    return part if all(sizes.is_known(size) for size in part) else None


def _size(node: ir.Node) -> Content:
    shape = shape_of(node.inputs[0])
    count = sizes.product(shape) if shape is not None else sizes.UNKNOWN
    return (count,) if sizes.is_known(count) else None


def _same(node: ir.Node) -> Content:
    return content_of(node.inputs[0]) if node.outputs[0].dtype in _WHOLE else None


def _concat(node: ir.Node) -> Content:
    parts = [content_of(value) for value in node.inputs]
    if node.outputs[0].shape is None or len(node.outputs[0].shape) != 1 or any(part is None for part in parts):
        return None
    return tuple(size for part in parts if part is not None for size in part)


def _gather(node: ir.Node) -> Content:
    content, indices = content_of(node.inputs[0]), known_integers(node.inputs[1])
    if content is None or indices is None or len(shape_of(node.inputs[0]) or ()) != 1:
        return None
    return (
        tuple(content[index] for index in indices) if all(-len(content) <= i < len(content) for i in indices) else None
    )


def _slice(node: ir.Node) -> Content:
    content, bounds = content_of(node.inputs[0]), slice_bounds(node)
    if content is None or bounds is None or len(shape_of(node.inputs[0]) or ()) != 1:
        return None
    start, stop, step = bounds.get(0, (0, len(content), 1))
    return content[start:stop:step] if isinstance(start, int) and isinstance(stop, int) else None


def _binary(operation: Callable[[Size, Size], Size]) -> Callable[[ir.Node], Content]:
    def rule(node: ir.Node) -> Content:
        if len(node.inputs) != 2:
            return None
        left, right = content_of(node.inputs[0]), content_of(node.inputs[1])
        if left is None or right is None or not (len(left) == len(right) or 1 in (len(left), len(right))):
            return None
        count = max(len(left), len(right)) if left and right else 0
        pairs = zip(left if len(left) == count else left * count, right if len(right) == count else right * count)
        result = tuple(operation(a, b) for a, b in pairs)
        return result if all(sizes.is_known(size) for size in result) else None

    return rule


def _maximum(left: Size, right: Size) -> Size:
    if isinstance(left, int) and isinstance(right, int):
        return max(left, right)
    return left if sizes.same(left, right) else sizes.UNKNOWN


def _minimum(left: Size, right: Size) -> Size:
    if isinstance(left, int) and isinstance(right, int):
        return min(left, right)
    return left if sizes.same(left, right) else sizes.UNKNOWN


def _divide(left: Size, right: Size) -> Size:
    if isinstance(left, int) and isinstance(right, int):
        return int(left / right) if right and abs(left) < 2**53 else sizes.UNKNOWN
    return sizes.exact_quotient(left, right)


def _negate(node: ir.Node) -> Content:
    content = content_of(node.inputs[0])
    return None if content is None else tuple(sizes.multiply(size, -1) for size in content)


def _product(node: ir.Node) -> Content:
    content = content_of(node.inputs[0])
    if content is None or len(node.inputs) > 1 or len(shape_of(node.inputs[0]) or ()) != 1:
        return None
    return (sizes.product(content),)


def _constant_of_shape(node: ir.Node) -> Content:
    counts = known_integers(node.inputs[0])
    value = node.attributes.get("value")
    if counts is None or value is None or value.as_tensor().dtype not in _WHOLE:
        return None
    count = sizes.product(counts)
    item = int(value.as_tensor().numpy().reshape(-1)[0])
    return (item,) * count if isinstance(count, int) and count <= 32 else None


def _where(node: ir.Node) -> Content:
    """`Where(Equal(s, t), a, b)`: decided element by element where the comparison is."""
    compare = node.inputs[0].producer() if node.inputs[0] is not None else None
    yes, no = content_of(node.inputs[1]), content_of(node.inputs[2])
    if compare is None or compare.op_type != "Equal" or yes is None or no is None:
        return None
    left, right = content_of(compare.inputs[0]), content_of(compare.inputs[1])
    if left is None or right is None:
        return None
    count = max(map(len, (left, right, yes, no)))
    columns = [part * count if len(part) == 1 else part for part in (left, right, yes, no)]
    if any(len(column) != count for column in columns):
        return None
    result = [_choose(*row) for row in zip(*columns)]
    return tuple(result) if all(sizes.is_known(size) for size in result) else None


def _choose(left: Size, right: Size, yes: Size, no: Size) -> Size:
    if sizes.same(left, right):
        return yes
    if isinstance(left, int) and isinstance(right, int):
        return no
    number, symbol = (left, right) if isinstance(left, int) else (right, left)
    bare = isinstance(symbol, ir.SymbolicDim) and symbol.value is not None and symbol.value.isidentifier()
    return no if isinstance(number, int) and number < 0 and bare else sizes.UNKNOWN


CONTENT_RULES: dict[str, Callable[[ir.Node], Content]] = {
    "Shape": _shape,
    "Size": _size,
    **dict.fromkeys(("Identity", "Cast", "CastLike", "Squeeze", "Unsqueeze", "Reshape", "Abs"), _same),
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Add": _binary(sizes.add),
    "Sub": _binary(sizes.subtract),
    "Mul": _binary(sizes.multiply),
    "Div": _binary(_divide),
    "Max": _binary(_maximum),
    "Min": _binary(_minimum),
    "Neg": _negate,
    "ReduceProd": _product,
    "ConstantOfShape": _constant_of_shape,
    "Where": _where,
}
