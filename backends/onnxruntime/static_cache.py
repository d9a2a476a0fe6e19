"""Lowers caches with static scales to onnxruntime's GroupQueryAttention, which quantizes and appends in place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effc.ir.analysis.cached_attention import CachedAttentionSite, cached_attention_sites
from effc.ir.dialect.cache_storage import StaticStorage
from effc.ir.dialect.cached_attention import constant_values
from effc.ir.program import Program
from effc.ir.rewrite.constants import new_constant, new_integers
from effc.ir.rewrite.edit import insert_value, replace

CONTRIB = "com.microsoft"
HIDDEN = np.finfo(np.float32).min


def static_caches(program: Program) -> list[str]:
    """Names of the `CachedAttention` nodes with storage `static`."""
    return [site.name for site in _sites(program)]


def lower_static_caches(program: Program) -> int:
    """Replace every `CachedAttention` with storage `static`.

    Returns:
        Number of nodes replaced.
    """
    graph = program.graph
    sites = _sites(program)
    shared: dict[tuple[ir.Value, int, bool], _Step] = {}
    for site in sites:
        valid = site.node.inputs[3]
        assert valid is not None
        key = (valid, site.form.window, site.form.causal)
        if key not in shared:
            shared[key] = _Step(graph, site)
        _lower(site, shared[key])
    if sites:
        program.model.opset_imports[CONTRIB] = 1
    return len(sites)


def _sites(program: Program) -> list[CachedAttentionSite]:
    return [site for site in cached_attention_sites(program.graph) if isinstance(site.storage, StaticStorage)]


def is_static_cache(node: ir.Node) -> bool:
    """Whether a node is what a static cache becomes."""
    return node.domain == CONTRIB and node.op_type == "GroupQueryAttention"


class _Step:
    """Lengths of a step and its mask as a bias, for all attentions that see the same."""

    def __init__(self, graph: ir.Graph, site: CachedAttentionSite) -> None:
        node = site.node
        query, valid = node.inputs[0], node.inputs[3]
        batch = insert_value(node, "Shape", [valid], {"start": 0, "end": 1})
        total = insert_value(node, "Shape", [valid], {"start": 1, "end": 2})
        seq = insert_value(node, "Shape", [query], {"start": 1, "end": 2})
        total32 = insert_value(node, "Cast", [total], {"to": int(ir.DataType.INT32)})
        seq32 = insert_value(node, "Cast", [seq], {"to": int(ir.DataType.INT32)})
        one = new_constant(graph, np.array([1], np.int32))
        self.last = insert_value(node, "Expand", [insert_value(node, "Sub", [total32, one]), batch])
        self.total = insert_value(node, "Squeeze", [total32, new_integers(graph, 0)])
        # A batch may append several tokens to a cache only when it says how many, and only causally.
        self.new = insert_value(node, "Expand", [seq32, batch]) if site.form.causal else None
        self.bias = self._bias(graph, site, insert_value(node, "Sub", [total, seq]), total)

    def _bias(self, graph: ir.Graph, site: CachedAttentionSite, past: ir.Value, total: ir.Value) -> ir.Value:
        node, valid = site.node, site.node.inputs[3]
        zero, one = (new_constant(graph, np.array(number, np.int64)) for number in (0, 1))
        scalars = [insert_value(node, "Squeeze", [size, new_integers(graph, 0)]) for size in (past, total)]
        queries = insert_value(
            node, "Unsqueeze", [insert_value(node, "Range", [*scalars, one]), new_integers(graph, 1)]
        )
        keys = insert_value(node, "Range", [zero, scalars[1], one])
        if site.form.causal:
            seen = insert_value(node, "LessOrEqual", [keys, queries])
        else:
            seen = insert_value(node, "GreaterOrEqual", [queries, zero])
        if site.form.window:
            oldest = insert_value(node, "Sub", [queries, new_integers(graph, site.form.window)])
            seen = insert_value(node, "And", [seen, insert_value(node, "Greater", [keys, oldest])])
        tokens = insert_value(node, "Unsqueeze", [valid, new_integers(graph, 1, 2)])
        seen = insert_value(node, "And", [seen, tokens])
        keep, drop = (new_constant(graph, np.array(number, np.float32)) for number in (0.0, HIDDEN))
        return insert_value(node, "Where", [seen, keep, drop])


def _lower(site: CachedAttentionSite, step: _Step) -> None:
    node, form, storage = site.node, site.form, site.storage
    assert isinstance(storage, StaticStorage) and node.graph is not None
    inputs = [*node.inputs[:3], *site.past, step.last, step.total, *(None,) * 3, step.bias, None]
    inputs += constant_values(node)
    inputs += [None, None, step.new] if step.new is not None else []
    attributes: dict[str, int | float | str] = {
        "num_heads": form.heads,
        "kv_num_heads": form.kv_heads,
        "causal": int(form.causal),
        "scale": float(form.scale),
        "softcap": float(form.softcap),
        "k_quant_type": "PER_CHANNEL",
        "v_quant_type": "PER_CHANNEL",
        "kv_cache_bit_width": storage.bits,
    }
    new = ir.node("GroupQueryAttention", inputs, attributes, domain=CONTRIB, num_outputs=3, name=node.name)
    node.graph.insert_before(node, new)
    for old, output in zip(node.outputs, new.outputs, strict=True):
        output.type, output.shape = old.type, old.shape
        replace(old, output, node)
    node.graph.remove(node, safe=True)
