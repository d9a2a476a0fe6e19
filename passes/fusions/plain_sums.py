"""Keep sums in front of `LayerNormalization` and `Gelu` out of onnxruntime's own fusions, which are slower.

    LayerNormalization(Add(x, y))  ->  LayerNormalization(Sum(x, y))          Gelu(Add(x, bias))  ->  Gelu(Sum(x, bias))

onnxruntime turns the left sides into SkipLayerNormalization and BiasGelu, whose CPU kernels are not vectorized:
369 against 24 µs for 128 rows of 384. `Sum` computes the same and is left alone. Measured on all-MiniLM-L6-v2
(onnxruntime 1.32, AVX-512, one thread): 19.4 -> 16.6 ms for 128 tokens, 35.0 -> 30.3 ms for 8 x 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from effc.ir.rewrite.dataflow import consumers, is_op
from effc.ir.rewrite.edit import insert_value, replace

NAME = "plain-sums"
FOLLOWED_BY = ("LayerNormalization", "Gelu")


@dataclass(frozen=True)
class PlainSum:
    """An `Add` that is read by a normalization or activation onnxruntime would fuse it with."""

    node: ir.Node


def match(node: ir.Node) -> PlainSum | None:
    """The rewrite of one node; None when it is no such sum."""
    if not is_op(node, "Add") or not any(is_op(user, *FOLLOWED_BY) for user in consumers(node.outputs[0])):
        return None
    return PlainSum(node)


def rewrite(fusion: PlainSum) -> None:
    """Spell the sum so that onnxruntime leaves it alone."""
    node = fusion.node
    replace(node.outputs[0], insert_value(node, "Sum", node.inputs))
