"""Lowers cached attention to onnxruntime's GroupQueryAttention, which appends to its cache in place.

The operator takes and gives [batch, seq, heads * size], an additive mask, and a cache whose length axis is a
capacity: the true length comes from `attention_mask`. With past and present bound to one buffer, a step writes
its new rows and copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from effc.ir.analysis.attention import AttentionSite, attention_sites
from effc.ir.program import Program, Task
from effc.passes.fusions import packed_heads

CONTRIB = "com.microsoft"


def lower_cached_attention(program: Program) -> bool:
    """Lower every cached attention of a causal language model, or none.

    Returns:
        Whether the cache is now in place: all cache tensors belong to lowered nodes.
    """
    graph = program.graph
    _pack(program)
    sites = attention_sites(graph)
    count = sum(node.op_type == "Attention" and node.domain == "" for node in graph)
    if program.task != Task.CAUSAL_LM or len(sites) != count or not all(_fits(site) for site in sites):
        return False
    inputs = {value.name: value for value in graph.inputs}
    pairs = program.cache_pairs()
    if not {"input_ids", "attention_mask"} <= inputs.keys() or set(pairs) != _cache_pairs(sites):
        return False
    lengths = _Lengths(graph, inputs["input_ids"], inputs["attention_mask"])
    for tensor in (value for pair in pairs for value in pair):
        lengths.replace_shapes_of(tensor)
    causal = all(site.causal for site in sites)
    biases: dict[ir.Value, ir.Value] = {}
    for site in sites:
        _lower(site, lengths, biases, causal)
    program.model.opset_imports[CONTRIB] = 1
    return bool(sites)


def _pack(program: Program) -> None:
    """Let attention read [batch, seq, heads * size], which the operator wants, where that takes no transpose."""
    for site in attention_sites(program.graph):
        found = packed_heads.match(site)
        if not isinstance(found, str):
            packed_heads.rewrite(found)
    RemoveUnusedNodesPass()(program.model)


def _cache_pairs(sites: Iterable[AttentionSite]) -> set[tuple[ir.Value | None, ir.Value | None]]:
    """The cache tensors of all sites, past with present."""
    keys = {(site.past_key, site.present_key) for site in sites}
    return keys | {(site.past_value, site.present_value) for site in sites}


def is_in_place(program: Program) -> bool:
    """Whether every cache input is read by a GroupQueryAttention, and by nothing else."""
    readers = {use.node for past, _ in program.cache_pairs() for use in past.uses()}
    return bool(readers) and all(node.domain == CONTRIB for node in readers)


def _fits(site: AttentionSite) -> bool:
    """Whether GroupQueryAttention computes the same: fp32, equal head sizes, a cache, no scores asked for."""
    node = site.node
    extra_input = len(node.inputs) > 6 and node.inputs[6] is not None
    extra_output = any(output.uses() or output.is_graph_output() for output in node.outputs[3:])
    mask_fits = site.mask is None or (site.mask.shape is not None and len(site.mask.shape) in (2, 4))
    floats = all(value.dtype == ir.DataType.FLOAT for value in (site.q, site.k, site.v))
    cached = site.past_key is not None and site.present_key is not None
    plain = not extra_input and not extra_output
    return cached and floats and mask_fits and plain and site.head_size == site.value_size


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
        self.new = tape.op("Expand", [tape.op("Cast", [self.seq], {"to": int(ir.DataType.INT32)}), self.batch])
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


def _lower(site: AttentionSite, lengths: _Lengths, biases: dict[ir.Value, ir.Value], causal: bool) -> None:
    node, size = site.node, site.head_size
    assert node.graph is not None
    tape = Tape()
    widths = (site.heads * size, site.kv_heads * size, site.kv_heads * size)
    operands = [site.q, site.k, site.v]
    if not site.packed:
        operands = [_packed(tape, value, width) for value, width in zip(operands, widths, strict=True)]
    inputs = [
        *operands,
        site.past_key,
        site.past_value,
        lengths.last,
        lengths.total_scalar,
        *(None,) * 3,
        _bias(node.graph, site.mask, biases) if site.mask is not None else None,
        # A batch may append several tokens to a cache only when it says how many, and only causally.
        *((*(None,) * 5, lengths.new) if causal else ()),
    ]
    attributes = {
        "num_heads": site.heads,
        "kv_num_heads": site.kv_heads,
        "causal": int(causal),
        "scale": float(site.scale),
        "softcap": float(site.softcap),
    }
    attention = ir.node("GroupQueryAttention", inputs, attributes, domain=CONTRIB, num_outputs=3, name=node.name)
    for new, old in zip(attention.outputs[1:], node.outputs[1:3], strict=True):
        new.type, new.shape = old.type, old.shape
    attention.outputs[0].dtype = ir.DataType.FLOAT
    unpack = Tape()
    result = attention.outputs[0]
    if not site.packed:
        result = _unpacked(unpack, result, site.heads, size)
    result.type, result.shape = site.output.type, site.output.shape
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


def _packed(tape: Tape, value: ir.Value, width: int) -> ir.Value:
    """[batch, heads, seq, size] as [batch, seq, heads * size]; a transpose that made it is looked through."""
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


def _bias(graph: ir.Graph | ir.Function, mask: ir.Value, biases: dict[ir.Value, ir.Value]) -> ir.Value:
    """The mask as additive fp32 [batch or 1, heads or 1, seq, total], made once per mask."""
    if mask in biases:
        return biases[mask]
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
    _insert_after(graph, mask, tape.nodes)
    biases[mask] = bias
    return bias


def _insert_after(graph: ir.Graph | ir.Function, value: ir.Value, nodes: Iterable[ir.Node]) -> None:
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, list(nodes))
    else:
        for node in reversed(list(nodes)):
            graph.insert_before(graph[0], node)
