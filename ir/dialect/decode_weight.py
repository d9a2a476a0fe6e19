"""`DecodeWeight(*weight) -> y`: a whole stored weight, decoded and widened to fp32."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.tape import Tape

from effc.ir.dialect.base import DOMAIN, DialectOp
from effc.ir.dialect.stored_weight import WEIGHT_ATTRIBUTES, StoredWeight, check_weight, decode_body


class DecodeWeight(DialectOp):
    """`y = W` as fp32 [N, K], for consumers that are neither a product nor a row lookup."""

    name = "DecodeWeight"
    attributes = WEIGHT_ATTRIBUTES

    def output_types(self, node: ir.Node) -> Sequence[tuple[ir.DataType, ir.Shape | None]]:
        """Fp32 [N, K]."""
        weight = check_weight(node)
        return [(ir.DataType.FLOAT, ir.Shape([weight.rows, weight.columns]))]

    def body(self, node: ir.Node, tape: Tape) -> Sequence[ir.Value]:
        """Decode."""
        return [decode_body(node, tape)]


OP = DecodeWeight()


def decode_weight(weight: StoredWeight, name: str | None = None) -> ir.Node:
    """A new `DecodeWeight` node, its output typed."""
    node = ir.node("DecodeWeight", weight.tensors, weight.attributes(), domain=DOMAIN, name=name)
    OP.infer(node)
    return node
