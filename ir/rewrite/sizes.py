"""Symbolic sizes: whole numbers or expressions over named sizes, with arithmetic that keeps relations.

A size is an `int` or an `onnx_ir.SymbolicDim`; equal expressions have equal text (`past + seq`), an unknown size is
`SymbolicDim(None)` and equals nothing, not even itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import onnx_ir as ir

Size = int | ir.SymbolicDim
UNKNOWN = ir.SymbolicDim(None)


def is_known(size: Size) -> bool:
    """Whether the size is a number or an expression."""
    return isinstance(size, int) or size.value is not None


def same(left: Size, right: Size) -> bool:
    """Whether two sizes are proven equal."""
    return is_known(left) and is_known(right) and left == right


def same_shape(left: Sequence[Size], right: Sequence[Size]) -> bool:
    """Whether two shapes are proven equal."""
    return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right))


@lru_cache(maxsize=4096)
def normal(size: Size) -> Size:
    """The size with its expression in canonical order; an expression without symbols becomes an `int`."""
    if isinstance(size, int) or size.value is None:
        return size
    try:
        expression = size._expr
    except ValueError:
        return size  # a name that is not an expression, such as `batch-size`
    if expression is None:
        return size
    if expression.is_Integer:
        return int(expression)
    return size if expression.is_Symbol else ir.SymbolicDim(expression)


@lru_cache(maxsize=16384)
def add(left: Size, right: Size) -> Size:
    """The sum."""
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    if not (is_known(left) and is_known(right)):
        return UNKNOWN
    return normal(left + right)


@lru_cache(maxsize=16384)
def multiply(left: Size, right: Size) -> Size:
    """The product."""
    if isinstance(left, int) and isinstance(right, int):
        return left * right
    if not (is_known(left) and is_known(right)):
        return 0 if 0 in (left, right) else UNKNOWN
    return normal(left * right)


def subtract(left: Size, right: Size) -> Size:
    """The difference."""
    return add(left, multiply(right, -1))


@lru_cache(maxsize=16384)
def divide(left: Size, right: Size) -> Size:
    """The quotient rounded down, for non-negative sizes; unknown when dividing by zero."""
    if right == 0 or not (is_known(left) and is_known(right)):
        return UNKNOWN
    if isinstance(left, int) and isinstance(right, int):
        return left // right
    if same(left, right):
        return 1
    numerator = left if isinstance(left, ir.SymbolicDim) else ir.SymbolicDim("one") * 0 + left
    return normal(numerator // right)


def exact_quotient(left: Size, right: Size) -> Size:
    """`left / right` when it divides without rest for all values of the symbols, else unknown."""
    quotient = divide(left, right)
    return quotient if is_known(quotient) and same(multiply(quotient, right), left) else UNKNOWN


def product(sizes: Iterable[Size]) -> Size:
    """The product of all; 1 for none."""
    result: Size = 1
    for size in sizes:
        result = multiply(result, size)
    return result


def broadcast(left: Sequence[Size], right: Sequence[Size]) -> tuple[Size, ...]:
    """Shape of an elementwise operation, numpy rules."""
    rank = max(len(left), len(right))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in (left, right)]
    return tuple(_broadcast_size(a, b) for a, b in zip(*padded))


def _broadcast_size(left: Size, right: Size) -> Size:
    if left == 1 or same(left, right):
        return right
    if right == 1:
        return left
    if isinstance(left, int):
        return left
    return right if isinstance(right, int) else UNKNOWN


def shape_of(value: ir.Value | None) -> tuple[Size, ...] | None:
    """The shape of a value in canonical sizes; None when its rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(normal(size) for size in value.shape)


def shape_text(shape: Sequence[Size] | None) -> str:
    """A shape for messages: `[batch, seq, 64]`, `?` for what is unknown."""
    if shape is None:
        return "?"
    return f"[{', '.join(str(size) if is_known(size) else '?' for size in shape)}]"


def substitute(size: Size, symbol: str, replacement: Size) -> Size:
    """The size with one symbol replaced by an expression."""
    if isinstance(size, int) or size.value is None or symbol not in size.free_symbols():
        return size
    if size.value == symbol:
        return replacement
    import sympy

    expression = size._expr
    assert expression is not None
    new = replacement if isinstance(replacement, int) else replacement._expr
    target = next(atom for atom in expression.free_symbols if str(atom) == symbol)
    return normal(ir.SymbolicDim(sympy.sympify(expression.subs(target, new))))
