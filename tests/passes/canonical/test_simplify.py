"""Simplification: what goes, what stays, and that the file never grows."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph_programs import HEADER, assert_same_outputs, canonical, program

from effc.ir.program import Program, Source, Task
from effc.ir.text import program_text
from effc.passes.base import Contract
from effc.passes.canonicalize import Canonicalize


def _ops(one: Program) -> list[str]:
    return [node.op_type for node in one.graph]


def _tied() -> Program:
    """An embedding and a head that share one bfloat16 table."""
    text = """g (int64[batch,seq] input_ids, bfloat16[50,16] table) => (float[batch,seq,50] logits) {
      wide = Cast<to = 1>(table)
      x = Gather(wide, input_ids)
      again = Cast<to = 1>(table)
      t = Transpose<perm = [1, 0]>(again)
      logits = MatMul(x, t)
    }"""
    shape = (50, 16)
    rng = np.random.default_rng(0)
    array = rng.standard_normal(shape).astype(ir.DataType.BFLOAT16.numpy())
    proto = onnx.parser.parse_model(HEADER + text)
    model = ir.from_proto(proto)
    table = model.graph.inputs.pop()
    table.const_value = ir.tensor(array, name="table")
    model.graph.register_initializer(table)
    return Program(model, Task.GENERIC, Source("memory", "tied"))


def test_tied_weights_stay_one_and_keep_their_type() -> None:
    source = _tied()
    result = canonical(source)
    (table,) = result.graph.initializers.values()
    assert table.dtype == ir.DataType.BFLOAT16
    assert sorted(_ops(result)) == ["Cast", "Cast", "Gather", "MatMul", "Transpose"]
    assert result.weight_bytes() == source.weight_bytes()
    assert_same_outputs(source, result, {"batch": 2, "seq": 3, "past": 0})


def test_one_tensor_under_two_names_becomes_one_weight() -> None:
    text = "g (float[seq,8] x, float[8,8] a, float[8,8] b) => (float[seq,8] y) { u = MatMul(x, a)\n y = MatMul(u, b) }"
    one = program(text)
    tensor = ir.tensor(np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32))
    for value in list(one.graph.inputs)[1:]:
        one.graph.inputs.remove(value)
        value.const_value = tensor
        one.graph.register_initializer(value)
    result = canonical(one)
    assert len(result.graph.initializers) == 1


@pytest.mark.parametrize("size", [2, 8, 64])
def test_transposes_and_casts_of_weights_are_never_folded(size: int) -> None:
    text = f"""g (float[seq,{size}] x, float16[{size},{size}] w) => (float[seq,{size}] y) {{
      c = Cast<to = 1>(w)
      t = Transpose<perm = [1, 0]>(c)
      y = MatMul(x, t)
    }}"""
    one = program(text)
    weight = one.graph.inputs.pop()
    weight.const_value = ir.tensor(np.ones((size, size), dtype=np.float16))
    one.graph.register_initializer(weight)
    result = canonical(one)
    assert _ops(result) == ["Cast", "Transpose", "MatMul"]
    assert result.weight_bytes() <= one.weight_bytes()


def test_a_big_constant_node_becomes_a_weight_and_is_not_computed_with() -> None:
    one = program("g (float[seq,8] x) => (float[seq,8] y) { y = Identity(x) }")
    graph = one.graph
    read = []

    def load() -> ir.Tensor:
        read.append(True)
        return ir.tensor(np.ones((512, 512), dtype=np.float32))

    tensor = ir.LazyTensor(load, dtype=ir.DataType.FLOAT, shape=ir.Shape((512, 512)), name="big")
    constant = ir.node("Constant", [], {"value": ir.AttrTensor("value", tensor)})
    product = ir.node("ReduceSum", [constant.outputs[0]], {"keepdims": 0})
    total = ir.node("Add", [graph.inputs[0], product.outputs[0]])
    total.outputs[0].name, total.outputs[0].type = "z", ir.TensorType(ir.DataType.FLOAT)
    graph.extend([constant, product, total])
    graph.outputs.append(total.outputs[0])
    result = canonical(one)
    assert not read
    assert any(value.const_value.nbytes == 1 << 20 for value in result.graph.initializers.values())
    assert "Constant" not in _ops(result)


def test_size_does_not_grow() -> None:
    text = """g (float[seq,4] x) => (float[seq,4] y, float[64,64] t) <float one = {1.0}, int64[2] shape = {64, 64}> {
      t = Expand(one, shape)
      y = Add(x, one)
    }"""
    one = program(text)
    result = canonical(one)
    assert "Expand" in _ops(result)
    assert result.weight_bytes() <= one.weight_bytes()


def test_symbolic_sizes_keep_their_names() -> None:
    text = """g (int64[batch,total] attention_mask, float[batch,2,past,4] p, float[batch,2,seq,4] n) =>
      (float[batch,2,t,4] y, int64[batch,total] m) {
      y = Concat<axis = 2>(p, n)
      m = Add(attention_mask, attention_mask)
    }"""
    result = canonical(program(text, Task.CAUSAL_LM))
    assert [str(size) for size in result.graph.outputs[0].shape] == ["batch", "2", "total", "4"]
    assert [str(size) for size in result.graph.inputs[0].shape] == ["batch", "total"]


def test_computed_shapes_become_constant() -> None:
    text = """g (float[batch,seq,12] x) => (float[batch,3,seq,4] y) {
      s = Shape(x)
      i0 = Constant<value_int = 0>()
      i1 = Constant<value_int = 1>()
      b = Gather(s, i0)
      n = Gather(s, i1)
      axes = Constant<value_ints = [0]>()
      b1 = Unsqueeze(b, axes)
      n1 = Unsqueeze(n, axes)
      h = Constant<value_ints = [3]>()
      d = Constant<value_ints = [4]>()
      target = Concat<axis = 0>(b1, n1, h, d)
      v = Reshape(x, target)
      y = Transpose<perm = [0, 2, 1, 3]>(v)
    }"""
    source = program(text)
    result = canonical(source)
    assert _ops(result) == ["Reshape", "Transpose"]
    assert_same_outputs(source, result, {"batch": 3, "seq": 5, "past": 0})


def test_a_reshape_that_keeps_every_axis_is_dropped() -> None:
    text = """g (float[batch,heads,seq,4] x, float[batch,6,4] z) => (float[batch,heads,seq,4] a, float[p,q,4] b) {
      same = Constant<value_ints = [0, 0, -1, 4]>()
      a0 = Reshape(x, same)
      a = Neg(a0)
      pairs = Constant<value_ints = [-1, 3, 4]>()
      b0 = Reshape(z, pairs)
      b = Neg(b0)
    }"""
    source = program(text)
    result = canonical(source)
    assert sorted(_ops(result)) == ["Neg", "Neg", "Reshape"]
    assert_same_outputs(source, result, {"batch": 2, "heads": 3, "seq": 5, "past": 0})


def test_products_of_flattened_rows_are_taken_directly() -> None:
    text = """g (float[batch,seq,12] x, float[12,6] w, float[6] b) => (float[batch,seq,6] y) {
      rows = Constant<value_ints = [-1, 12]>()
      s = Shape<start = 0, end = 2>(x)
      six = Constant<value_ints = [6]>()
      target = Concat<axis = 0>(s, six)
      flat = Reshape(x, rows)
      g = Gemm(flat, w, b)
      y = Reshape(g, target)
    }"""
    source = program(text)
    result = canonical(source)
    assert _ops(result) == ["MatMul", "Add"]
    assert_same_outputs(source, result, {"batch": 2, "seq": 3, "past": 0})


def test_outputs_that_are_inputs_or_equal_stay_outputs() -> None:
    text = """g (float[seq,4] x) => (float[seq,4] a, float[seq,4] b, float[seq,4] c) {
      a = Identity(x)
      b = Neg(x)
      c = Neg(x)
    }"""
    source = program(text)
    result = canonical(source)
    assert [value.name for value in result.graph.outputs] == ["a", "b", "c"]
    assert_same_outputs(source, result, {"batch": 1, "seq": 3, "past": 0})


def test_match_changes_nothing_and_apply_takes_only_the_given_sites() -> None:
    text = """g (float[seq,16] x) => (float[seq,16] y, float[seq,16] z)
    <float r = {1.4142135}, float o = {1.0}, float h = {0.5}> {
      a = Div(x, r)
      b = Erf(a)
      c = Add(b, o)
      d = Mul(x, c)
      y = Mul(d, h)
      e = Neg(y)
      f = Div(e, r)
      g = Erf(f)
      i = Add(g, o)
      j = Mul(e, i)
      z = Mul(j, h)
    }"""
    source = program(text)
    before = program_text(source)
    one = Canonicalize()
    match = one.match(source)
    assert program_text(source) == before
    assert [site.name for site in match.sites] == ["gelu", "gelu #2"]
    report = one.apply(source, match.sites[1:])
    assert list(report.rewritten) == ["gelu #2"]
    assert [item.site for item in report.left] == ["gelu"]
    assert _ops(source).count("Gelu") == 1
    assert one.contract is Contract.EQUIVALENT


@pytest.mark.parametrize("second", ["Identity(y)", "Identity(a)", "Dropout(y)", "Relu(x)"])
def test_an_output_given_twice_keeps_both_names(second: str) -> None:
    body = f"a = Relu(x)\n y = Identity(a)\n z = {second}"
    source = program(f"g (float[seq,4] x) => (float[seq,4] y, float[seq,4] z) {{ {body} }}")
    result = canonical(source)
    assert [value.name for value in result.graph.outputs] == ["y", "z"]
    assert_same_outputs(source, result, {"batch": 2, "seq": 3, "past": 0})
