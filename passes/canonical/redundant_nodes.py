"""Remove nodes that change nothing, and merge neighbours that undo or repeat each other."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from effc.ir.analysis.linear import is_plain_gemm
from effc.ir.rewrite import sizes
from effc.ir.rewrite.constants import new_integers, scalar
from effc.ir.rewrite.dataflow import attribute_int, consumers, is_op, operands, permutation, producer, sole_consumer
from effc.ir.rewrite.edit import insert_value, replace
from effc.ir.rewrite.inference import infer_node, known_integers
from effc.ir.rewrite.shape_rules import axes_of, slice_bounds
from effc.ir.rewrite.sizes import shape_of
from effc.passes.canonical.shape_arithmetic import reshape_target


def remove_redundant(graph: ir.Graph) -> int:
    """Apply every rule of this file once to every node. Returns how many nodes were changed."""
    count = 0
    for node in graph:
        if node.graph is None or not any(o.uses() or o.is_graph_output() for o in node.outputs):
            continue
        for rule in RULES.get(node.op_type, ()) if node.domain in ("", "ai.onnx") else ():
            if rule(node):
                count += 1
                break
    return count


def _same_type(node: ir.Node, value: ir.Value) -> bool:
    """Whether the value could stand for the output of the node: equal type and shape."""
    out, shape = node.outputs[0], shape_of(value)
    wanted = shape_of(out)
    return value.dtype == out.dtype and shape is not None and wanted is not None and sizes.same_shape(shape, wanted)


def _bypass(node: ir.Node, value: ir.Value | None) -> bool:
    if value is None:
        return False
    replace(node.outputs[0], value, before=node)
    return True


def _identity(node: ir.Node) -> bool:
    value = node.inputs[0]
    if node.outputs[0].is_graph_output() and value is not None and not _may_be_output(value):
        return False
    return _bypass(node, value)


def _may_be_output(value: ir.Value) -> bool:
    return not (value.is_graph_input() or value.is_graph_output() or value.is_initializer())


def _dropout(node: ir.Node) -> bool:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    unused_mask = len(node.outputs) < 2 or not node.outputs[1].uses()
    return unused_mask and (training is None or scalar(training) == 0.0) and _bypass(node, node.inputs[0])


def _unchanged(node: ir.Node) -> bool:
    """A node whose output has the type and shape of its input, for operations that then do nothing."""
    value = node.inputs[0]
    if (
        value is None
        or not _same_type(node, value)
        or (node.outputs[0].is_graph_output() and not _may_be_output(value))
    ):
        return False
    return _bypass(node, value)


def _cast_like(node: ir.Node) -> bool:
    target = node.inputs[1]
    if target is None or target.dtype is None:
        return False
    return _bypass(node, insert_value(node, "Cast", [node.inputs[0]], {"to": int(target.dtype)}))


def _cast_of_cast(node: ir.Node) -> bool:
    inner = producer(node.inputs[0], "Cast")
    source = inner.inputs[0] if inner is not None else None
    if inner is None or source is None or source.dtype is None or not _widens(source.dtype, inner.outputs[0].dtype):
        return False
    return _bypass(node, insert_value(node, "Cast", [source], {"to": attribute_int(node, "to", 1)}))


def _widens(narrow: ir.DataType, wide: ir.DataType | None) -> bool:
    """Whether every value of one type is a value of the other."""
    if wide is None:
        return False
    if narrow == ir.DataType.BOOL:
        return wide != ir.DataType.BOOL
    if narrow.is_floating_point():
        return wide in (ir.DataType.FLOAT, ir.DataType.DOUBLE) and narrow.bitwidth <= wide.bitwidth
    return wide in (ir.DataType.INT64,) and narrow == ir.DataType.INT32


def _transpose(node: ir.Node) -> bool:
    order, value = permutation(node), node.inputs[0]
    if order is None or value is None:
        return False
    inner = producer(value, "Transpose")
    first = permutation(inner) if inner is not None else None
    if inner is None or first is None:
        return (order == tuple(range(len(order))) and _bypass(node, value)) or _moves_only_ones(node, value, order)
    merged = [first[axis] for axis in order]
    if merged == sorted(merged):
        return _bypass(node, inner.inputs[0])
    return _bypass(node, insert_value(node, "Transpose", [inner.inputs[0]], {"perm": merged}))


def _moves_only_ones(node: ir.Node, value: ir.Value, order: tuple[int, ...]) -> bool:
    """`Transpose` that moves nothing but axes of size 1 -> `Reshape`."""
    shape, wanted = shape_of(value), shape_of(node.outputs[0])
    if shape is None or wanted is None or value.is_initializer():
        return False
    real = [axis for axis in order if shape[axis] != 1]
    target = reshape_target(shape, wanted) if real == sorted(real) else None
    graph = node.graph
    if target is None or graph is None:
        return False
    return _bypass(node, insert_value(node, "Reshape", [value, new_integers(graph, *target)]))


def _reshape_of_view(node: ir.Node) -> bool:
    """`Reshape` of `Reshape`, `Unsqueeze` or `Squeeze` of x -> `Reshape(x)` when its target is constant."""
    inner = producer(node.inputs[0], "Reshape", "Unsqueeze", "Squeeze")
    source = inner.inputs[0] if inner is not None else None
    shape, wanted = shape_of(source), shape_of(node.outputs[0])
    if source is None or shape is None or wanted is None:
        return False
    graph = node.graph
    assert graph is not None
    if sizes.same_shape(shape, wanted):
        return _bypass(node, source)
    if _rows_for_product(node):
        return False
    target = reshape_target(shape, wanted)
    if target is None:
        return False
    return _bypass(node, insert_value(node, "Reshape", [source, new_integers(graph, *target)]))


def _reshape_to_itself(node: ir.Node) -> bool:
    """`Reshape(x)` to a constant target that keeps every axis of x, one of them given as -1."""
    shape, target = shape_of(node.inputs[0]), known_integers(node.inputs[1])
    if shape is None or target is None or len(target) != len(shape) or attribute_int(node, "allowzero", 0):
        return False
    kept = [size in (0, -1) or sizes.same(size, before) for size, before in zip(target, shape)]
    if not all(kept) or list(target).count(-1) > 1:
        return False
    value = node.inputs[0]
    return value is not None and _unchanged_operand(node, value)


def _rows_for_product(node: ir.Node) -> bool:
    """Whether a `Reshape` regroups rows for a product with a weight: the product takes any rows, so it will sink."""
    user = sole_consumer(node.outputs[0])
    before, after = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    return (
        user is not None
        and is_op(user, "MatMul", "Gemm")
        and user.inputs[0] is node.outputs[0]
        and len(shape_of(user.inputs[1]) or ()) == 2
        and bool(before and after and len(before) >= 2 and sizes.same(before[-1], after[-1]))
    )


def _unsqueeze_of_unsqueeze(node: ir.Node) -> bool:
    inner = producer(node.inputs[0], "Unsqueeze")
    shape, wanted = shape_of(inner.inputs[0]) if inner is not None else None, shape_of(node.outputs[0])
    if inner is None or shape is None or wanted is None:
        return False
    middle = len(shape_of(inner.outputs[0]) or ())
    first, second = axes_of(inner, middle), axes_of(node, len(wanted))
    if first is None or second is None:
        return False
    kept = [axis for axis in range(len(wanted)) if axis not in second]
    merged = sorted({*second, *(kept[axis] for axis in first)})
    graph = node.graph
    assert graph is not None
    return _bypass(node, insert_value(node, "Unsqueeze", [inner.inputs[0], new_integers(graph, *merged)]))


def _squeeze_of_unsqueeze(node: ir.Node) -> bool:
    inner = producer(node.inputs[0], "Unsqueeze")
    return (
        inner is not None
        and inner.inputs[0] is not None
        and _same_type(node, inner.inputs[0])
        and _bypass(node, inner.inputs[0])
    )


def _slice(node: ir.Node) -> bool:
    bounds, shape = slice_bounds(node), shape_of(node.inputs[0])
    if bounds is None or shape is None:
        return False
    whole = all(
        start == 0 and step == 1 and sizes.same(stop, shape[axis]) for axis, (start, stop, step) in bounds.items()
    )
    return whole and _bypass(node, node.inputs[0])


def _expand_before_broadcast(node: ir.Node) -> bool:
    """`op(Expand(x), y)` -> `op(x, y)` where broadcasting alone gives the same shape."""
    output = shape_of(node.outputs[0])
    if output is None:
        return False
    changed = False
    for index, value in enumerate(node.inputs):
        expand = producer(value, "Expand")
        if expand is None or expand.inputs[0] is None:
            continue
        shapes = [shape_of(other) for position, other in enumerate(node.inputs) if position != index]
        shapes.append(shape_of(expand.inputs[0]))
        result: tuple[sizes.Size, ...] = ()
        for shape in shapes:
            result = sizes.broadcast(result, shape) if shape is not None else (sizes.UNKNOWN,)
        if sizes.same_shape(result, output):
            node.replace_input_with(index, expand.inputs[0])
            changed = True
    return changed


def _neutral(*numbers: float, commutative: bool = True) -> Callable[[ir.Node], bool]:
    def rule(node: ir.Node) -> bool:
        pairs = list(operands(node))
        for value, other in pairs if commutative else pairs[:1]:
            if scalar(other) in numbers and _same_type(node, value):
                return _unchanged_operand(node, value)
        return False

    return rule


def _unchanged_operand(node: ir.Node, value: ir.Value) -> bool:
    if node.outputs[0].is_graph_output() and not _may_be_output(value):
        return False
    return _bypass(node, value)


def _single_operand(node: ir.Node) -> bool:
    return len(node.inputs) == 1 and _bypass(node, node.inputs[0])


def _split_sequence(node: ir.Node) -> bool:
    """`SplitToSequence` whose parts are all taken by constant index -> `Split`."""
    taken = consumers(node.outputs[0])
    shape = shape_of(node.inputs[0])
    if (
        shape is None
        or not taken
        or not all(is_op(one, "SequenceAt") for one in taken)
        or not attribute_int(node, "keepdims", 1)
    ):
        return False
    axis = attribute_int(node, "axis", 0) % len(shape)
    lengths, size = known_integers(node.inputs[1]) if len(node.inputs) > 1 else (1,), shape[axis]
    if lengths is None or not isinstance(size, int):
        return False
    if len(shape_of(node.inputs[1]) or ()) == 0:
        step = lengths[0]
        lengths = tuple(min(step, size - start) for start in range(0, size, step))
    places = [known_integers(one.inputs[1]) for one in taken]
    graph = node.graph
    if graph is None or sum(lengths) != size or any(place is None for place in places):
        return False
    split = ir.node("Split", [node.inputs[0], new_integers(graph, *lengths)], {"axis": axis}, num_outputs=len(lengths))
    graph.insert_before(node, split)
    infer_node(split)
    for one, place in zip(taken, places):
        assert place is not None
        replace(one.outputs[0], split.outputs[place[0] % len(lengths)])
    return True


def _gemm(node: ir.Node) -> bool:
    """`Gemm(x, W, b)` -> `MatMul(x, W) + b`, with a `Transpose` of W when `transB` says so."""
    if not is_plain_gemm(node):
        return False
    weight = node.inputs[1]
    if attribute_int(node, "transB", 0):
        weight = insert_value(node, "Transpose", [weight], {"perm": [1, 0]})
    result = insert_value(node, "MatMul", [node.inputs[0], weight])
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        result = insert_value(node, "Add", [result, node.inputs[2]])
    return _bypass(node, result)


def _gather_of_cast(node: ir.Node) -> bool:
    """`Gather(Cast(table), i)` -> `Cast(Gather(table, i))`: the rows are converted, not the table."""
    cast = producer(node.inputs[0], "Cast")
    table = cast.inputs[0] if cast is not None else None
    if cast is None or table is None or not table.is_initializer():
        return False
    rows = insert_value(node, "Gather", [table, node.inputs[1]], {"axis": attribute_int(node, "axis", 0)})
    return _bypass(node, insert_value(node, "Cast", [rows], {"to": attribute_int(cast, "to", 1)}))


_ROWWISE = {"Gelu", "Relu", "Tanh", "Sigmoid", "Erf", "LayerNormalization", "RMSNormalization", "Cast"}


def _sink_row_reshape(node: ir.Node) -> bool:
    """`op(Reshape(x))` -> `Reshape(op(x))` when the reshape only regroups rows and the op works on each row alone."""
    view = producer(node.inputs[0], "Reshape")
    if view is None or sole_consumer(view.outputs[0]) is not node or view.inputs[0] is None:
        return False
    shape, rows, result = shape_of(view.inputs[0]), shape_of(view.outputs[0]), shape_of(node.outputs[0])
    if (
        not shape
        or not rows
        or not result
        or len(shape) < 2
        or len(rows) < 2
        or len(result) != len(rows)
        or not sizes.same(shape[-1], rows[-1])
    ):
        return False
    if not _works_on_rows(node):
        return False
    inner = ir.node(node.op_type, [view.inputs[0], *node.inputs[1:]], node.attributes)
    graph = node.graph
    assert graph is not None
    target = reshape_target((*shape[:-1], result[-1]), result)
    if target is None:
        return False
    graph.insert_before(node, inner)
    infer_node(inner)
    return _bypass(node, insert_value(node, "Reshape", [inner.outputs[0], new_integers(graph, *target)]))


def _works_on_rows(node: ir.Node) -> bool:
    if is_op(node, "MatMul"):
        return len(shape_of(node.inputs[1]) or ()) == 2
    if is_op(node, "Add", "Mul"):
        return len(shape_of(node.inputs[1]) or (0, 0)) <= 1
    if is_op(node, "LayerNormalization", "RMSNormalization"):
        return attribute_int(node, "axis", -1) == -1 and len([o for o in node.outputs if o.uses()]) == 1
    return node.op_type in _ROWWISE


def _constant_first(node: ir.Node) -> bool:
    """Constants come second in commutative nodes, so that equal nodes look equal."""
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None or not first.is_initializer() or second.is_initializer():
        return False
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)
    return True


RULES: dict[str, tuple[Callable[[ir.Node], bool], ...]] = {
    "Identity": (_identity,),
    "Dropout": (_dropout,),
    "Cast": (_unchanged, _cast_of_cast),
    "CastLike": (_cast_like,),
    "Transpose": (_transpose,),
    "Reshape": (_unchanged, _reshape_to_itself, _reshape_of_view),
    "Expand": (_unchanged,),
    **dict.fromkeys(("Max", "Min", "Sum", "Mean"), (_single_operand,)),
    "Unsqueeze": (_unsqueeze_of_unsqueeze,),
    "Squeeze": (_squeeze_of_unsqueeze,),
    "Slice": (_slice,),
    "Concat": (_single_operand,),
    "SplitToSequence": (_split_sequence,),
    "Gather": (_gather_of_cast,),
    "Gemm": (_gemm,),
    "MatMul": (_sink_row_reshape,),
    "Gelu": (_sink_row_reshape,),
    "LayerNormalization": (_sink_row_reshape,),
    "RMSNormalization": (_sink_row_reshape,),
    "Add": (_neutral(0.0), _constant_first, _expand_before_broadcast, _sink_row_reshape),
    "Mul": (_neutral(1.0), _constant_first, _expand_before_broadcast, _sink_row_reshape),
    "Sub": (_neutral(0.0, commutative=False), _expand_before_broadcast),
    "Div": (_neutral(1.0, commutative=False), _expand_before_broadcast),
    "And": (_neutral(1.0), _constant_first, _expand_before_broadcast),
    "Or": (_neutral(0.0), _constant_first, _expand_before_broadcast),
    **{
        name: (_expand_before_broadcast,)
        for name in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Where")
    },
}
