"""The weight operand that `CodedMatMul`, `CodedGather` and `DecodeWeight` share: a tuple of tensors in a layout.

Layouts (`docs/coded-weights.md` has every byte):

    raw      weight[N, K] in its dtype
    huffman  sign_mantissa, code_lengths, stream, chunk_offsets[, low]       on disk
    rank4    sign_mantissa, codes, table, escapes, row_escapes[, low]        in memory, 4-bit ranks
    rank3    as rank4 with 3-bit ranks                                       in memory, 3-bit ranks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from effc.errors import InputError
from effc.ir.dialect.base import DOMAIN
from effc.ir.weights import tensor_shape
from effc.kernels import codec

LAYOUTS = ("raw", "huffman", "rank4", "rank3")
WEIGHT_ATTRIBUTES = {
    "layout": ir.AttributeType.STRING,
    "dtype": ir.AttributeType.INT,
    "rows": ir.AttributeType.INT,
    "columns": ir.AttributeType.INT,
}
"""Attributes every op with a stored weight has."""


@dataclass(frozen=True)
class StoredWeight:
    """A 2-D weight as operand of a node.

    Attributes:
        layout: One of `LAYOUTS`.
        dtype: Element type of the weight: BFLOAT16, FLOAT16 or FLOAT.
        rows: N, the outputs of a linear layer or the entries of an embedding.
        columns: K.
        tensors: The initializers, in the order of the layout.
    """

    layout: str
    dtype: ir.DataType
    rows: int
    columns: int
    tensors: tuple[ir.Value, ...]

    def attributes(self) -> dict[str, str | int]:
        """Attributes of a node that reads this weight."""
        return {"layout": self.layout, "dtype": int(self.dtype), "rows": self.rows, "columns": self.columns}

    @property
    def name(self) -> str:
        """Name of the weight that a coded one stands for: its tensors are called `NAME.PART`."""
        return str(self.tensors[0].name).rpartition(".")[0]

    def read(self) -> codec.CodedWeight:
        """The weight with the content of its tensors, for the codec."""
        parts = tuple(value.const_value.numpy() for value in self.tensors if value.const_value is not None)
        layout = cast("codec.Layout", self.layout)
        return codec.CodedWeight(codec.dtype_name(self.dtype.numpy()), (self.rows, self.columns), layout, parts)


def reads_stored_weight(node: ir.Node) -> bool:
    """Whether a node is an op of the dialect with a stored weight."""
    return node.domain == DOMAIN and "layout" in node.attributes


def stored_weight(node: ir.Node) -> StoredWeight:
    """The weight operand of a dialect node."""
    first = 0 if node.op_type == "DecodeWeight" else 1
    tensors = tuple(value for value in node.inputs[first:] if value is not None)
    return StoredWeight(
        node.attributes["layout"].as_string(),
        ir.DataType(node.attributes["dtype"].as_int()),
        node.attributes["rows"].as_int(),
        node.attributes["columns"].as_int(),
        tensors,
    )


def raw_weight(value: ir.Value) -> StoredWeight:
    """An initializer [N, K] as a weight in the `raw` layout."""
    tensor = value.const_value
    assert tensor is not None
    rows, columns = tensor_shape(tensor)
    return StoredWeight("raw", tensor.dtype, rows, columns, (value,))


def replace_weight(graph: ir.Graph, old: StoredWeight, new: StoredWeight) -> None:
    """Let every dialect node that reads a weight read another form of it.

    Args:
        graph: The graph; gets the new tensors, and loses the old ones that nothing else reads.
        old: The weight as it is read now.
        new: The same weight in another layout.
    """
    for tensor in new.tensors:
        graph.initializers.pop(str(tensor.name), None)
        graph.register_initializer(tensor)
    for node in {use.node for use in old.tensors[0].uses() if use.node.domain == DOMAIN}:
        operands = 0 if node.op_type == "DecodeWeight" else 1
        node.resize_inputs(operands + len(new.tensors))
        for index, tensor in enumerate(new.tensors, start=operands):
            node.replace_input_with(index, tensor)
        for name, attribute in new.attributes().items():
            node.attributes.add(ir.convenience.convert_attribute(name, attribute))
    for tensor in old.tensors:
        unused = not tensor.uses() and not tensor.is_graph_output()
        if unused and graph.initializers.get(str(tensor.name)) is tensor:
            del graph.initializers[str(tensor.name)]


def decode_body(node: ir.Node, tape: Tape, pick: ir.Value | None = None) -> ir.Value:
    """The weight as fp32 [N, K] in standard ops, or only the rows `pick` [R] of it.

    Exact for every bf16 and fp16 pattern and for every finite fp32 value.

    Raises:
        InputError: The layout has no body (`huffman`, `rank3`).
    """
    weight = stored_weight(node)
    if weight.layout == "raw":
        rows = weight.tensors[0] if pick is None else tape.op("Gather", [weight.tensors[0], pick], {"axis": 0})
        return tape.op("Cast", [rows], {"to": int(ir.DataType.FLOAT)})
    if weight.layout != "rank4":
        raise InputError(
            f"node {node.name!r}: layout {weight.layout!r} has no body in standard ops. "
            "Write the engine with the layouts `raw` or `rank4`."
        )
    sign_mantissa, codes, table, escapes = weight.tensors[:4]
    exponents = _exponents(tape, weight, codes, table, escapes)
    low = weight.tensors[5] if len(weight.tensors) > 5 else None
    planes = [sign_mantissa, exponents, *([low] if low is not None else [])]
    if pick is not None:
        planes = [tape.op("Gather", [plane, pick], {"axis": 0}) for plane in planes]
    return _join(tape, *planes)


def _constant(tape: Tape, array: np.ndarray, name: str) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.Tensor(array, name=name)})


def _exponents(tape: Tape, weight: StoredWeight, codes: ir.Value, table: ir.Value, escapes: ir.Value) -> ir.Value:
    """Exponents int32 [N, K]: ranks looked up in the table, escapes scattered over their places in row order."""
    ranks = _ranks(tape, weight, codes)
    known = tape.op("Gather", [table, tape.op("Cast", [ranks], {"to": int(ir.DataType.INT32)})], {"axis": 0})
    escaped = tape.op("Equal", [ranks, _constant(tape, np.array(15, np.uint8), "escape")])
    places = tape.op("Transpose", [tape.op("NonZero", [escaped])], {"perm": [1, 0]})
    count = tape.op("Shape", [places], {"start": 0, "end": 1})
    zero, axis = (_constant(tape, np.array([0], np.int64), "zero"),) * 2
    found = tape.op("Slice", [escapes, zero, count, axis])
    patched = tape.op("ScatterND", [known, places, found])
    return tape.op("Cast", [patched], {"to": int(ir.DataType.INT32)})


def _ranks(tape: Tape, weight: StoredWeight, codes: ir.Value) -> ir.Value:
    """Ranks uint8 [N, K] from bytes [N, tiles * 64]: see the nibble order of `rank4`."""
    half = 64
    blocks = tape.op("Reshape", [codes, _constant(tape, np.array([weight.rows, -1, half]), "blocks")])
    low = tape.op("BitwiseAnd", [blocks, _constant(tape, np.array(15, np.uint8), "nibble")])
    high = tape.op("BitShift", [blocks, _constant(tape, np.array(4, np.uint8), "four")], {"direction": "RIGHT"})
    pairs = tape.op("Concat", [low, high], {"axis": 2})
    flat = tape.op("Reshape", [pairs, _constant(tape, np.array([weight.rows, -1]), "rows")])
    bounds = [np.array([bound], np.int64) for bound in (0, weight.columns, 1)]
    return tape.op("Slice", [flat, *(_constant(tape, bound, "bound") for bound in bounds)])


def _join(tape: Tape, sign_mantissa: ir.Value, exponents: ir.Value, low: ir.Value | None = None) -> ir.Value:
    """Fp32 values from sign, exponent and mantissa, by a table of all bf16 patterns, so that NaNs stay as they are."""
    integers = tape.op("Cast", [sign_mantissa], {"to": int(ir.DataType.INT32)})
    mask = [_constant(tape, np.array(value, np.int32), f"int_{value}") for value in (128, 127, 256)]
    sign = tape.op("Mul", [tape.op("BitwiseAnd", [integers, mask[0]]), mask[2]])
    exponent = tape.op("Mul", [exponents, mask[0]])
    word = tape.op("Add", [tape.op("Add", [sign, exponent]), tape.op("BitwiseAnd", [integers, mask[1]])])
    patterns = np.arange(65536, dtype=np.uint32) << 16
    high = tape.op("Gather", [_constant(tape, patterns.view(np.float32), "bfloat16_values"), word], {"axis": 0})
    if low is None:
        return high
    unit = np.ldexp(1.0, np.maximum(np.arange(256), 1) - 127 - 23).astype(np.float32)
    unit[255] = 0
    signed = np.where(np.arange(256) < 128, 1, -1).astype(np.float32)
    step = tape.op("Gather", [_constant(tape, unit, "unit"), exponents], {"axis": 0})
    direction = tape.op("Gather", [_constant(tape, signed, "sign"), integers], {"axis": 0})
    rest = tape.op("Mul", [tape.op("Cast", [low], {"to": int(ir.DataType.FLOAT)}), step])
    return tape.op("Add", [high, tape.op("Mul", [rest, direction])])


def check_weight(node: ir.Node, expected: Sequence[str] = LAYOUTS) -> StoredWeight:
    """The weight of a node, with its layout and sizes checked.

    Raises:
        InputError: Unknown layout, or no tensors.
    """
    weight = stored_weight(node)
    if weight.layout not in expected:
        raise InputError(f"node {node.name!r}: layout {weight.layout!r} is unknown. Layouts: {', '.join(expected)}.")
    if not weight.tensors or weight.rows < 0 or weight.columns < 0:
        raise InputError(f"node {node.name!r}: {node.op_type} has no weight tensors or a negative size.")
    return weight
