"""Masks: windows survive, hidden rows give no NaN, and what a mask says is read from any spelling."""

import numpy as np
import onnx_ir as ir
import pytest
from graph_programs import assert_same_outputs, canonical, program, random_feeds, run

from effc.ir.analysis.attention import attention_sites
from effc.ir.analysis.masks import mask_meaning
from effc.ir.program import Task

INPUTS = "float[batch,2,seq,8] q, float[batch,2,seq,8] k, float[batch,2,seq,8] v"
CACHED = INPUTS + ", float[batch,2,past,8] past_k, float[batch,2,past,8] past_v, int64[batch,total] attention_mask"
OUTPUTS = "float[batch,2,seq,8] y, float[batch,2,total,8] present_k, float[batch,2,total,8] present_v"
POSITIONS = """
  past0 = Shape<start = 2, end = 3>(past_k)
  past = Squeeze(past0)
  seq0 = Shape<start = 2, end = 3>(q)
  seq = Squeeze(seq0)
  total = Add(past, seq)
  zero = Constant<value_int = 0>()
  one = Constant<value_int = 1>()
  axes = Constant<value_ints = [1]>()
  keys = Range(zero, total, one)
  first = Range(zero, seq, one)
  shifted = Add(first, past)
  queries = Unsqueeze(shifted, axes)
"""
ATTENTION = """
  present_k = Concat<axis = 2>(past_k, k)
  present_v = Concat<axis = 2>(past_v, v)
  y = Attention<scale = 0.25>(q, present_k, present_v, keep)
"""
WINDOWS = {
    "greater": "w = Constant<value_int = 4>()\n o = Sub(queries, w)\n recent = Greater(keys, o)",
    "less": "w = Constant<value_int = 4>()\n o = Sub(queries, w)\n recent = Less(o, keys)",
    "at_least": "w = Constant<value_int = 3>()\n o = Sub(queries, w)\n recent = GreaterOrEqual(keys, o)",
    "not": "w = Constant<value_int = -4>()\n o = Add(queries, w)\n old = LessOrEqual(keys, o)\n recent = Not(old)",
}


def _windowed(spelling: str):
    body = POSITIONS + WINDOWS[spelling] + "\n seen = LessOrEqual(keys, queries)\n keep = And(seen, recent)" + ATTENTION
    return program(f"g ({CACHED}) => ({OUTPUTS}) {{ {body} }}", Task.CAUSAL_LM)


@pytest.mark.parametrize("spelling", WINDOWS)
def test_window_survives_in_any_spelling(spelling: str) -> None:
    source = _windowed(spelling)
    result = canonical(source)
    (site,) = attention_sites(result.graph)
    assert (site.window, site.causal, site.understood, site.padding) == (4, True, True, None)
    for sizes in (
        {"batch": 1, "seq": 3, "past": 0},
        {"batch": 2, "seq": 9, "past": 0},
        {"batch": 1, "seq": 2, "past": 11},
    ):
        assert_same_outputs(source, result, sizes)


def test_window_differs_from_full_causal() -> None:
    full = POSITIONS + "keep = LessOrEqual(keys, queries)" + ATTENTION
    unlimited = canonical(program(f"g ({CACHED}) => ({OUTPUTS}) {{ {full} }}", Task.CAUSAL_LM))
    windowed = canonical(_windowed("greater"))
    short, long = ({"batch": 1, "seq": length, "past": 0} for length in (4, 12))
    for sizes, same in ((short, True), (long, False)):
        feeds = random_feeds(windowed, sizes)
        assert np.allclose(run(unlimited, feeds)[0], run(windowed, feeds)[0], atol=1e-5) == same


def test_a_mask_that_is_only_causal_becomes_the_attribute() -> None:
    full = POSITIONS + "keep = LessOrEqual(keys, queries)" + ATTENTION
    result = canonical(program(f"g ({CACHED}) => ({OUTPUTS}) {{ {full} }}", Task.CAUSAL_LM))
    assert [node.op_type for node in result.graph] == ["Attention"]
    (site,) = attention_sites(result.graph)
    assert site.causal
    assert site.mask is None


def test_a_mask_with_an_unknown_part_stays() -> None:
    spoiled = """
      other = Constant<value_int = 2>()
      odd = Mod(keys, other)
      even = Equal(odd, zero)
      seen = LessOrEqual(keys, queries)
      keep = And(seen, even)
    """
    source = program(f"g ({CACHED}) => ({OUTPUTS}) {{ {POSITIONS} {spoiled} {ATTENTION} }}", Task.CAUSAL_LM)
    result = canonical(source)
    (site,) = attention_sites(result.graph)
    assert not site.understood
    assert "Mod" in [node.op_type for node in result.graph]
    assert_same_outputs(source, result, {"batch": 2, "seq": 7, "past": 3})


