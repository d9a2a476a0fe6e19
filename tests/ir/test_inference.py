"""Symbolic inference: names and relations survive; shapes agree with what onnxruntime computes."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from effc.ir.rewrite.inference import content_of, infer_graph

CASES = {
    "split by size": ("float[batch,seq,12] x", "a, b = Split<axis = -1>(x, parts)", "int64[2] parts = {4, 8}", "a, b"),
    "tile": ("float[batch,seq,12] x", "a = Tile(x, repeats)", "int64[3] repeats = {1, 2, 3}", "a"),
    "reshape with zero and minus one": (
        "float[batch,seq,12] x",
        "a = Reshape(x, t)",
        "int64[4] t = {0, -1, 3, 4}",
        "a",
    ),
    "flatten rows": ("float[batch,seq,12] x", "a = Reshape(x, t)", "int64[2] t = {-1, 12}", "a"),
    "slice with step": (
        "float[batch,seq,12] x",
        "a = Slice(x, s, e, ax, st)",
        "int64[1] s = {1}, int64[1] e = {11}, int64[1] ax = {2}, int64[1] st = {3}",
        "a",
    ),
    "negative slice": (
        "float[batch,seq,12] x",
        "a = Slice(x, s, e, ax)",
        "int64[1] s = {-5}, int64[1] e = {-1}, int64[1] ax = {-1}",
        "a",
    ),
    "reduce without keeping": (
        "float[batch,seq,12] x",
        "a = ReduceMean<keepdims = 0>(x, ax)",
        "int64[1] ax = {1}",
        "a",
    ),
    "gather scalar": ("float[batch,seq,12] x", "a = Gather<axis = 2>(x, i)", "int64 i = {3}", "a"),
    "broadcast": ("float[batch,seq,12] x, float[seq,1] y", "a = Add(x, y)", "int64 unused = {0}", "a"),
    "matmul": ("float[batch,seq,12] x, float[12,5] y", "a = MatMul(x, y)", "int64 unused = {0}", "a"),
    "top k": ("float[batch,seq,12] x", "a, b = TopK(x, k)", "int64[1] k = {4}", "a, b"),
}


def _graph(inputs: str, body: str, constants: str, outputs: str) -> onnx.ModelProto:
    declared = ", ".join(f"float[?] {name.strip()}" for name in outputs.split(","))
    return onnx.parser.parse_model(
        f'<ir_version: 11, opset_import: ["" : 24]> g ({inputs}) => ({declared}) <{constants}> {{ {body} }}'
    )


@pytest.mark.parametrize("case", CASES)
def test_shapes_agree_with_the_runtime(case: str) -> None:
    proto = _graph(*CASES[case])
    model = ir.from_proto(proto)
    for output in model.graph.outputs:
        output.shape, output.type = None, None
    infer_graph(model.graph)
    numbers = {"batch": 3, "seq": 5}
    for value in model.graph.outputs:
        assert value.shape is not None, value.name
        assert value.dtype is not None
    for output in proto.graph.output:
        output.type.Clear()
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {
        value.name: np.ones([size if isinstance(size, int) else numbers[str(size)] for size in value.shape], np.float32)
        for value in model.graph.inputs
    }
    for value, array in zip(model.graph.outputs, session.run(None, feeds)):
        shape = [size if isinstance(size, int) else size.evaluate(numbers) for size in value.shape]
        assert shape == list(array.shape)


def test_contents_of_shapes_are_followed() -> None:
    body = """
      s = Shape<start = 1, end = 2>(x)
      p = Shape<start = 2, end = 3>(c)
      t = Add(s, p)
      h = Constant<value_ints = [4]>()
      d = Mul(t, h)
      a = Concat<axis = 0>(t, d, h)
    """
    header = '<ir_version: 11, opset_import: ["" : 24]>'
    inputs = "float[batch,seq,4] x, float[batch,2,past,4] c"
    proto = onnx.parser.parse_model(f"{header} g ({inputs}) => (int64[3] a) {{ {body} }}")
    graph = ir.from_proto(proto).graph
    infer_graph(graph)
    assert [str(size) for size in content_of(graph.outputs[0])] == ["past + seq", "4*past + 4*seq", "4"]
