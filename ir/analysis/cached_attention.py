"""`CachedAttention` nodes of a graph, and the bytes of their caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from effc.ir.analysis.layer_names import named_by_layer
from effc.ir.dialect.base import DOMAIN
from effc.ir.dialect.cache_storage import DenseStorage, Storage
from effc.ir.dialect.cached_attention import AttentionForm, attention_form, cache_storage, past_values, token_selection
from effc.ir.dialect.selections import TokenSelection

REPORT_TOKENS = 8192
"""Length at which caches are reported."""
SELECTION_TOKENS = (2048, 8192, 32768)
"""Lengths at which the tokens that are read are reported."""


@dataclass(frozen=True)
class CachedAttentionSite:
    """One `CachedAttention`.

    Attributes:
        name: `attention` and its layer, for reports only.
        node: The node.
        form: What it computes.
        storage: How it keeps its tokens.
        selection: Which of them a step reads.
        past: The tensors of the cache it reads.
    """

    name: str
    node: ir.Node
    form: AttentionForm
    storage: Storage
    selection: TokenSelection
    past: tuple[ir.Value, ...]


def is_cached_attention(node: ir.Node) -> bool:
    """Whether a node is a `CachedAttention`."""
    return node.domain == DOMAIN and node.op_type == "CachedAttention"


def cached_attention_sites(graph: ir.Graph) -> tuple[CachedAttentionSite, ...]:
    """All `CachedAttention` nodes of a graph, in order."""
    nodes = [node for node in graph if is_cached_attention(node)]
    sites = [
        CachedAttentionSite(
            "attention",
            node,
            attention_form(node),
            cache_storage(node),
            token_selection(node),
            tuple(past_values(node)),
        )
        for node in nodes
    ]
    return named_by_layer(sites, "attention")


def selection_figures(site: CachedAttentionSite) -> dict[str, Any]:
    """JSON-ready figures of what a step of one token reads in one layer: how many tokens at a few lengths."""
    selection = site.selection
    figures: dict[str, Any] = {"site": site.name, "selection": selection.kind, **selection.attributes()}
    return figures | {"reads": {str(tokens): selection.read_at(tokens) for tokens in SELECTION_TOKENS}}


def cache_figures(site: CachedAttentionSite, tokens: int = REPORT_TOKENS) -> dict[str, Any]:
    """JSON-ready figures of the cache of one layer and one row at a length.

    Returns:
        `site`, `storage`, `bits` (of an element, codes only), `bits_with_parameters`, `tokens`, `bytes`,
        `bytes_of_codes` (what codes and exact tokens alone take) and `dense_bytes` (a bfloat16 cache of all tokens).
    """
    sizes, storage = site.form.sizes, site.storage
    bits, with_parameters = storage.stored_bits(sizes)
    selecting = sum(tensor.bytes_at(tokens) for tensor in site.selection.tensors(storage, sizes))
    return {
        "site": site.name,
        "storage": storage.kind,
        "bits": round(bits, 4),
        "bits_with_parameters": round(with_parameters, 4),
        "tokens": tokens,
        "bytes": storage.bytes_at(sizes, tokens) + selecting,
        "bytes_of_codes": storage.code_bytes_at(sizes, tokens),
        "dense_bytes": DenseStorage(ir.DataType.BFLOAT16).bytes_at(sizes, tokens),
    }