def _hidden_row(dtype: str, lowest: str) -> str:
    inputs = ", ".join(f"{dtype}[batch,2,seq,16] {name}" for name in "qkv")
    return f"""g ({inputs}, bool[1,1,seq,seq] keep) => ({dtype}[batch,2,seq,16] y) {{
      scale32 = Constant<value_float = 0.25>()
      scale = CastLike(scale32, q)
      zero32 = Constant<value_float = 0.0>()
      zero = CastLike(zero32, q)
      lowest32 = Constant<value_float = {lowest}>()
      lowest = CastLike(lowest32, q)
      bias = Where(keep, zero, lowest)
      kt = Transpose<perm = [0, 1, 3, 2]>(k)
      s0 = MatMul(q, kt)
      s1 = Mul(s0, scale)
      s = Add(s1, bias)
      p = Softmax(s)
      y = MatMul(p, v)
    }}"""


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("lowest", ["-inf", "-3.4028235e38", "-65504.0"])
def test_hidden_rows_give_zero_and_no_nan(dtype: str, lowest: str) -> None:
    """Three spellings of the mask, one answer: 0 for the hidden row, the oracle's for the others."""
    result = canonical(program(_hidden_row(dtype, lowest)))
    feeds = random_feeds(result, {"batch": 1, "seq": 4, "past": 0})
    feeds["keep"] = np.tril(np.ones((1, 1, 4, 4), dtype=bool))
    feeds["keep"][0, 0, 1] = False
    (y,) = run(result, feeds)
    q, k, v = (feeds[name].astype(np.float64) for name in ("q", "k", "v"))
    scores = np.where(feeds["keep"], q @ k.transpose(0, 1, 3, 2) * 0.25, -1e300)
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * feeds["keep"]
    oracle = weights @ v / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    assert not np.isnan(y).any()
    assert np.all(y[:, :, 1] == 0)
    assert np.abs(y - oracle).max() < (1e-5 if dtype == "float" else 1e-2)


def test_additive_and_boolean_masks_join() -> None:
    masks = "float[1,2,seq,seq] bias, bool[batch,1,seq,seq] keep"
    text = f"""g ({INPUTS}, {masks}) => (float[batch,2,seq,8] y) <float lowest = {{-1e9}}> {{
      kt = Transpose<perm = [0, 1, 3, 2]>(k)
      s0 = MatMul(q, kt)
      s1 = Add(bias, s0)
      s = Where(keep, s1, lowest)
      p = Softmax(s)
      y = MatMul(p, v)
    }}"""
    source = program(text)
    result = canonical(source)
    assert [node.op_type for node in result.graph] == ["Where", "Attention"]
    assert_same_outputs(source, result, {"batch": 2, "seq": 5, "past": 0})


def test_a_window_to_both_sides_is_understood() -> None:
    text = f"""g ({INPUTS}) => (float[batch,2,seq,8] y) {{
      seq0 = Shape<start = 2, end = 3>(q)
      seq = Squeeze(seq0)
      zero = Constant<value_int = 0>()
      one = Constant<value_int = 1>()
      axes = Constant<value_ints = [1]>()
      keys = Range(zero, seq, one)
      queries = Unsqueeze(keys, axes)
      apart = Sub(queries, keys)
      distance = Abs(apart)
      w = Constant<value_int = 2>()
      keep = LessOrEqual(distance, w)
      y = Attention(q, k, v, keep)
    }}"""
    source = program(text)
    result = canonical(source)
    (site,) = attention_sites(result.graph)
    meaning = mask_meaning(site.mask)
    assert (meaning.upper, meaning.lower) == (2, -3)
    assert "Abs" not in [node.op_type for node in result.graph]
    for seq in (1, 3, 9):
        assert_same_outputs(source, result, {"batch": 2, "seq": seq, "past": 0})


def test_padding_is_named() -> None:
    padded = POSITIONS + (
        "seen = LessOrEqual(keys, queries)\n tokens = Cast<to = 9>(attention_mask)\n"
        "where = Constant<value_ints = [1, 2]>()\n wide = Unsqueeze(tokens, where)\n keep = And(wide, seen)"
    )
    result = canonical(program(f"g ({CACHED}) => ({OUTPUTS}) {{ {padded} {ATTENTION} }}", Task.CAUSAL_LM))
    (site,) = attention_sites(result.graph)
    assert site.padding is not None
    cast = site.padding.producer()
    assert cast is not None
    assert cast.inputs[0].name == "attention_mask"
    assert isinstance(site.keys, ir.SymbolicDim)
