"""Lowers cached attention to onnxruntime's GroupQueryAttention, which appends to its cache in place.

The operator takes and gives [batch, seq, heads * size], an additive mask, and a cache whose length axis is a
capacity: the true length comes from `attention_mask`. With past and present bound to one buffer, a step writes
its new rows and copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from effc.ir.program import Program, Task
from onnx_ir.tape import Tape

CONTRIB = "com.microsoft"


def lower_cached_attention(program: Program) -> bool:
    """Lower every cached attention of a causal language model, or none.

    Returns:
        Whether the cache is now in place: all cache tensors belong to lowered nodes.
    """
    graph = program.graph
    nodes = [node for node in graph if node.op_type == "Attention" and node.domain == ""]
    if program.task != Task.CAUSAL_LM or not all(_fits(node) for node in nodes):
        return False
    inputs = {value.name: value for value in graph.inputs}
    cached = {value for node in nodes for value in node.inputs[4:6]}
    pairs = program.cache_pairs()
    if not pairs or {past for past, _ in pairs} != cached or not {"input_ids", "attention_mask"} <= inputs.keys():
        return False
    presents = {value for node in nodes for value in node.outputs[1:3]}
    if {present for _, present in pairs} != presents:
        return False
    lengths = _Lengths(graph, inputs["input_ids"], inputs["attention_mask"])
    for tensor in (*cached, *presents):
        lengths.replace_shapes_of(tensor)
    biases: dict[ir.Value | None, ir.Value] = {}
    for node in nodes:
        _lower(node, lengths, biases)
    program.model.opset_imports[CONTRIB] = 1
    return True


def _fits(node: ir.Node) -> bool:
    """Whether GroupQueryAttention computes the same: fp32, equal head sizes, a past, no further outputs."""
    if len(node.inputs) < 6 or any(node.inputs[index] is None for index in (0, 1, 2, 4, 5)):
        return False
    if len(node.outputs) < 3 or any(output.uses() for output in node.outputs[3:]):
        return False
    if node.attributes.get_int("qk_matmul_output_mode", 0) or (len(node.inputs) > 6 and node.inputs[6] is not None):
        return False
    heads, kv_heads, key_size, value_size = _heads(node)
    if not heads or not kv_heads or key_size is None or key_size != value_size:
        return False
    mask = node.inputs[3]
    mask_fits = mask is None or (mask.shape is not None and len(mask.shape) in (2, 4))
    return mask_fits and all(value is None or value.dtype == ir.DataType.FLOAT for value in node.inputs[:3])


def _heads(node: ir.Node) -> tuple[int, int, int | None, int | None]:
    """(query heads, key/value heads, key head size, value head size) of a node; sizes from the cache tensors."""
    past_key, past_value, query = node.inputs[4], node.inputs[5], node.inputs[0]
    sizes = [
        value.shape[3] if value is not None and value.shape is not None else None for value in (past_key, past_value)
    ]
    key_size, value_size = (size if isinstance(size, int) else None for size in sizes)
    kv_heads = past_key.shape[1] if past_key is not None and past_key.shape is not None else 0
    heads = node.attributes.get_int("q_num_heads", 0)
    if not heads and query is not None and query.shape is not None and len(query.shape) == 4:
        heads = query.shape[1] if isinstance(query.shape[1], int) else 0
    return heads, kv_heads if isinstance(kv_heads, int) else 0, key_size, value_size


class _Lengths:
    """Sizes of the running step, all derived from the token inputs and never from the cache tensors."""

    def __init__(self, graph: ir.Graph, input_ids: ir.Value, attention_mask: ir.Value) -> None:
        self.graph = graph
        tape = Tape()
        self.batch = tape.op("Shape", [input_ids], {"start": 0, "end": 1})
        self.seq = tape.op("Shape", [input_ids], {"start": 1, "end": 2})
        self.total = tape.op("Shape", [attention_mask], {"start": 1, "end": 2})
        self.past = tape.op("Sub", [self.total, self.seq])
        total32 = tape.op("Cast", [self.total], {"to": int(ir.DataType.INT32)})
        one = tape.op("Constant", [], {"value": ir.Tensor(np.array([1], np.int32), name="one")})
        empty = tape.op("Constant", [], {"value": ir.Tensor(np.array([], np.int64), name="scalar")})
        self.total_scalar = tape.op("Reshape", [total32, empty])
        self.last = tape.op("Expand", [tape.op("Sub", [total32, one]), self.batch])
        for node in reversed(list(tape.nodes)):
            graph.insert_before(graph[0], node)
        self.names = {value.name for value in (self.batch, self.seq, self.total, self.past)}

    def replace_shapes_of(self, tensor: ir.Value) -> None:
        """Let nothing ask the cache tensor [batch, heads, length, size] for its length."""
        length = self.past if tensor.is_graph_input() else self.total
        for node in [use.node for use in list(tensor.uses()) if use.node.op_type == "Shape"]:
            assert tensor.shape is not None and node.graph is not None
            tape = Tape()
            fixed = [
                tape.op("Constant", [], {"value": ir.Tensor(np.array([tensor.shape[axis]], np.int64), name="size")})
                for axis in (1, 3)
            ]
            dims = [self.batch, fixed[0], length, fixed[1]]
            chosen = dims[node.attributes.get_int("start", 0) : node.attributes.get_int("end", 4)]
            result = chosen[0] if len(chosen) == 1 else tape.op("Concat", chosen, {"axis": 0})
            node.graph.insert_before(node, list(tape.nodes))
            node.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
            node.graph.remove(node, safe=True)


def _lower(node: ir.Node, lengths: _Lengths, biases: dict[ir.Value | None, ir.Value]) -> None:
    heads, kv_heads, size, _ = _heads(node)
    query, key, value, mask, past_key, past_value = node.inputs[:6]
    assert query is not None and key is not None and value is not None and size is not None and node.graph is not None
    tape = Tape()
    packed = [
        _packed(tape, query, heads * size),
        _packed(tape, key, kv_heads * size),
        _packed(tape, value, kv_heads * size),
    ]
    bias = _bias(node, mask, biases)
    is_causal = node.attributes.get_int("is_causal", 0)
    attributes = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "causal": is_causal,
        "scale": node.attributes.get_float("scale", None) or float(size**-0.5),
        "softcap": node.attributes.get_float("softcap", 0.0),
    }
    inputs = [*packed, past_key, past_value, lengths.last, lengths.total_scalar]
    inputs += [None, None, None, bias] if bias is not None else []
    attention = ir.node("GroupQueryAttention", inputs, attributes, domain=CONTRIB, num_outputs=3, name=node.name)
    for new, old in zip(attention.outputs, node.outputs[:3], strict=True):
        new.dtype = old.dtype
    attention.outputs[1].shape, attention.outputs[2].shape = node.outputs[1].shape, node.outputs[2].shape
    unpack = Tape()
    result = attention.outputs[0] if _rank(query) == 3 else _unpacked(unpack, attention.outputs[0], heads, size)
    names = [output.name for output in node.outputs[1:3]]
    ir.convenience.replace_nodes_and_values(
        node.graph,
        node,
        [node],
        [*tape.nodes, attention, *unpack.nodes],
        list(node.outputs[:3]),
        [result, *attention.outputs[1:3]],
    )
    for output, name in zip(attention.outputs[1:3], names, strict=True):
        output.name = name


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else 4


def _packed(tape: Tape, value: ir.Value, width: int) -> ir.Value:
    """[batch, heads, seq, size] as [batch, seq, heads * size]; a transpose that made it is looked through."""
    if _rank(value) == 3:
        return value
    producer = value.producer()
    if (
        producer is not None
        and producer.op_type == "Transpose"
        and producer.attributes.get_ints("perm") == (0, 2, 1, 3)
    ):
        by_token = producer.inputs[0]
        assert by_token is not None
    else:
        by_token = tape.op("Transpose", [value], {"perm": [0, 2, 1, 3]})
    shape = tape.op("Constant", [], {"value": ir.Tensor(np.array([0, 0, width], np.int64), name="packed")})
    return tape.op("Reshape", [by_token, shape])


def _unpacked(tape: Tape, value: ir.Value, heads: int, size: int) -> ir.Value:
    shape = tape.op("Constant", [], {"value": ir.Tensor(np.array([0, 0, heads, size], np.int64), name="heads")})
    return tape.op("Transpose", [tape.op("Reshape", [value, shape])], {"perm": [0, 2, 1, 3]})


def _bias(node: ir.Node, mask: ir.Value | None, biases: dict[ir.Value | None, ir.Value]) -> ir.Value | None:
    """The mask as additive fp32 [batch or 1, heads or 1, seq, total], made once per mask."""
    if mask is None or (mask in biases):
        return biases.get(mask)
    assert node.graph is not None
    tape = Tape()
    bias = mask
    if mask.dtype == ir.DataType.BOOL:
        keep, drop = (
            tape.op("Constant", [], {"value": ir.Tensor(np.array(number, np.float32), name=name)})
            for name, number in (("keep", 0.0), ("drop", np.finfo(np.float32).min))
        )
        bias = tape.op("Where", [mask, keep, drop])
    if mask.shape is not None and len(mask.shape) == 2:
        axes = tape.op("Constant", [], {"value": ir.Tensor(np.array([0, 1], np.int64), name="axes")})
        bias = tape.op("Unsqueeze", [bias, axes])
    _insert_after(node.graph, mask, tape.nodes)
    biases[mask] = bias
    return bias


def _insert_after(graph: ir.Graph | ir.Function, value: ir.Value, nodes: Iterable[ir.Node]) -> None:
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, list(nodes))
    else:
        for node in reversed(list(nodes)):
            graph.insert_before(graph[0], node)
