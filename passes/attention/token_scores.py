"""The input by which a caller tells the cache what each token is worth."""

from __future__ import annotations

import onnx_ir as ir

TOKEN_SCORES = "token_scores"
MASK = "attention_mask"


def token_scores(graph: ir.Graph, valid: ir.Value) -> ir.Value:
    """The graph input `token_scores`, float32 [batch, total], which is added unless it is there.

    Args:
        graph: The graph.
        valid: Boolean [batch, total] of an attention; gives the axes where there is no attention mask.
    """
    inputs = {value.name: value for value in graph.inputs}
    if TOKEN_SCORES in inputs:
        return inputs[TOKEN_SCORES]
    like = inputs.get(MASK, valid)
    shape = like.shape if like.shape is not None else ir.Shape(["batch", "total"])
    scores = ir.Value(name=TOKEN_SCORES, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape.dims))
    place = graph.inputs.index(like) + 1 if like in graph.inputs else 0
    graph.inputs.insert(place, scores)
    return scores
