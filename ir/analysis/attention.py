"""Attention sites of a canonical graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from effc.ir.analysis.layer_names import named_by_layer
from effc.ir.analysis.masks import mask_meaning, window_of
from effc.ir.rewrite import sizes
from effc.ir.rewrite.dataflow import attribute_float, attribute_int, is_op
from effc.ir.rewrite.sizes import Size, shape_of


@dataclass(frozen=True)
class AttentionSite:
    """One `Attention`: its inputs are `[batch, heads, tokens, size]`, or packed `[batch, tokens, heads * size]`.

    Attributes:
        name: `attention` and its layer, for reports only.
        packed: Whether q, k, v and the output have the packed form.
        node: The node.
        q: Queries `[batch, heads, queries, head_size]`.
        k: New keys `[batch, kv_heads, new, head_size]`.
        v: New values `[batch, kv_heads, new, value_size]`.
        output: `[batch, heads, queries, value_size]`.
        mask: Boolean (true: may be seen) or additive, broadcast to `[batch, heads, queries, keys]`; None when
            there is none.
        past_key: Cached keys `[batch, kv_heads, past, head_size]`; None without a cache.
        past_value: Cached values; None without a cache.
        present_key: Cached and new keys; None without a cache.
        present_value: Cached and new values; None without a cache.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_size: Elements of a query or key head.
        value_size: Elements of a value head.
        queries: Number of queries, a size.
        keys: Number of cached and new keys, a size.
        scale: Factor on the scores.
        softcap: Softcap of the scores; 0 when there is none.
        causal: Whether query i sees the keys up to its own position only, said by an attribute or by the mask.
        window: How many keys, its own included, a query sees at most; None when that is not limited.
        padding: Boolean `[batch, keys]` the mask looks tokens up in; None when it hides no tokens or is not
            understood.
        understood: Whether causal, window and padding say all that the mask says.
    """

    name: str
    packed: bool
    node: ir.Node
    q: ir.Value
    k: ir.Value
    v: ir.Value
    output: ir.Value
    mask: ir.Value | None
    past_key: ir.Value | None
    past_value: ir.Value | None
    present_key: ir.Value | None
    present_value: ir.Value | None
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    queries: Size
    keys: Size
    scale: float
    softcap: float
    causal: bool
    window: int | None
    padding: ir.Value | None
    understood: bool


def attention_sites(graph: ir.Graph) -> tuple[AttentionSite, ...]:
    """All attention sites of a graph, in order."""
    return named_by_layer([site for node in graph if (site := attention_site(node)) is not None], "attention")


def attention_site(node: ir.Node) -> AttentionSite | None:
    """The site of one node; None when it is no `Attention` with plain head counts and sizes."""
    if not is_op(node, "Attention") or any(value is None for value in node.inputs[:3]):
        return None
    q, k, v = node.inputs[:3]
    assert q is not None and k is not None and v is not None
    heads_of = (attribute_int(node, name, 0) for name in ("q_num_heads", "kv_num_heads", "kv_num_heads"))
    shapes = [_by_heads(shape_of(value), heads) for value, heads in zip((q, k, v), heads_of, strict=True)]
    if any(shape is None for shape in shapes):
        return None
    q_shape, k_shape, v_shape = (shape for shape in shapes if shape is not None)
    numbers = (q_shape[1], k_shape[1], q_shape[3], v_shape[3])
    if not all(isinstance(number, int) for number in numbers):
        return None
    heads, kv_heads, head_size, value_size = (int(number) for number in numbers if isinstance(number, int))
    mask, past_key, past_value = (_optional(node.inputs, index) for index in (3, 4, 5))
    past = shape_of(past_key)
    keys = sizes.add(past[2], k_shape[2]) if past is not None else k_shape[2]
    sees = _visibility(node, mask, q_shape[2], keys)
    return AttentionSite(
        name="attention",
        packed=len(shape_of(q) or ()) == 3,
        node=node,
        q=q,
        k=k,
        v=v,
        output=node.outputs[0],
        mask=mask,
        past_key=past_key,
        past_value=past_value,
        present_key=_optional(node.outputs, 1),
        present_value=_optional(node.outputs, 2),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        value_size=value_size,
        queries=q_shape[2],
        keys=keys,
        scale=attribute_float(node, "scale", head_size**-0.5),
        softcap=attribute_float(node, "softcap", 0.0),
        causal=sees.causal,
        window=sees.window,
        padding=sees.padding,
        understood=sees.understood,
    )


def _by_heads(shape: Sequence[Size] | None, heads: int) -> tuple[Size, ...] | None:
    """A shape as `[batch, heads, tokens, size]`; None when it is neither that nor packed with a known width."""
    if shape is None or len(shape) == 4:
        return tuple(shape) if shape is not None else None
    if len(shape) != 3 or not heads or not isinstance(shape[2], int):
        return None
    return (shape[0], heads, shape[1], shape[2] // heads)


@dataclass(frozen=True)
class _Visibility:
    """What an attribute and a mask say together; see `AttentionSite`."""

    causal: bool
    window: int | None
    padding: ir.Value | None
    understood: bool


def _visibility(node: ir.Node, mask: ir.Value | None, queries: Size, keys: Size) -> _Visibility:
    said = bool(attribute_int(node, "is_causal", 0))
    if mask is None:
        return _Visibility(said, None, None, True)
    meaning = mask_meaning(mask)
    if meaning is None:
        return _Visibility(said, None, None, False)
    upper = meaning.upper
    if said and upper is None:
        upper = sizes.subtract(keys, queries)
    causal = upper is not None and sizes.same(upper, sizes.subtract(keys, queries))
    window = window_of(replace(meaning, upper=upper)) if causal else None
    bounded = (upper is None or causal) and (meaning.lower is None or window is not None)
    return _Visibility(causal or said, window, meaning.padding, bounded)


def _optional(values: Sequence[ir.Value | None], index: int) -> ir.Value | None:
    return values[index] if len(values) > index else None
