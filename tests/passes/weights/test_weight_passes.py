"""The weight passes on small graphs: what they take, what they leave alone and why, and that bits stay."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from effc import kernels
from effc.errors import ContractError, UsageError
from effc.ir.program import Program, Source, Task
from effc.passes.pipeline import run_pipeline
from effc.passes.pipeline_text import parse_pipeline
from effc.passes.weights.lossless_weights import LosslessWeights
from effc.passes.weights.stored_weights import StoredWeights
from effc.verify.weights import WeightCheck, coded_weights, weight_digest

BF16 = ml_dtypes.bfloat16


def _program(text: str, weights: dict[str, np.ndarray]) -> Program:
    """A program from ONNX text; its weights are given as arrays."""
    model = ir.from_proto(onnx.parser.parse_model('<ir_version: 11, opset_import: ["" : 24]>' + text))
    for name, array in weights.items():
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        tensor = ir.tensor(array, name=name)
        fresh = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
        ir.convenience.replace_all_uses_with(value, fresh)
        model.graph.inputs[:] = [item for item in model.graph.inputs if item.name != name]
        model.graph.register_initializer(fresh)
    return Program(model, Task.GENERIC, Source("memory", "test"))


def _normal(shape: tuple[int, ...], dtype: object, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(dtype)


def _run(program: Program, **feeds: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(kernels.library_path()))
    model = ir.to_proto(program.model).SerializeToString()
    return onnxruntime.InferenceSession(model, options).run(None, feeds)


LINEAR = """
linear (float[batch, 96] x, bfloat16[64, 96] w) => (float[batch, 64] y) {
    wide = Cast <to = 1> (w)
    turned = Transpose <perm = [1, 0]> (wide)
    y = MatMul (x, turned)
}"""
TIED = """
tied (int64[batch] ids, bfloat16[64, 96] w) => (float[batch, 64] y) {
    wide = Cast <to = 1> (w)
    rows = Gather <axis = 0> (wide, ids)
    turned = Transpose <perm = [1, 0]> (wide)
    y = MatMul (rows, turned)
}"""


def _ops(program: Program) -> list[str]:
    return [node.op_type for node in program.graph]


def test_a_linear_is_read_as_stored_and_then_coded() -> None:
    array = _normal((64, 96), BF16)
    program = _program(LINEAR, {"w": array})
    x = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)
    run_pipeline(program, parse_pipeline("stored-weights{min-bytes=0}"))
    assert _ops(program) == ["CodedMatMul"]
    raw = _run(program, x=x)[0]
    run_pipeline(program, parse_pipeline("canonicalize,lossless-weights{min-bytes=0,min-saving=0}"), [WeightCheck()])
    assert [node.attributes.get_string("layout") for node in program.graph] == ["huffman"]
    assert "w" not in program.graph.initializers
    np.testing.assert_array_equal(_run(program, x=x)[0].view(np.uint32), raw.view(np.uint32))
    np.testing.assert_allclose(raw, x @ array.astype(np.float32).T, rtol=1e-5, atol=1e-5)
    assert program.records[-1].measured["weights_identical"] == 1


def test_a_tied_weight_is_coded_once() -> None:
    program = _program(TIED, {"w": _normal((64, 96), BF16)})
    expected = _run(program, ids=np.array([3, 0, 63]))[0]
    run_pipeline(program, parse_pipeline("lossless-weights{min-bytes=0,min-saving=0}"))
    assert sorted(_ops(program)) == ["CodedGather", "CodedMatMul"]
    streams = [name for name in program.graph.initializers if name.endswith(".stream")]
    assert streams == ["w.stream"]
    np.testing.assert_allclose(_run(program, ids=np.array([3, 0, 63]))[0], expected, rtol=1e-5, atol=1e-6)


def test_fp32_that_is_bf16_becomes_bf16() -> None:
    text = LINEAR.replace("bfloat16", "float").replace("wide = Cast <to = 1> (w)", "wide = Identity (w)")
    program = _program(text, {"w": _normal((64, 96), BF16).astype(np.float32)})
    run_pipeline(program, (StoredWeights(min_bytes=0),))
    assert program.graph.initializers["w"].dtype == ir.DataType.BFLOAT16
    assert program.records[-1].details["fp32_that_is_bf16"] == ["w"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_other_floats_keep_every_bit(dtype: type) -> None:
    name = {np.float32: "float", np.float16: "float16"}[dtype]
    text = LINEAR.replace("bfloat16", name)
    array = _normal((64, 96), dtype)
    program = _program(text, {"w": array})
    run_pipeline(program, parse_pipeline("lossless-weights{min-bytes=0,min-saving=0}"), [WeightCheck()])
    assert list(coded_weights(program.graph)) == ["w"]
    assert weight_digest(coded_weights(program.graph)["w"]) == program.records[-1].details["tensors"][0]["sha256"]


def test_a_gemm_with_a_bias_and_a_transposed_weight() -> None:
    text = """
    gemm (float[batch, 96] x, float[96, 64] w, float[64] b) => (float[batch, 64] y) { y = Gemm (x, w, b) }"""
    array, bias = _normal((96, 64), np.float32), _normal((64,), np.float32, 1)
    program = _program(text, {"w": array, "b": bias})
    run_pipeline(program, (StoredWeights(min_bytes=0),))
    assert _ops(program) == ["CodedMatMul", "Add"]
    x = np.random.default_rng(1).standard_normal((3, 96)).astype(np.float32)
    np.testing.assert_allclose(_run(program, x=x)[0], x @ array + bias, rtol=1e-5, atol=1e-6)


REASONS = [
    (
        "g (float[n, 96] x, float[96, 96] w) => (float[96, n] y) { y = Gemm <transA = 0, alpha = 2.0> (x, w) }",
        np.float32,
        (96, 96),
        "scales or transposes",
    ),
    (
        "g (float[96, n] x, float[64, 96] w) => (float[64, n] y) { y = MatMul (w, x) }",
        np.float32,
        (64, 96),
        "left operand",
    ),
    (
        "g (float[n, 96] x, float[n, 96] w) => (float[n, 96] y) { y = Add (x, w) }",
        np.float32,
        (8, 96),
        "neither a matrix product",
    ),
    (
        "g (float[n, 2, 4] x, float[2, 4, 6] w) => (float[n, 2, 6] y) { y = MatMul (x, w) }",
        np.float32,
        (2, 4, 6),
        "3 dimensions",
    ),
    ("g (int64[n] i, int8[64, 96] w) => (int8[n, 96] y) { y = Gather (w, i) }", np.int8, (64, 96), "INT8"),
]


@pytest.mark.parametrize(("text", "dtype", "shape", "reason"), REASONS)
def test_what_does_not_fit_is_left_alone_with_a_reason(
    text: str, dtype: type, shape: tuple[int, ...], reason: str
) -> None:
    weights = {"w": np.ones(shape, dtype)}
    match = StoredWeights(min_bytes=0).match(_program(text, weights))
    assert not match.sites
    assert [item.site for item in match.left] == ["w"]
    assert reason in match.left[0].reason


def test_a_weight_read_inside_a_branch_is_left_alone() -> None:
    text = """
    branches (float[batch, 96] x, bool c, float[96, 64] w) => (float[batch, 64] y) {
        y = If (c) <
            then_branch = then () => (float[batch, 64] a) { a = MatMul (x, w) },
            else_branch = otherwise () => (float[batch, 64] b) { d = Add (x, x) b = MatMul (d, w) }
        >
    }"""
    proto = onnx.parser.parse_model('<ir_version: 11, opset_import: ["" : 24]>' + text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(_normal((96, 64), np.float32), "w"))
    program = Program(ir.from_proto(proto), Task.GENERIC, Source("memory", "test"))
    program.graph.inputs[:] = [item for item in program.graph.inputs if item.name != "w"]
    match = StoredWeights(min_bytes=0).match(program)
    assert not match.sites
    assert "inside a branch or loop" in match.left[0].reason


def test_random_bits_gain_nothing_and_the_pass_says_so() -> None:
    words = np.random.default_rng(0).integers(0, 0x7F00, (64, 96)).astype(np.uint16)
    program = _program(LINEAR, {"w": words.view(BF16)})
    with pytest.raises(ContractError, match=r"changed nothing[\s\S]*coding would save [\s\S]*--allow-noop"):
        run_pipeline(program, (LosslessWeights(min_bytes=0),))
    run_pipeline(_program(LINEAR, {"w": words.view(BF16)}), (LosslessWeights(min_bytes=0),), allow_noop=True)


def test_skip_and_min_bytes() -> None:
    program = _program(LINEAR, {"w": _normal((64, 96), BF16)})
    with pytest.raises(ContractError, match="below min-bytes=65536"):
        run_pipeline(program, (LosslessWeights(),))
    program = _program(LINEAR, {"w": _normal((64, 96), BF16)})
    with pytest.raises(ContractError, match="skipped by the option"):
        run_pipeline(program, (LosslessWeights(min_bytes=0, skip=("w*",)),))


@pytest.mark.parametrize("options", [{"min_saving": 1.0}, {"min_saving": -0.1}, {"min_bytes": -1}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="must"):
        LosslessWeights(**options)  # type: ignore[arg-type]


def test_an_unknown_runtime_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFC_RUNTIME_LAYOUT", "rank5")
    with pytest.raises(UsageError, match="EFFC_RUNTIME_LAYOUT is 'rank5'"):
        run_pipeline(_program(LINEAR, {"w": _normal((64, 96), BF16)}), (LosslessWeights(min_bytes=0),))


def test_a_second_run_takes_the_coded_weight_from_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    array = _normal((64, 96), BF16, seed=77)
    passes = parse_pipeline("lossless-weights{min-bytes=0,min-saving=0}")
    run_pipeline(_program(LINEAR, {"w": array}), passes)

    def refuse(*arguments: object) -> None:
        raise AssertionError("coded again")

    monkeypatch.setattr("effc.kernels.codec.encode", refuse)
    program = _program(LINEAR, {"w": array})
    run_pipeline(program, passes, [WeightCheck()])
    assert list(coded_weights(program.graph)) == ["w"]
