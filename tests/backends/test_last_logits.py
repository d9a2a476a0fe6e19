"""The input `num_logits` is added where every value behind the product belongs to the logits alone."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from effc.backends.onnxruntime.last_logits import NAME, add_num_logits
from effc.ir.program import Program, Source, Task


def program(body: str, outputs: str = "float[batch, seq, 8] logits", task: Task = Task.CAUSAL_LM) -> Program:
    """A head over given hidden states; every value has its shape."""
    graph = onnx.parser.parse_graph(f"""
        head (float[batch, seq, 4] h, float[batch, seq, 8] other, float[4, 8] w, float[8] b, float[1, 1, 8] c)
        => ({outputs}) {{ {body} }}
    """)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
    return Program(ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model)), task, Source("memory", "m"))


@pytest.mark.parametrize(
    "body",
    [
        "logits = MatMul(h, w)",
        "p = MatMul(h, w) logits = Add(p, b)",
        "p = MatMul(h, w) q = Mul(c, p) t = Tanh(q) logits = Mul(t, c)",
    ],
)
def test_plain_heads_get_the_input(body: str) -> None:
    found = program(body)
    assert add_num_logits(found)
    assert [value.name for value in found.graph.inputs][-1] == NAME
    assert any(node.op_type == "Slice" for node in found.graph)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("p = MatMul(h, w) logits = Add(p, other)", "float[batch, seq, 8] logits"),
        ("p = MatMul(h, w) logits = Mul(p, p)", "float[batch, seq, 8] logits"),
        ("p = MatMul(h, w) logits = Tanh(p)", "float[batch, seq, 8] logits, float[batch, seq, 8] p"),
        ("logits = MatMul(h, w) t = Tanh(logits)", "float[batch, seq, 8] logits, float[batch, seq, 8] t"),
        ("logits = Softmax(other)", "float[batch, seq, 8] logits"),
    ],
)
def test_heads_that_mix_or_share_tokens_stay(body: str, outputs: str) -> None:
    found = program(body, outputs)
    before = [node.op_type for node in found.graph]
    assert not add_num_logits(found)
    assert [node.op_type for node in found.graph] == before
    assert NAME not in found.graph.initializers


def test_it_is_added_once_and_to_language_models_only() -> None:
    found = program("logits = MatMul(h, w)")
    assert add_num_logits(found)
    assert not add_num_logits(found)
    assert not add_num_logits(program("logits = MatMul(h, w)", task=Task.GENERIC))
