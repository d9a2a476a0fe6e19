"""`CodedMatMul(x, *weight) -> y`: product with a stored weight, decoded on the way."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.tape import Tape

from effc.ir.dialect.base import DOMAIN, DialectOp
from effc.ir.dialect.stored_weight import WEIGHT_ATTRIBUTES, StoredWeight, check_weight, decode_body


class CodedMatMul(DialectOp):
    """`y = x · Wᵀ` with x fp32 [..., K], W [N, K] in any layout, y fp32 [..., N], accumulated in fp32."""

    name = "CodedMatMul"
    attributes = WEIGHT_ATTRIBUTES

    def output_types(self, node: ir.Node) -> Sequence[tuple[ir.DataType, ir.Shape | None]]:
        """Fp32, the shape of x with N as last size."""
        weight = check_weight(node)
        x = node.inputs[0]
        shape = None if x is None or x.shape is None else ir.Shape([*list(x.shape)[:-1], weight.rows])
        return [(ir.DataType.FLOAT, shape)]

    def body(self, node: ir.Node, tape: Tape) -> Sequence[ir.Value]:
        """Decode, transpose, MatMul."""
        decoded = decode_body(node, tape)
        transposed = tape.op("Transpose", [decoded], {"perm": [1, 0]})
        return [tape.op("MatMul", [node.inputs[0], transposed])]


OP = CodedMatMul()


def coded_matmul(x: ir.Value, weight: StoredWeight, name: str | None = None) -> ir.Node:
    """A new `CodedMatMul` node, its output typed."""
    node = ir.node("CodedMatMul", [x, *weight.tensors], weight.attributes(), domain=DOMAIN, name=name)
    OP.infer(node)
    return node
