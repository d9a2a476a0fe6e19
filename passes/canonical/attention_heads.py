"""Widen `Attention`: read grouped keys and values as they are, and take the cache in.

Two edits on an existing `Attention` node: keys and values repeated per query head (`repeat_kv`) are read
unrepeated, because the operation knows groups; a `Concat` of a cache input and the new keys becomes the inputs
`past_key`, `past_value` and the outputs `present_key`, `present_value`. Also brings 3-axis inputs into the
4-axis form `[batch, heads, seq, head_size]`.
"""

from __future__ import annotations

import onnx_ir as ir

from effc.ir.rewrite import sizes
from effc.ir.rewrite.constants import new_integers
from effc.ir.rewrite.dataflow import attribute_int, consumers, is_op, producer
from effc.ir.rewrite.edit import insert, insert_value, replace
from effc.ir.rewrite.inference import infer_node, known_integers
from effc.ir.rewrite.shape_rules import axes_of
from effc.ir.rewrite.sizes import shape_of


def split_heads(graph: ir.Graph, node: ir.Node) -> bool:
    """`Attention` on `[batch, seq, heads * head_size]` -> `Attention` on `[batch, heads, seq, head_size]`."""
    q, kv = attribute_int(node, "q_num_heads", 0), attribute_int(node, "kv_num_heads", 0)
    if not q or not kv or any(len(shape_of(value) or ()) != 3 for value in node.inputs[:3]):
        return False
    inputs = [_to_heads(graph, value, heads, node) for value, heads in zip(node.inputs[:3], (q, kv, kv))]
    attributes = {name: value for name, value in node.attributes.items() if name not in ("q_num_heads", "kv_num_heads")}
    new = insert(node, "Attention", [*inputs, *node.inputs[3:]], attributes, outputs=len(node.outputs))
    rows = insert_value(node, "Transpose", [new.outputs[0]], {"perm": [0, 2, 1, 3]})
    replace(node.outputs[0], insert_value(node, "Reshape", [rows, new_integers(graph, 0, 0, -1)]))
    for old, output in zip(node.outputs[1:], new.outputs[1:]):
        replace(old, output)
    return True


def _to_heads(graph: ir.Graph, value: ir.Value | None, heads: int, before: ir.Node) -> ir.Value:
    split = insert_value(before, "Reshape", [value, new_integers(graph, 0, 0, heads, -1)])
    return insert_value(before, "Transpose", [split], {"perm": [0, 2, 1, 3]})


def unrepeat_heads(graph: ir.Graph, node: ir.Node) -> bool:
    """Read k and v before they were repeated for each query head of a group."""
    k, v = _unrepeated(graph, node.inputs[1], node), _unrepeated(graph, node.inputs[2], node)
    if k is None or v is None:
        return False
    heads = [(shape_of(value) or (sizes.UNKNOWN,) * 2)[1] for value in (node.inputs[0], k, v)]
    if not sizes.same(heads[1], heads[2]) or not sizes.is_known(sizes.exact_quotient(heads[0], heads[1])):
        return False
    node.replace_input_with(1, k)
    node.replace_input_with(2, v)
    infer_node(node)
    return True


def _unrepeated(graph: ir.Graph, value: ir.Value | None, before: ir.Node) -> ir.Value | None:
    """The x `[batch, kv, seq, size]` of `Reshape(Expand([batch, kv, 1, seq, size]))`: `[batch, heads, seq, size]`."""
    view, shape = producer(value, "Reshape"), shape_of(value)
    repeat = producer(view.inputs[0], "Expand", "Tile", "Concat") if view is not None else None
    if repeat is None or repeat.inputs[0] is None or shape is None or len(shape) != 4:
        return None
    narrow, wide = shape_of(repeat.inputs[0]), shape_of(repeat.outputs[0])
    if (
        narrow is None
        or wide is None
        or len(narrow) != 5
        or len(wide) != 5
        or narrow[2] != 1
        or not _repeats_axis_2(repeat)
    ):
        return None
    unchanged = all(sizes.same(narrow[axis], wide[axis]) for axis in (0, 1, 3, 4))
    merged = (wide[0], sizes.multiply(wide[1], wide[2]), wide[3], wide[4])
    if not unchanged or not sizes.same_shape(merged, shape):
        return None
    inner = producer(repeat.inputs[0], "Unsqueeze")
    if inner is not None and axes_of(inner, 5) == (2,):
        return inner.inputs[0]
    return insert_value(before, "Squeeze", [repeat.inputs[0], new_integers(graph, 2)])


def _repeats_axis_2(node: ir.Node) -> bool:
    if node.op_type == "Concat":
        return attribute_int(node, "axis", 0) in (2, -3) and all(value is node.inputs[0] for value in node.inputs)
    if node.op_type == "Tile":
        repeats = known_integers(node.inputs[1])
        return repeats is not None and len(repeats) == 5 and all(n == 1 for axis, n in enumerate(repeats) if axis != 2)
    return True


def absorb_cache(node: ir.Node) -> str | None:
    """Take `Concat(past, new)` of keys and values in. Returns why not, or None when done or nothing is there."""
    graph = node.graph
    assert graph is not None
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        return None
    k, v = (producer(value, "Concat") for value in node.inputs[1:3])
    parts = [_cache_parts(one) for one in (k, v)]
    if k is None or v is None or parts == [None, None]:
        return None
    if parts[0] is None or parts[1] is None:
        return "attention found, but only one of keys and values is joined with a cache input"
    for one in (k, v):
        early = [user for user in consumers(one.outputs[0]) if user is not node and not _comes_after(user, node)]
        if early:
            return f"attention found, but its joined cache is read earlier by {early[0].op_type}"
    (past_k, new_k), (past_v, new_v) = parts[0], parts[1]
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    new = insert(node, "Attention", [node.inputs[0], new_k, new_v, mask, past_k, past_v], node.attributes, outputs=3)
    replace(node.outputs[0], new.outputs[0])
    replace(k.outputs[0], new.outputs[1], before=node)
    replace(v.outputs[0], new.outputs[2], before=node)
    graph.remove(node, safe=True)
    return None


def _cache_parts(node: ir.Node | None) -> tuple[ir.Value, ir.Value] | None:
    """`(past, new)` of a join of a graph input with new tokens on axis 2."""
    if node is None or len(node.inputs) != 2 or attribute_int(node, "axis", 0) not in (2, -2):
        return None
    past, new = node.inputs
    if past is None or new is None or not past.is_graph_input() or len(shape_of(past) or ()) != 4:
        return None
    return past, new


def _comes_after(user: ir.Node, node: ir.Node) -> bool:
    following = node
    graph = node.graph
    assert graph is not None
    for one in graph:
        if one is user:
            return False
        if one is following:
            return True
    return False


def is_attention(node: ir.Node) -> bool:
    """Whether this is the standard operation."""
    return is_op(node, "Attention")
