"""Give a `CachedAttention` another cache: a new node, new inputs and outputs of the graph."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence

import onnx_ir as ir

from effc.ir.analysis.cached_attention import CachedAttentionSite
from effc.ir.dialect.cache_storage import StateTensor, Storage
from effc.ir.dialect.cached_attention import AttentionForm, cache_tensors, cached_attention
from effc.ir.dialect.selections import TokenSelection


def change_cache(
    site: CachedAttentionSite,
    *,
    form: AttentionForm | None = None,
    storage: Storage | None = None,
    selection: TokenSelection | None = None,
    constants: Sequence[ir.Value] = (),
) -> ir.Node:
    """Replace the node; the tensors of its cache take the place of the old ones among inputs and outputs.

    Args:
        site: The attention; every tensor of its cache is an input, or an output, of the graph and read by it alone.
        form: What it is to compute; None: what it does.
        storage: How it is to keep its tokens; None: as it does.
        selection: Which of them it is to read; None: those it reads.
        constants: Inputs behind the cache.

    Returns:
        The new node.
    """
    node, graph = site.node, site.node.graph
    assert isinstance(graph, ir.Graph)
    query, key, value, valid, bias, cos, sin = node.inputs[:7]
    assert query is not None and key is not None and value is not None and valid is not None
    storage, selection = storage or site.storage, selection or site.selection
    form = form or site.form
    tensors = cache_tensors(form, storage, selection)
    past = _inputs(site, tensors)
    tables = (cos, sin) if cos is not None and sin is not None and not selection.turns_by_place else None
    operands = [query, key, value, valid]
    new = cached_attention(
        operands, past, form, storage,
        selection=selection, bias=bias, tables=tables, constants=constants, name=node.name,
    )  # fmt: skip
    graph.insert_before(node, new)
    _take_places(graph.inputs, site.past, past)
    present = node.outputs[1:]
    prefix = cache_prefix(present[0])
    for output, tensor in zip(new.outputs[1:], tensors, strict=True):
        output.name = f"{prefix}.{tensor.name}"
    _take_places(graph.outputs, present, new.outputs[1:])
    new.outputs[0].name = node.outputs[0].name
    node.outputs[0].replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return new


def _inputs(site: CachedAttentionSite, tensors: Sequence[StateTensor]) -> list[ir.Value]:
    old = site.past[0]
    assert old.shape is not None
    batch, prefix = old.shape[0], cache_prefix(old)
    return [
        ir.Value(
            name=f"{prefix}.{tensor.name}",
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape([batch if axis == "batch" else axis for axis in tensor.shape]),
        )
        for tensor in tensors
    ]


def cache_prefix(value: ir.Value) -> str:
    """`past_key_values.3` of `past_key_values.3.key`."""
    return str(value.name).rpartition(".")[0]


def _take_places(ports: MutableSequence[ir.Value], old: Sequence[ir.Value], new: Sequence[ir.Value]) -> None:
    """Let new inputs (or outputs) of a graph stand where the first of the old ones stood."""
    place = ports.index(old[0])
    for value in old:
        ports.remove(value)
    for offset, value in enumerate(new):
        ports.insert(place + offset, value)
