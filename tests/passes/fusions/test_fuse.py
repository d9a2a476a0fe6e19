"""Fusions: the form they make, equal outputs, and honest reasons."""

import pytest
from graph_programs import SIZES, assert_same_outputs, canonical, program

from effc.errors import UsageError
from effc.ir.program import Program, Task
from effc.passes.base import Contract
from effc.passes.fuse import FUSIONS, Fuse

ATTENTION = """g (float[batch,seq,32] x, float[batch,2,past,8] past_k, float[batch,2,past,8] past_v,
    float[batch,seq,4] cos, float[batch,seq,4] sin, float[32,32] wq, float[32,16] wk, float[32,16] wv, float[8] w) =>
    (float[batch,seq,32] y, float[batch,2,total,8] present_k, float[batch,2,total,8] present_v)
    <int64[4] heads = {0, 0, 4, 8}, int64[4] kv_heads = {0, 0, 2, 8}, int64[3] rows = {0, 0, 32}> {
  q0 = MatMul(x, wq)
  q1 = Reshape(q0, heads)
  q2 = Transpose<perm = [0, 2, 1, 3]>(q1)
  q3 = RMSNormalization<axis = -1, epsilon = 1e-06>(q2, w)
  q = RotaryEmbedding(q3, cos, sin)
  k0 = MatMul(x, wk)
  k1 = Reshape(k0, kv_heads)
  k2 = Transpose<perm = [0, 2, 1, 3]>(k1)
  k = RotaryEmbedding(k2, cos, sin)
  v0 = MatMul(x, wv)
  v1 = Reshape(v0, kv_heads)
  v = Transpose<perm = [0, 2, 1, 3]>(v1)
  o, present_k, present_v = Attention<is_causal = 1>(q, k, v, , past_k, past_v)
  o1 = Transpose<perm = [0, 2, 1, 3]>(o)
  y = Reshape(o1, rows)
}"""


def _fused(source: Program, one: Fuse) -> tuple[Program, list[str], list[str]]:
    result = source.clone()
    match = one.match(result)
    report = one.apply(result, match.sites)
    return result, list(report.rewritten), [item.reason for item in match.left]


def _ops(one: Program) -> list[str]:
    return [node.op_type for node in one.graph]


def test_packed_heads_drop_the_transposes() -> None:
    source = canonical(program(ATTENTION, Task.CAUSAL_LM))
    result, rewritten, left = _fused(source, Fuse())
    assert rewritten == ["attention"]
    assert left == []
    assert _ops(source).count("Transpose") == 4
    assert "Transpose" not in _ops(result)
    assert _ops(result).count("Reshape") == 2
    for sizes in SIZES:
        assert_same_outputs(source, result, sizes)


def test_packed_heads_leave_inputs_that_are_already_split() -> None:
    text = """g (float[batch,4,seq,8] q, float[batch,4,seq,8] k, float[batch,4,seq,8] v) => (float[batch,4,seq,8] y) {
      y = Attention(q, k, v)
    }"""
    source = canonical(program(text))
    result, rewritten, left = _fused(source, Fuse())
    assert rewritten == []
    assert len(left) == 1
    assert "queries" in left[0]
    assert _ops(result) == ["Attention"]


def test_plain_sums_before_norms_and_gelu_only() -> None:
    text = """g (float[batch,seq,16] x, float[batch,seq,16] r, float[16] w, float[16] b) => (float[batch,seq,16] y) {
      s = Add(x, r)
      n = LayerNormalization<axis = -1>(s, w, b)
      a = Add(n, b)
      g = Gelu(a)
      y = Add(g, s)
    }"""
    source = canonical(program(text))
    result, rewritten, _ = _fused(source, Fuse(fusions=("plain-sums",)))
    assert len(rewritten) == 2
    assert _ops(result) == ["Sum", "LayerNormalization", "Sum", "Gelu", "Add"]
    for sizes in SIZES[:3]:
        assert_same_outputs(source, result, sizes)


def test_options() -> None:
    assert Fuse().fusions == FUSIONS
    assert Fuse.contract is Contract.EQUIVALENT
    with pytest.raises(UsageError, match="packed-heads, plain-sums"):
        Fuse(fusions=("skip-norm",))
