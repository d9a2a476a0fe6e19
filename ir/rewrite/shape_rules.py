"""Types and shapes of the outputs of one node, for the operations whose symbolic sizes matter.

Each rule sets its outputs and returns True, or returns False to leave the node to the `onnx` package.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from effc.ir.rewrite import sizes
from effc.ir.rewrite.dataflow import attribute_int, permutation
from effc.ir.rewrite.inference import content_of, known_integers, set_type
from effc.ir.rewrite.sizes import Size, shape_of

Rule = Callable[[ir.Node], bool]
INT64_MAX = 2**63 - 1


def _first(node: ir.Node) -> tuple[ir.DataType | None, tuple[Size, ...] | None]:
    value = node.inputs[0] if node.inputs else None
    return (None, None) if value is None else (value.dtype, shape_of(value))


def _like_input(node: ir.Node) -> bool:
    dtype, shape = _first(node)
    if shape is None:
        return False
    return set_type(node.outputs[0], dtype, shape)


def _boolean_like_input(node: ir.Node) -> bool:
    _, shape = _first(node)
    return shape is not None and set_type(node.outputs[0], ir.DataType.BOOL, shape)


def _cast(node: ir.Node) -> bool:
    _, shape = _first(node)
    return shape is not None and set_type(node.outputs[0], ir.DataType(attribute_int(node, "to", 1)), shape)


def _cast_like(node: ir.Node) -> bool:
    _, shape = _first(node)
    target = node.inputs[1]
    if shape is None or target is None or target.dtype is None:
        return False
    return set_type(node.outputs[0], target.dtype, shape)


def _elementwise(node: ir.Node) -> bool:
    return _broadcast_all(node, node.inputs[0].dtype if node.inputs[0] is not None else None, list(node.inputs))


def _comparison(node: ir.Node) -> bool:
    return _broadcast_all(node, ir.DataType.BOOL, list(node.inputs))


def _where(node: ir.Node) -> bool:
    return _broadcast_all(node, node.inputs[1].dtype if node.inputs[1] is not None else None, list(node.inputs))


def _broadcast_all(node: ir.Node, dtype: ir.DataType | None, values: list[ir.Value | None]) -> bool:
    result: tuple[Size, ...] = ()
    for value in values:
        shape = shape_of(value)
        if shape is None:
            return False
        result = sizes.broadcast(result, shape)
    return set_type(node.outputs[0], dtype, result)


def _shape(node: ir.Node) -> bool:
    _, shape = _first(node)
    if shape is None:
        return False
    return set_type(node.outputs[0], ir.DataType.INT64, (len(_shape_slice(node, shape)),))


def _shape_slice(node: ir.Node, shape: tuple[Size, ...]) -> tuple[Size, ...]:
    return shape[slice(attribute_int(node, "start", 0), attribute_int(node, "end", len(shape)))]


def _transpose(node: ir.Node) -> bool:
    dtype, shape = _first(node)
    order = permutation(node)
    if shape is None or order is None:
        return False
    return set_type(node.outputs[0], dtype, tuple(shape[axis] for axis in order))


def _reshape(node: ir.Node) -> bool:
    dtype, shape = _first(node)
    wanted = content_of(node.inputs[1])
    if wanted is None:
        return False
    if shape is None:
        return set_type(node.outputs[0], dtype, tuple(sizes.UNKNOWN if size in (0, -1) else size for size in wanted))
    target = [_copied(size, index, shape, node) for index, size in enumerate(wanted)]
    if -1 in target:
        place = target.index(-1)
        rest = sizes.product(size for index, size in enumerate(target) if index != place)
        target[place] = sizes.exact_quotient(sizes.product(shape), rest)
    return set_type(node.outputs[0], dtype, target)


def _copied(size: Size, index: int, shape: tuple[Size, ...], node: ir.Node) -> Size:
    if size != 0 or attribute_int(node, "allowzero", 0):
        return size
    return shape[index] if index < len(shape) else sizes.UNKNOWN


def _expand(node: ir.Node) -> bool:
    dtype, shape = _first(node)
    wanted = content_of(node.inputs[1])
    if shape is None or wanted is None:
        return False
    return set_type(node.outputs[0], dtype, sizes.broadcast(shape, wanted))


def axes_of(node: ir.Node, rank: int, index: int = 1) -> tuple[int, ...] | None:
    """Non-negative axes from an input or the `axes` attribute; None when not constant."""
    attribute = node.attributes.get("axes")
    if attribute is not None:
        axes: tuple[int, ...] | None = tuple(attribute.as_ints())
    else:
        axes = known_integers(node.inputs[index]) if len(node.inputs) > index else None
    return None if axes is None else tuple(axis % rank if rank else axis for axis in axes)


def _unsqueeze(node: ir.Node) -> bool:
    dtype, shape = _first(node)
    raw = known_integers(node.inputs[1])
    if shape is None or raw is None:
        return False
    rank = len(shape) + len(raw)
    new, rest = {axis % rank for axis in raw}, iter(shape)
    return set_type(node.outputs[0], dtype, [1 if axis in new else next(rest) for axis in range(rank)])


def _squeeze(node: ir.Node) -> bool:
    dtype, shape = _first(node)
    if shape is None:
        return False
    if len(node.inputs) < 2 or node.inputs[1] is None:
        if not all(isinstance(size, int) for size in shape):
            return False
        return set_type(node.outputs[0], dtype, [size for size in shape if size != 1])
    axes = axes_of(node, len(shape))
    if axes is None:
        return False
    return set_type(node.outputs[0], dtype, [size for axis, size in enumerate(shape) if axis not in axes])


def _concat(node: ir.Node) -> bool:
    shapes = [shape_of(value) for value in node.inputs]
    known = [shape for shape in shapes if shape is not None]
    if len(known) != len(shapes) or not known:
        return False
    axis = attribute_int(node, "axis", 0) % len(known[0])
    result = [next((s[i] for s in known if sizes.is_known(s[i])), sizes.UNKNOWN) for i in range(len(known[0]))]
    total: Size = 0
    for shape in known:
        total = sizes.add(total, shape[axis])
    result[axis] = total
    return set_type(node.outputs[0], node.inputs[0].dtype if node.inputs[0] else None, result)


def _slice(node: ir.Node) -> bool:
    dtype, shape = _first(node)
    bounds = slice_bounds(node) or _bounds_inside(node)
    if shape is None or bounds is None:
        return False
    result = list(shape)
    for axis, (start, stop, step) in bounds.items():
        result[axis] = _slice_size(start, stop, step)
    return set_type(node.outputs[0], dtype, result)


def _bounds_inside(node: ir.Node) -> dict[int, tuple[Size, Size, int]] | None:
    """Symbolic bounds of one axis of plain length (rows of a table), taken to lie inside it.

    A table too short for a sequence makes the model fail at run time, before and after any rewriting.
    """
    _, shape = _first(node)
    starts, stops = content_of(node.inputs[1]), content_of(node.inputs[2])
    if shape is None or starts is None or stops is None or len(starts) != 1 or len(node.inputs) < 4:
        return None
    axes = axes_of(node, len(shape), 3)
    steps = known_integers(node.inputs[4]) if len(node.inputs) > 4 else (1,)
    if axes is None or steps != (1,) or not isinstance(shape[axes[0]], int):
        return None
    inside = all(not isinstance(size, int) or size >= 0 for size in (starts[0], stops[0]))
    symbolic = isinstance(stops[0], ir.SymbolicDim) and sizes.is_known(stops[0])
    return {axes[0]: (starts[0], stops[0], 1)} if inside and symbolic else None


def _slice_size(start: Size, stop: Size, step: int) -> Size:
    length = sizes.subtract(stop, start)
    if step == 1:
        return max(length, 0) if isinstance(length, int) else length
    if step > 1:
        return sizes.divide(sizes.add(length, step - 1), step)
    return sizes.UNKNOWN


def slice_bounds(node: ir.Node) -> dict[int, tuple[Size, Size, int]] | None:
    """`axis -> (start, stop, step)` of a `Slice`, with start and stop counted from the front; None when unknown.

    A symbolic bound is accepted only where clamping provably changes nothing.
    """
    _, shape = _first(node)
    starts, stops = content_of(node.inputs[1]), content_of(node.inputs[2])
    if shape is None or starts is None or stops is None:
        return None
    axes = (
        axes_of(node, len(shape), 3)
        if len(node.inputs) > 3 and node.inputs[3] is not None
        else tuple(range(len(starts)))
    )
    steps = (
        known_integers(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else (1,) * len(starts)
    )
    if axes is None or steps is None:
        return None
    bounds = {}
    for axis, start, stop, step in zip(axes, starts, stops, steps):
        front, back = _bound(start, shape[axis]), _bound(stop, shape[axis])
        if step <= 0 or front is None or back is None:
            return None
        bounds[axis] = (front, back, step)
    return bounds


def _bound(bound: Size, size: Size) -> Size | None:
    if isinstance(bound, int):
        if bound == 0:
            return 0
        if bound >= INT64_MAX >> 32:
            return size if sizes.is_known(size) else None
        if isinstance(size, int):
            return min(max(bound + size if bound < 0 else bound, 0), size)
        return None
    return bound if sizes.same(bound, size) else None


def _gather(node: ir.Node) -> bool:
    dtype, shape = _first(node)
    indices = shape_of(node.inputs[1])
    if shape is None or indices is None:
        return False
    axis = attribute_int(node, "axis", 0) % len(shape)
    return set_type(node.outputs[0], dtype, (*shape[:axis], *indices, *shape[axis + 1 :]))


def _matmul(node: ir.Node) -> bool:
    dtype, left = _first(node)
    right = shape_of(node.inputs[1])
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return False
    batch = sizes.broadcast(left[:-2], right[:-2])
    return set_type(node.outputs[0], dtype, (*batch, left[-2], right[-1]))


def _reduce(node: ir.Node) -> bool:
    dtype, shape = _first(node)
    if shape is None or (
        len(node.inputs) > 1 and node.inputs[1] is not None and known_integers(node.inputs[1]) is None
    ):
        return False
    axes = axes_of(node, len(shape)) or ()
    if not axes and attribute_int(node, "noop_with_empty_axes", 0):
        return set_type(node.outputs[0], dtype, shape)
    axes = axes or tuple(range(len(shape)))
    keep = attribute_int(node, "keepdims", 1)
    return set_type(
        node.outputs[0], dtype, [1 if a in axes else s for a, s in enumerate(shape) if keep or a not in axes]
    )


def _range(node: ir.Node) -> bool:
    start, stop, step = (content_of(value) for value in node.inputs)
    if start is None or stop is None or step != (1,):
        return False
    return set_type(
        node.outputs[0], node.inputs[0].dtype if node.inputs[0] else None, (sizes.subtract(stop[0], start[0]),)
    )


def _constant_of_shape(node: ir.Node) -> bool:
    wanted = content_of(node.inputs[0])
    value = node.attributes.get("value")
    dtype = ir.DataType.FLOAT if value is None else value.as_tensor().dtype
    return wanted is not None and set_type(node.outputs[0], dtype, wanted)


def _split(node: ir.Node) -> bool:
    dtype, shape = _first(node)
    if shape is None:
        return False
    axis = attribute_int(node, "axis", 0) % len(shape)
    lengths = content_of(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if lengths is None:
        part = sizes.exact_quotient(shape[axis], len(node.outputs))
        if not sizes.is_known(part):
            return False
        lengths = (part,) * len(node.outputs)
    for output, length in zip(node.outputs, lengths):
        set_type(output, dtype, (*shape[:axis], length, *shape[axis + 1 :]))
    return True


def _tile(node: ir.Node) -> bool:
    dtype, shape = _first(node)
    repeats = content_of(node.inputs[1])
    if shape is None or repeats is None:
        return False
    return set_type(node.outputs[0], dtype, [sizes.multiply(size, times) for size, times in zip(shape, repeats)])


def _attention(node: ir.Node) -> bool:
    shapes = [shape_of(value) for value in node.inputs[:3]]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return False
    q, k, v = (shape for shape in shapes if shape is not None)
    past = shape_of(node.inputs[4]) if len(node.inputs) > 4 else None
    total = sizes.add(past[2], k[2]) if past is not None else k[2]
    dtype = node.inputs[0].dtype if node.inputs[0] else None
    wanted = [(*q[:3], v[3]), (*k[:2], total, k[3]), (*v[:2], total, v[3]), (*q[:3], total)]
    for output, shape in zip(node.outputs, wanted):
        set_type(output, dtype, shape)
    return True


_LIKE_INPUT = [
    "Identity",
    "Abs",
    "Neg",
    "Exp",
    "Log",
    "Sqrt",
    "Reciprocal",
    "Sin",
    "Cos",
    "Tan",
    "Tanh",
    "Sigmoid",
    "Erf",
    "Relu",
    "Gelu",
    "Swish",
    "Mish",
    "Softplus",
    "LeakyRelu",
    "Elu",
    "HardSigmoid",
    "HardSwish",
    "Floor",
    "Ceil",
    "Round",
    "Sign",
    "Not",
    "Softmax",
    "LogSoftmax",
    "Clip",
    "CumSum",
    "Trilu",
    "Dropout",
    "BitwiseNot",
    "LayerNormalization",
    "RMSNormalization",
    "RotaryEmbedding",
    "ScatterND",
    "ScatterElements",
]
_ELEMENTWISE = [
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Mod",
    "Max",
    "Min",
    "Mean",
    "Sum",
    "And",
    "Or",
    "Xor",
    "BitwiseAnd",
    "BitwiseOr",
    "PRelu",
]
_COMPARISON = ["Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"]
_REDUCE = ["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSumSquare", "ReduceL2", "ReduceL1"]

SHAPE_RULES: dict[str, Rule] = {
    **dict.fromkeys(_LIKE_INPUT, _like_input),
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_COMPARISON, _comparison),
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(("IsNaN", "IsInf"), _boolean_like_input),
    "Where": _where,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Shape": _shape,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Expand": _expand,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _gather,
    "MatMul": _matmul,
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "Split": _split,
    "Tile": _tile,
    "Attention": _attention,
}
