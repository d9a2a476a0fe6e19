"""The `stored-weights` pass: products and row lookups read their weight in the dtype it is stored in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from effc.errors import UsageError
from effc.ir.dialect.base import DOMAIN, VERSION
from effc.ir.dialect.coded_gather import coded_gather
from effc.ir.dialect.coded_matmul import coded_matmul
from effc.ir.dialect.stored_weight import raw_weight
from effc.ir.program import Program
from effc.ir.weights import computed_tensor, is_weight, tensor_shape
from effc.kernels import codec
from effc.passes.base import Contract, LeftAlone, Match, Pass, PassReport, Site
from effc.passes.weights.weight_reader import WeightReader, weight_readers

MIN_BYTES = 64 << 10
"""Weights below this size are not worth a special product."""
FLOATS = (ir.DataType.FLOAT, ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class StoredWeights(Pass):
    """Read each large weight in its stored dtype, in the op that uses it.

    onnxruntime's CPU computes in fp32 and would widen bf16 weights for good, to twice their bytes. Here the
    product widens them in registers. An fp32 weight whose low 16 bits are all zero is a bf16 weight and becomes one.

    Before:

        w32 = Cast(weight) {to=FLOAT}
        wt  = Transpose(w32) {perm=[1, 0]}
        y   = MatMul(x, wt)

    After:

        y = effc.CodedMatMul(x, weight) {layout="raw"}

    Attributes:
        min_bytes: Smaller weights are left alone.
        skip: Glob patterns of weight names to leave alone, joined by `|`.
    """

    name: ClassVar[str] = "stored-weights"
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    min_bytes: int = field(default=MIN_BYTES, metadata={"range": "0 or more"})
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.min_bytes < 0:
            raise UsageError(f"min-bytes is {self.min_bytes}, it must not be negative.")

    def match(self, program: Program) -> Match:
        """Find the weights whose readers are products and row lookups; a tied weight is one site."""
        sites, left = [], []
        for value in program.graph.initializers.values():
            if not is_weight(value):
                continue
            readers, reason = weight_readers(value)
            reason = self._reason(value) or reason
            if not reason:
                sites.append(Site(str(value.name), readers))
            elif _is_notable(value):
                left.append(LeftAlone(str(value.name), reason))
        return Match(sites, left)

    def apply(self, program: Program, sites: Sequence[Site]) -> PassReport:
        """Rewrite every reader of each weight."""
        narrowed = []
        for site in sites:
            value = program.graph.initializers[site.name]
            stored = _stored_form(program.graph, value, site.payload[0].transposed)
            if stored.dtype != value.dtype:
                narrowed.append(site.name)
            for reader in site.payload:
                _rewrite(reader, stored)
            if not value.uses() and not value.is_graph_output():
                program.graph.initializers.pop(site.name, None)
                if stored is not value:
                    _take_name(program.graph, stored, site.name)
        if sites:
            program.model.opset_imports[DOMAIN] = VERSION
        return PassReport([site.name for site in sites], details={"fp32_that_is_bf16": narrowed})

    def _reason(self, value: ir.Value) -> str:
        tensor = value.const_value
        assert tensor is not None
        if any(fnmatchcase(str(value.name), pattern) for pattern in self.skip):
            return "skipped by the option `skip`"
        if tensor.nbytes < self.min_bytes:
            return f"{tensor.nbytes} bytes, below min-bytes={self.min_bytes}"
        if tensor.dtype not in FLOATS:
            return f"its dtype is {tensor.dtype.name}; only bf16, fp16 and fp32 weights are read this way"
        if len(tensor.shape) != 2:
            return f"it has {len(tensor.shape)} dimensions; only matrices are read this way"
        return ""


def _is_notable(value: ir.Value) -> bool:
    """Whether a reader of the report would ask about this weight: a matrix, or anything large."""
    tensor = value.const_value
    if tensor is None or (tensor.dtype.is_integer() and tensor.dtype.bitwidth > 8):
        return False
    return len(tensor.shape) > 1 or tensor.nbytes >= MIN_BYTES


def _stored_form(graph: ir.Graph, value: ir.Value, transposed: bool) -> ir.Value:
    """The weight as [N, K] in the narrowest dtype that holds it; the value itself when nothing changes."""
    tensor = value.const_value
    assert tensor is not None
    narrow = tensor.dtype == ir.DataType.FLOAT and codec.is_bf16(tensor.numpy())
    if not narrow and not transposed:
        return value
    dtype = ir.DataType.BFLOAT16 if narrow else tensor.dtype
    shape = tensor_shape(tensor)[:: -1 if transposed else 1]

    def compute() -> np.ndarray:
        array = tensor.numpy()
        if narrow:
            array = (array.view(np.uint32) >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)
        return array.T if transposed else array

    name = f"{value.name}.stored"
    stored = ir.Value(
        name=name,
        type=ir.TensorType(dtype),
        shape=ir.Shape(shape),
        const_value=computed_tensor(compute, dtype, shape, name),
    )
    graph.register_initializer(stored)
    return stored


def _take_name(graph: ir.Graph, value: ir.Value, name: str) -> None:
    graph.initializers.pop(str(value.name))
    value.name = name
    graph.register_initializer(value)


def _rewrite(reader: WeightReader, stored: ir.Value) -> None:
    """Put the dialect op in the place of one reader; the nodes between weight and reader die when unused."""
    graph = reader.node.graph
    assert graph is not None
    make = coded_gather if reader.is_gather else coded_matmul
    operand = reader.node.inputs[reader.operand_index]
    assert operand is not None
    node = make(operand, raw_weight(stored), name=reader.node.name)
    new, result = [node], node.outputs[0]
    if reader.bias is not None:
        add = ir.node("Add", [result, reader.bias])
        add.outputs[0].type, add.outputs[0].shape = result.type, result.shape
        new, result = [node, add], add.outputs[0]
    ir.convenience.replace_nodes_and_values(graph, reader.node, [], new, [reader.result], [result])
    for dead in reader.path_from_result():
        if not any(output.uses() or output.is_graph_output() for output in dead.outputs):
            assert dead.graph is not None
            dead.graph.remove(dead, safe=True)
