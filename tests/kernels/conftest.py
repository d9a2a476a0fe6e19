"""Helpers to run coded weights through real onnxruntime sessions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from effc import kernels
from effc.kernels import codec

sys.path.insert(0, str(Path(__file__).parent))  # oracles and models that several tests import

TYPES = {
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.uint16): TensorProto.UINT16,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
}
NUMBERS = {"float32": 1, "float16": 10, "bfloat16": 16}

OpenSession = Callable[..., ort.InferenceSession]


@pytest.fixture(params=kernels.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    before = kernels.isa()
    kernels.select_isa(request.param)
    yield request.param
    kernels.select_isa(before)


@pytest.fixture
def open_session() -> OpenSession:
    """A function from a weight and op types to a session with one node (or more) an op."""

    def open_(
        weight: codec.CodedWeight,
        ops: Sequence[str] = ("CodedMatMul",),
        threads: int = 2,
        index_type: int = TensorProto.INT64,
        **overrides: object,
    ) -> ort.InferenceSession:
        names = [f"w{i}" for i in range(len(weight.tensors))]
        attributes = {
            "layout": weight.layout,
            "dtype": NUMBERS[weight.dtype],
            "rows": weight.shape[0],
            "columns": weight.shape[1],
        } | overrides
        attributes = {name: value for name, value in attributes.items() if value is not None}
        first = {"CodedMatMul": ["x"], "CodedGather": ["i"], "DecodeWeight": []}
        nodes = [
            helper.make_node(op, [*first[op], *names], [f"y{j}"], name=f"node{j}", domain="effc", **attributes)
            for j, op in enumerate(ops)
        ]
        inputs = []
        if "CodedMatMul" in ops:
            inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", "width"]))
        if "CodedGather" in ops:
            inputs.append(helper.make_tensor_value_info("i", index_type, ["count"]))
        outputs = [helper.make_tensor_value_info(n.output[0], TensorProto.FLOAT, None) for n in nodes]
        tensors = [
            helper.make_tensor(name, TYPES[t.dtype], t.shape, np.ascontiguousarray(t).tobytes(), raw=True)
            for name, t in zip(names, weight.tensors, strict=True)
        ]
        graph = helper.make_graph(nodes, "test", inputs, outputs, tensors)
        imports = [helper.make_opsetid("", 24), helper.make_opsetid("effc", 1)]
        model: onnx.ModelProto = helper.make_model(graph, opset_imports=imports, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.register_custom_ops_library(str(kernels.library_path()))
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    return open_
