"""Raise the spellings of GELU to ONNX `Gelu`, by what they compute.

From every `Erf` or `Tanh` the scalar function around it is cut out: elementwise nodes with constant numbers
that depend on one value x only. It is evaluated in float64 on a grid and compared with both definitions of GELU
(Hendrycks and Gimpel, 2016), so no spelling has to be listed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effc.ir.rewrite.constants import scalar
from effc.ir.rewrite.dataflow import is_op, sole_consumer
from effc.ir.rewrite.edit import insert_value, replace
from effc.ir.rewrite.sizes import same_shape, shape_of

OP = "Gelu"
GRID = np.linspace(-8.0, 8.0, 401)
TOLERANCE = 2e-6
"""Largest difference to GELU on the grid: constants are rounded to float32 in graphs."""
STEPS = 8
CONE = 24
"""Bounds of the search: nodes after the `Erf` or `Tanh`, and values looked at before."""


@dataclass(frozen=True)
class GeluSite:
    """A scalar function that is GELU of x; `approximate` is `none` or `tanh`."""

    output: ir.Value
    x: ir.Value
    approximate: str


def match_gelu(node: ir.Node) -> GeluSite | str | None:
    """The GELU around an `Erf` or `Tanh`; a reason when it multiplies x but is no GELU; None otherwise."""
    if not is_op(node, "Erf", "Tanh"):
        return None
    value: ir.Value = node.outputs[0]
    for _ in range(STEPS):
        user = _next_elementwise(value)
        if user is None:
            return None
        value = user.outputs[0]
        for x in _variables(value):
            approximate = _which(value, x)
            if approximate is not None:
                return GeluSite(value, x, approximate)
    return None


def _next_elementwise(value: ir.Value) -> ir.Node | None:
    node = sole_consumer(value)
    return node if node is not None and is_op(node, "Add", "Mul", "Div", "Sub") else None


def _variables(value: ir.Value) -> list[ir.Value]:
    """Values the expression is a function of alone: all its paths to anything but numbers lead through them."""
    return [x for x in _cone(value) if _depends_only_on(value, x) and _same_type(value, x)]


def _cone(value: ir.Value) -> list[ir.Value]:
    """Inner values of the elementwise expression that ends in `value`, nearest first."""
    found: dict[ir.Value, None] = {}
    frontier = [value]
    while frontier and len(found) < CONE:
        nearer, frontier = frontier, []
        for one in nearer:
            node = one.producer()
            if node is not None and is_op(node, *_OPERATIONS):
                frontier += [v for v in node.inputs if v is not None and scalar(v) is None and v not in found]
        found.update(dict.fromkeys(frontier))
    return list(found)


def _depends_only_on(value: ir.Value, x: ir.Value, depth: int = 16) -> bool:
    if value is x or scalar(value) is not None:
        return True
    node = value.producer()
    if depth == 0 or node is None or not is_op(node, *_OPERATIONS):
        return False
    return all(operand is not None and _depends_only_on(operand, x, depth - 1) for operand in node.inputs)


def _same_type(value: ir.Value, x: ir.Value) -> bool:
    shape, wanted = shape_of(x), shape_of(value)
    return shape is not None and wanted is not None and same_shape(shape, wanted) and x.dtype == value.dtype


_OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Tanh": np.tanh,
    "Erf": np.vectorize(math.erf, otypes=[np.float64]),
}


def _evaluate(value: ir.Value, x: ir.Value) -> np.ndarray:
    if value is x:
        return GRID
    number = scalar(value)
    if number is not None:
        return np.full_like(GRID, number)
    node = value.producer()
    assert node is not None
    return _OPERATIONS[node.op_type](*(_evaluate(operand, x) for operand in node.inputs if operand is not None))


def _which(value: ir.Value, x: ir.Value) -> str | None:
    with np.errstate(all="ignore"):
        result = _evaluate(value, x)
    exact = 0.5 * GRID * (1.0 + _OPERATIONS["Erf"](GRID / math.sqrt(2.0)))
    tanh = 0.5 * GRID * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (GRID + 0.044715 * GRID**3)))
    for name, wanted in (("none", exact), ("tanh", tanh)):
        if np.max(np.abs(result - wanted)) <= TOLERANCE:
            return name
    return None


def raise_gelu(site: GeluSite) -> None:
    """Put the one node in place of the spelled-out function."""
    before = site.output.producer()
    assert before is not None
    replace(site.output, insert_value(before, OP, [site.x], {"approximate": site.approximate}))
