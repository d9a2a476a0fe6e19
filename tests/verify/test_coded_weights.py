"""Contracts over passes that put ops of ours into the graph, with our kernels and with their reference bodies."""

import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from verify_models import OPSETS, linear, weight

from effc.ir.program import Program, Source, Task
from effc.passes.pipeline import run_pipeline
from effc.passes.pipeline_text import parse_pipeline
from effc.verify import streaming
from effc.verify.contracts import ContractCheck

TEXT = "stored-weights{{min-bytes=0}},lossless-weights{{min-bytes=0,min-saving=0,layout={layout}}}"


def wide_program() -> Program:
    """A table lookup and two products with weights wide enough for every layout; the table is read twice."""
    nodes = [
        helper.make_node("Cast", ["table"], ["table.float"], "table.cast", to=TensorProto.FLOAT),
        helper.make_node("Gather", ["table.float", "input_ids"], ["x"], "lookup"),
        helper.make_node("Tanh", ["x"], ["t"], "tanh"),
        *linear("t", "w", "h"),
        *linear("h", "table", "logits")[1:],
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", 130])
    weights = [weight("table", 130, 256), weight("w", 256, 256)]
    graph = helper.make_graph(nodes, "wide", [ids], [logits], weights)
    model = ir.from_proto(helper.make_model(graph, opset_imports=OPSETS, ir_version=11))
    return Program(model, Task.GENERIC, Source("memory", "wide", {"vocab_size": 130}))


@pytest.mark.parametrize(("layout", "kernels"), [("huffman", True), ("rank4", True), ("rank4", False)])
@pytest.mark.parametrize("limit", [1, 1 << 30])
def test_coding_is_exact(layout: str, kernels: bool, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setattr(streaming, "custom_op_library", lambda: None)
    program = wide_program()
    run_pipeline(program, parse_pipeline(TEXT.format(layout=layout)), [ContractCheck(limit=limit)])
    measured = {record.name: record.measured for record in program.records}
    assert measured["lossless-weights"]["bitwise"] is True
    assert len(measured["lossless-weights"]["shapes"]) == 3
    assert measured["stored-weights"]["max_rel"] <= measured["stored-weights"]["allowed"]["max_rel"]
    assert [node.op_type for node in program.graph if node.domain == "effc"] == ["CodedGather", *["CodedMatMul"] * 2]
