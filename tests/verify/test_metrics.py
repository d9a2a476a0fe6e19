import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from effc.verify.metrics import (
    Difference,
    compare,
    kl_divergence,
    log_sum_exp,
    merge,
    negative_log_likelihood,
    same_bits,
)

NAN, INF = math.nan, math.inf


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_same_bits_tells_zeros_and_nan_payloads_apart() -> None:
    assert same_bits(f32(NAN, 0.0), f32(NAN, 0.0))
    assert not same_bits(f32(0.0), f32(-0.0))
    payload = np.array([0x7FC00001], np.uint32).view(np.float32)
    assert not same_bits(f32(NAN), payload)
    assert not same_bits(f32(1.0), np.array([1.0]))
    assert not same_bits(np.zeros((1, 2)), np.zeros((2, 1)))
    assert same_bits(np.zeros((0, 3)), np.zeros((0, 3)))
    assert same_bits(np.array(True), np.array(True))
    bf16 = np.arange(5).astype(ml_dtypes.bfloat16)
    assert same_bits(bf16, bf16.copy())
    assert same_bits(np.array(["a"], object), np.array(["a"], object))


def test_max_rel_is_relative_to_the_root_mean_square() -> None:
    found = compare(f32(3, 4, 0), f32(3, 4, 1))
    assert found.max_abs == 1
    assert found.max_rel == pytest.approx(1 / math.sqrt(25 / 3))
    assert compare(f32(0, 0), f32(0, 1)).max_rel == INF
    assert compare(f32(0, 0), f32(0, 0)).max_rel == 0
    assert compare(f32(), f32()) == Difference()


@pytest.mark.parametrize(
    ("reference", "value", "mismatched"),
    [
        (f32(NAN, 1), f32(NAN, 1), 0),
        (f32(INF, -INF), f32(INF, -INF), 0),
        (f32(1, 1), f32(NAN, 1), 1),
        (f32(NAN, NAN), f32(1, INF), 2),
        (f32(INF, 1), f32(-INF, 1), 1),
    ],
)
def test_not_finite_values_count(reference: np.ndarray, value: np.ndarray, mismatched: int) -> None:
    found = compare(reference, value)
    assert found.mismatched == mismatched
    assert (found.max_abs == INF) == bool(mismatched)
    figures = found.to_json()
    assert figures["max_abs"] == (None if mismatched else 0)
    assert figures.get("mismatched", 0) == mismatched


def test_another_shape_is_infinitely_far() -> None:
    found = compare(np.zeros((2, 3)), np.zeros((3, 2)))
    assert (found.bitwise, found.max_abs, found.mismatched) == (False, INF, 6)


def test_padding_counts_for_bits_only() -> None:
    reference, value = np.ones((2, 2, 3), np.float32), np.ones((2, 2, 3), np.float32)
    value[1, 0] = NAN
    valid = np.array([[True, True], [False, True]])
    found = compare(reference, value, valid=valid, classes=True)
    assert (found.bitwise, found.max_abs, found.top1, found.rows) == (False, 0, 1, 3)


def test_integers_are_compared_exactly() -> None:
    big = np.array([2**62, 2**62 + 1])
    assert compare(big, big[::-1]).max_abs == 1
    assert compare(np.array([0, 255], np.uint8), np.array([255, 0], np.uint8)).max_abs == 255
    assert compare(np.array([True, False]), np.array([True, True])).max_abs == 1
    assert compare(np.array(["a", "b"]), np.array(["a", "c"])).mismatched == 1


def test_top1_and_merge() -> None:
    a = compare(f32(1, 2).reshape(1, 2), f32(2, 1).reshape(1, 2), classes=True)
    rows = np.eye(3, dtype=np.float32)
    b = compare(rows, rows, classes=True)
    both = merge([a, b, Difference()])
    assert (both.top1, both.rows, both.bitwise) == (0.75, 4, False)
    assert both.max_abs == a.max_abs
    assert merge([]) == Difference()
    assert compare(np.zeros((0, 3)), np.zeros((0, 3)), classes=True).top1 is None


LOGITS = arrays.arrays(np.float32, (3, 7), elements=st.floats(-30, 30, width=32))


@given(LOGITS)
def test_log_sum_exp_and_loss_in_float64(logits: np.ndarray) -> None:
    wide = logits.astype(np.float64)
    expected = np.log(np.exp(wide).sum(axis=-1))
    np.testing.assert_allclose(log_sum_exp(logits), expected, rtol=1e-6, atol=1e-6)
    losses = negative_log_likelihood(logits, np.array([0, 6, 3]))
    np.testing.assert_allclose(losses, expected - wide[[0, 1, 2], [0, 6, 3]], atol=1e-5)


@given(LOGITS, LOGITS)
def test_kl_against_its_definition(a: np.ndarray, b: np.ndarray) -> None:
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(-1, keepdims=True) for x in (a, b))
    np.testing.assert_allclose(kl_divergence(a, b), (p * np.log(p / q)).sum(-1), atol=1e-4, rtol=1e-5)
    assert (kl_divergence(a, b) >= 0).all()
    assert not kl_divergence(a, a).any()


def test_masked_logits_and_nan_in_kl() -> None:
    masked = f32(1, -INF, 0).reshape(1, 3)
    assert kl_divergence(masked, masked)[0] == 0
    assert kl_divergence(masked, f32(1, 1, 0).reshape(1, 3))[0] > 0
    assert kl_divergence(f32(1, 1, 0).reshape(1, 3), masked)[0] == INF
    assert math.isnan(kl_divergence(f32(1, 2).reshape(1, 2), f32(NAN, 2).reshape(1, 2))[0])
