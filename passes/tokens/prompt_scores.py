"""Scores of the tokens of a prompt, from the queries and keys of one layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effc.ir.analysis.cached_attention import CachedAttentionSite
from effc.ir.rewrite.constants import new_constant, new_integers
from effc.ir.rewrite.edit import insert_value

END = np.iinfo(np.int64).max


def prompt_scores(site: CachedAttentionSite, *, pool: int, count_padding: bool) -> ir.Value:
    """Put the scores of the new tokens in front of an attention (GemFilter, Shi et al. 2024, Algorithm 1).

    The score of token j is the sum over heads h of q_h · k_h,j, of the last query and the rotated keys, neither scaled
    nor normalised; then the mean over the `pool` tokens around j. A query head reads the key head
    floor(h / heads per key head), so the queries of a group are summed first.

    Args:
        site: The attention.
        pool: Tokens that share a score, an odd number.
        count_padding: Beyond the ends of a row the mean counts zeros, else it counts what is there.

    Returns:
        Float32 [batch, seq]; 0 at padding.
    """
    node, form = site.node, site.form
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    query, keys = _rotated(site)
    grouped = new_integers(graph, 0, form.kv_heads, form.heads // form.kv_heads, form.head_size)
    summed = insert_value(
        node, "ReduceSum", [insert_value(node, "Reshape", [query, grouped]), new_integers(graph, 2)], {"keepdims": 0}
    )
    column = insert_value(node, "Reshape", [summed, new_integers(graph, 0, form.kv_heads * form.head_size, 1)])
    raw = insert_value(node, "Transpose", [insert_value(node, "MatMul", [keys, column])], {"perm": [0, 2, 1]})
    present = insert_value(node, "Unsqueeze", [_new_tokens(site), new_integers(graph, 1)])
    scores = _pooled(node, _masked(node, present, raw), present, pool, count_padding) if pool > 1 else raw
    result = insert_value(node, "Squeeze", [_masked(node, present, scores), new_integers(graph, 1)])
    queries = node.inputs[0]
    assert queries is not None
    if queries.shape is not None:
        result.shape = ir.Shape(list(queries.shape)[:2])
    return result


def _rotated(site: CachedAttentionSite) -> tuple[ir.Value, ir.Value]:
    """The last query [batch, 1, heads * size] and all keys [batch, seq, kv heads * size], as they are multiplied."""
    node, form = site.node, site.form
    graph, (query, keys) = node.graph, node.inputs[:2]
    assert isinstance(graph, ir.Graph) and query is not None and keys is not None
    last = _last(node, query)
    if form.rotary == "none":
        return last, keys
    size = insert_value(node, "Shape", [keys], {"start": 0, "end": 2})
    rows = insert_value(node, "Concat", [size, new_integers(graph, form.rotary_size // 2)], {"axis": 0})
    tables = [insert_value(node, "Expand", [table, rows]) for table in node.inputs[5:7]]
    options = {
        "interleaved": int(form.rotary == "interleaved"),
        "rotary_embedding_dim": form.rotary_size if form.rotary_size < form.head_size else 0,
    }
    own = [_last(node, table) for table in tables]
    rotated = insert_value(node, "RotaryEmbedding", [last, *own], {**options, "num_heads": form.heads})
    return rotated, insert_value(node, "RotaryEmbedding", [keys, *tables], {**options, "num_heads": form.kv_heads})


def _last(node: ir.Node, value: ir.Value) -> ir.Value:
    """The last token of [batch, seq, width]."""
    assert isinstance(node.graph, ir.Graph)
    return insert_value(node, "Slice", [value, *(new_integers(node.graph, number) for number in (-1, END, 1))])


def _new_tokens(site: CachedAttentionSite) -> ir.Value:
    """Bool [batch, seq]: which of the new places hold a token."""
    node = site.node
    graph, keys, valid = node.graph, node.inputs[1], node.inputs[3]
    assert isinstance(graph, ir.Graph)
    first = insert_value(node, "Neg", [insert_value(node, "Shape", [keys], {"start": 1, "end": 2})])
    return insert_value(node, "Slice", [valid, first, new_integers(graph, END), new_integers(graph, 1)])


def _masked(node: ir.Node, present: ir.Value, scores: ir.Value) -> ir.Value:
    assert isinstance(node.graph, ir.Graph)
    return insert_value(node, "Where", [present, scores, new_constant(node.graph, np.array(0, np.float32))])


def _pooled(node: ir.Node, scores: ir.Value, present: ir.Value, pool: int, count_padding: bool) -> ir.Value:
    """Means over `pool` places around each, [batch, 1, seq]."""
    window = {"kernel_shape": [pool], "pads": [pool // 2, pool // 2], "count_include_pad": 1}
    means = insert_value(node, "AveragePool", [scores], window)
    if count_padding:
        return means
    assert isinstance(node.graph, ir.Graph)
    tokens = insert_value(node, "Cast", [present], {"to": int(ir.DataType.FLOAT)})
    share = insert_value(node, "AveragePool", [tokens], window)
    least = new_constant(node.graph, np.array(1 / pool, np.float32))
    return insert_value(node, "Div", [means, insert_value(node, "Max", [share, least])])
