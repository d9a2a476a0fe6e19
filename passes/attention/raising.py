"""Turn one cached `Attention` into `effc.CachedAttention`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effc.ir.analysis.attention import AttentionSite, attention_sites
from effc.ir.dialect.cache_storage import FLOATS, DenseStorage
from effc.ir.dialect.cached_attention import AttentionForm, cached_attention
from effc.ir.program import Program
from effc.ir.rewrite.constants import new_constant, new_integers
from effc.ir.rewrite.dataflow import attribute_int, is_op, permutation, producer
from effc.ir.rewrite.edit import insert_value, replace
from effc.passes.attention.step_sizes import StepSizes
from effc.passes.base import LeftAlone

TO_TOKENS = (0, 2, 1, 3)
HIDDEN = np.finfo(np.float32).min


@dataclass(frozen=True)
class Rotation:
    """A rotation of queries and keys that the op can do: what goes in, its tables and its form."""

    query: ir.Value
    key: ir.Value
    tables: tuple[ir.Value, ir.Value]
    rotary: str
    size: int


def reason_against(site: AttentionSite, program: Program) -> str:
    """Why a site cannot become a `CachedAttention`; empty when it can."""
    if site.past_key is None or site.present_key is None:
        return "it takes no cache of its own" if program.cache_pairs() else "the model has no cache"
    pairs = {(site.past_key, site.present_key), (site.past_value, site.present_value)}
    if not pairs <= set(program.cache_pairs()):
        return "its cache is not carried on from inputs past_key_values.N.* to outputs present.N.*"
    if any(output.uses() or output.is_graph_output() for output in site.node.outputs[3:]):
        return "its scores are asked for"
    if len(site.node.inputs) > 6 and site.node.inputs[6] is not None:
        return "it is told how many keys of each row count"
    if any(value.dtype != ir.DataType.FLOAT for value in (site.q, site.k, site.v)):
        return "it does not compute in float32"
    if site.past_key.dtype not in FLOATS or site.past_value is None or site.past_value.dtype != site.past_key.dtype:
        return "its cache has an element type that is not kept"
    if _read_elsewhere(site):
        return "its cache is read elsewhere too"
    if not site.understood and (site.mask is None or site.mask.shape is None or len(site.mask.shape) not in (2, 4)):
        return "its mask has neither two nor four axes"
    return ""


def other_attention(program: Program, some: bool) -> list[LeftAlone]:
    """Attention that is no `CachedAttention`, with the reason; the whole model where there is none of either kind."""
    left = [
        LeftAlone(site.name, reason)
        for site in attention_sites(program.graph)
        if (reason := reason_against(site, program))
    ]
    return left if left or some else [LeftAlone("the model", "it has no attention with a cache")]


def _read_elsewhere(site: AttentionSite) -> bool:
    past, present = (site.past_key, site.past_value), (site.present_key, site.present_value)
    readers = {use.node for value in (*past, *present) if value is not None for use in value.uses()}
    return any(node is not site.node and not is_op(node, "Shape") for node in readers)


def ring_of(site: AttentionSite) -> int:
    """Places of a ring that holds all a query can see; 0 where a ring bounds nothing."""
    return (site.window or 0) if site.understood and site.causal else 0


def rotation_of(site: AttentionSite) -> Rotation | None:
    """The rotation in front of queries and keys, when it is one and the same."""
    nodes = [producer(value, "RotaryEmbedding") for value in (site.q, site.k)]
    if any(node is None or len([value for value in node.inputs if value is not None]) != 3 for node in nodes):
        return None
    query, key = (node for node in nodes if node is not None)
    cosines, sines = query.inputs[1:3]
    interleaved = attribute_int(query, "interleaved", 0)
    alike = key.inputs[1] is cosines and key.inputs[2] is sines and attribute_int(key, "interleaved", 0) == interleaved
    half = cosines.shape[-1] if cosines is not None and cosines.shape is not None and len(cosines.shape) == 3 else None
    if not alike or not isinstance(half, int) or sines is None or cosines is None:
        return None
    assert query.inputs[0] is not None and key.inputs[0] is not None
    rotary = "interleaved" if interleaved else "half"
    return Rotation(query.inputs[0], key.inputs[0], (cosines, sines), rotary, 2 * half)


def raise_cached_attention(
    site: AttentionSite,
    sizes: StepSizes | None,
    biases: dict[ir.Value, ir.Value],
    *,
    ring: int,
    rotation: Rotation | None,
) -> ir.Node:
    """Put `CachedAttention` in the place of a site.

    Args:
        site: The attention.
        sizes: Sizes of the step; None when only the cache tensors tell them.
        biases: Masks as biases that were made already; grows.
        ring: Places of a ring, 0 for none; the cache tensors change their shape.
        rotation: What the op is to rotate itself.

    Returns:
        The new node.
    """
    node, past = site.node, [site.past_key, site.past_value]
    graph = node.graph
    assert isinstance(graph, ir.Graph) and site.past_key is not None and site.past_key.dtype is not None
    form = AttentionForm(
        site.heads, site.kv_heads, site.head_size, site.value_size, site.scale, site.softcap, site.causal,
        site.window or 0, rotation.rotary if rotation else "none", rotation.size if rotation else 0,
    )  # fmt: skip
    storage = DenseStorage(site.past_key.dtype, ring)
    query, key = (rotation.query, rotation.key) if rotation else (site.q, site.k)
    widths = (site.heads * site.head_size, site.kv_heads * site.head_size, site.kv_heads * site.value_size)
    operands = [_by_token(node, value, width) for value, width in zip((query, key, site.v), widths, strict=True)]
    bias = None if site.understood else _bias(graph, site, biases)
    valid = site.padding or (sizes.everyone if sizes is not None else _everyone(node, site))
    if ring:
        for value in past:
            assert value is not None and value.shape is not None
            value.shape = ir.Shape([*value.shape[:2], ring, value.shape[3]])
    new = cached_attention(
        [*operands, valid],
        [value for value in past if value is not None],
        form,
        storage,
        bias=bias,
        tables=rotation.tables if rotation else None,
        name=node.name,
    )
    graph.insert_before(node, new)
    _take_place(site, new)
    graph.remove(node, safe=True)
    return new


def _take_place(site: AttentionSite, new: ir.Node) -> None:
    node, result = site.node, new.outputs[0]
    if not site.packed:
        assert node.graph is not None
        split = insert_value(
            node,
            "Reshape",
            [result, new_integers(node.graph, 0, 0, site.heads, site.value_size)],
        )
        result = insert_value(node, "Transpose", [split], {"perm": TO_TOKENS})
    for old, value in zip(node.outputs, (result, *new.outputs[1:])):
        replace(old, value, node)


def _by_token(before: ir.Node, value: ir.Value, width: int) -> ir.Value:
    """[batch, heads, seq, size] as [batch, seq, heads * size]; a transpose that made it is looked through."""
    assert before.graph is not None
    if value.shape is not None and len(value.shape) == 3:
        return value
    moved = producer(value, "Transpose")
    if moved is not None and permutation(moved) == TO_TOKENS and moved.inputs[0] is not None:
        by_token = moved.inputs[0]
    else:
        by_token = insert_value(before, "Transpose", [value], {"perm": TO_TOKENS})
    return insert_value(before, "Reshape", [by_token, new_integers(before.graph, 0, 0, width)])


def _everyone(node: ir.Node, site: AttentionSite) -> ir.Value:
    """`[batch, past + seq]`, all true, with the length of a cache that is exactly as long as its tokens."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    axis = 1 if site.packed else 2
    batch = insert_value(node, "Shape", [site.q], {"start": 0, "end": 1})
    seq = insert_value(node, "Shape", [site.q], {"start": axis, "end": axis + 1})
    past = insert_value(node, "Shape", [site.past_key], {"start": 2, "end": 3})
    shape = insert_value(node, "Concat", [batch, insert_value(node, "Add", [past, seq])], {"axis": 0})
    return insert_value(node, "Expand", [new_constant(graph, np.array(True)), shape])


def _bias(graph: ir.Graph, site: AttentionSite, biases: dict[ir.Value, ir.Value]) -> ir.Value:
    """The mask as additive float32 of four axes, made once per mask."""
    mask, node = site.mask, site.node
    assert mask is not None and mask.shape is not None
    if mask in biases:
        return biases[mask]
    bias = mask
    if mask.dtype == ir.DataType.BOOL:
        keep, drop = (new_constant(graph, np.array(number, np.float32)) for number in (0.0, HIDDEN))
        bias = insert_value(node, "Where", [mask, keep, drop])
    elif mask.dtype != ir.DataType.FLOAT:
        bias = insert_value(node, "Cast", [mask], {"to": int(ir.DataType.FLOAT)})
    if len(mask.shape) == 2:
        bias = insert_value(node, "Unsqueeze", [bias, new_integers(graph, 0, 1)])
    biases[mask] = bias
    return bias
