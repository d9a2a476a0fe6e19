"""`CodedGather(indices, *weight) -> y`: rows of a stored weight, decoded and widened to fp32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from effc.ir.dialect.base import DOMAIN, DialectOp
from effc.ir.dialect.stored_weight import WEIGHT_ATTRIBUTES, StoredWeight, check_weight, decode_body


class CodedGather(DialectOp):
    """`y[...] = W[indices[...]]` with indices int32 or int64 of any shape, y fp32 [..., K]; negative indices wrap."""

    name = "CodedGather"
    attributes = WEIGHT_ATTRIBUTES

    def output_types(self, node: ir.Node) -> Sequence[tuple[ir.DataType, ir.Shape | None]]:
        """Fp32, the shape of the indices with K appended."""
        weight = check_weight(node)
        indices = node.inputs[0]
        known = indices is not None and indices.shape is not None
        shape = ir.Shape([*indices.shape, weight.columns]) if known else None  # type: ignore[union-attr,misc]
        return [(ir.DataType.FLOAT, shape)]

    def body(self, node: ir.Node, tape: Tape) -> Sequence[ir.Value]:
        """Pick the rows of each plane, decode those, give them the shape of the indices."""
        weight = check_weight(node)
        indices = node.inputs[0]
        minus_one = tape.op("Constant", [], {"value": ir.Tensor(np.array([-1], np.int64), name="minus_one")})
        flat = tape.op("Reshape", [indices, minus_one])
        rows = decode_body(node, tape, pick=flat)
        columns = tape.op("Constant", [], {"value": ir.Tensor(np.array([weight.columns], np.int64), name="columns")})
        shape = tape.op("Concat", [tape.op("Shape", [indices]), columns], {"axis": 0})
        return [tape.op("Reshape", [rows, shape], {"allowzero": 1})]


OP = CodedGather()


def coded_gather(indices: ir.Value, weight: StoredWeight, name: str | None = None) -> ir.Node:
    """A new `CodedGather` node, its output typed."""
    node = ir.node("CodedGather", [indices, *weight.tensors], weight.attributes(), domain=DOMAIN, name=name)
    OP.infer(node)
    return node
