"""Symbolic sizes: canonical text, arithmetic, and what is not known."""

import onnx_ir as ir
import pytest

from effc.ir.rewrite import sizes

PAST, SEQ = ir.SymbolicDim("past"), ir.SymbolicDim("seq")


def test_sums_have_one_spelling() -> None:
    assert sizes.add(PAST, SEQ) == sizes.add(SEQ, PAST) == sizes.normal(ir.SymbolicDim("seq + past"))
    assert sizes.subtract(sizes.add(PAST, SEQ), SEQ) == PAST
    assert sizes.subtract(PAST, PAST) == 0


def test_unknown_equals_nothing() -> None:
    assert not sizes.same(sizes.UNKNOWN, sizes.UNKNOWN)
    assert not sizes.is_known(sizes.add(sizes.UNKNOWN, 1))
    assert not sizes.is_known(sizes.divide(PAST, 0))


@pytest.mark.parametrize(
    ("left", "right", "quotient"),
    [(12, 4, 3), (13, 4, None), (sizes.multiply(SEQ, 6), 3, "2*seq"), (SEQ, 2, None), (SEQ, SEQ, 1)],
)
def test_exact_quotients(left: sizes.Size, right: sizes.Size, quotient: int | str | None) -> None:
    result = sizes.exact_quotient(left, right)
    assert (result == quotient) if quotient is not None else not sizes.is_known(result)


def test_broadcasting() -> None:
    assert sizes.broadcast((SEQ, 1), (4,)) == (SEQ, 4)
    assert sizes.broadcast((SEQ,), (SEQ,)) == (SEQ,)
    assert sizes.broadcast((SEQ,), (7,)) == (7,)
    assert not sizes.is_known(sizes.broadcast((SEQ,), (PAST,))[0])


def test_names_that_are_no_expressions_are_kept() -> None:
    odd = ir.SymbolicDim("batch-size?")
    assert sizes.same(sizes.normal(odd), odd)


def test_substitution() -> None:
    total = sizes.add(PAST, SEQ)
    assert sizes.substitute(ir.SymbolicDim("total"), "total", total) == total
    assert sizes.substitute(sizes.multiply(ir.SymbolicDim("total"), 2), "total", total) == sizes.multiply(total, 2)
    assert sizes.substitute(SEQ, "total", total) == SEQ
