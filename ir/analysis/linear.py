"""Linear sites: products of activations with a stored 2-D weight."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from effc.ir.analysis.layer_names import unique_names
from effc.ir.rewrite.dataflow import (
    attribute_float,
    attribute_int,
    is_op,
    operands,
    permutation,
    producer,
    sole_consumer,
)
from effc.ir.rewrite.sizes import shape_of
from effc.ir.weights import is_weight


@dataclass(frozen=True)
class LinearSite:
    """`y = x @ Wᵀ + b` or `y = x @ W + b` with a weight that is stored in the file.

    Attributes:
        name: The weight's name, numbered when the weight is used several times. For reports only.
        node: The `MatMul` or `Gemm`.
        x: Activations `[…, K]`.
        output: What the site computes, bias included, `[…, N]`.
        weight: The initializer, in its stored type.
        route: Nodes between initializer and product (`Cast`, `Transpose`), from the initializer on.
        transposed: True when the weight is stored `[N, K]` (out, in), as torch does.
        n: Output features.
        k: Input features.
        bias: What is added to the product, a stored vector `[N]`; None when there is none.
        bias_node: The `Add` of the bias; None for `Gemm` or without bias.
        uses: How many nodes read the weight, through casts and transposes: more than one means it is tied.
    """

    name: str
    node: ir.Node
    x: ir.Value
    output: ir.Value
    weight: ir.Value
    route: tuple[ir.Node, ...]
    transposed: bool
    n: int
    k: int
    bias: ir.Value | None
    bias_node: ir.Node | None
    uses: int


def linear_sites(graph: ir.Graph) -> tuple[LinearSite, ...]:
    """All linear sites of a graph, in order."""
    sites = [site for node in graph if (site := linear_site(node)) is not None]
    return unique_names(sites)


def linear_site(node: ir.Node) -> LinearSite | None:
    """The site of one node; None when it is not a product with a stored 2-D weight."""
    if not is_op(node, "MatMul", "Gemm") or node.inputs[0] is None:
        return None
    found = stored_matrix(node.inputs[1])
    if found is None or (node.op_type == "Gemm" and not is_plain_gemm(node)):
        return None
    weight, route, flipped = found
    transposed = flipped != bool(node.op_type == "Gemm" and attribute_int(node, "transB", 0))
    rows, columns = matrix_shape(weight)
    n, k = (rows, columns) if transposed else (columns, rows)
    output, bias, bias_node = _with_bias(node, n)
    uses = len(weight_readers(weight))
    return LinearSite(
        str(weight.name), node, node.inputs[0], output, weight, route, transposed, n, k, bias, bias_node, uses
    )


def stored_matrix(value: ir.Value | None) -> tuple[ir.Value, tuple[ir.Node, ...], bool] | None:
    """`(initializer, route, flipped)` of a 2-D weight read through casts and transposes; None for anything else."""
    route: list[ir.Node] = []
    flipped = False
    while value is not None and not is_weight(value):
        node = producer(value, "Cast", "Transpose", "Identity")
        if node is None or (node.op_type == "Transpose" and permutation(node) != (1, 0)):
            return None
        flipped ^= node.op_type == "Transpose"
        route.append(node)
        value = node.inputs[0]
    if value is None or len(shape_of(value) or ()) != 2:
        return None
    return value, tuple(reversed(route)), flipped


def weight_readers(weight: ir.Value) -> list[ir.Node]:
    """The nodes that compute with a weight: its readers, seen through casts and transposes."""
    readers: list[ir.Node] = []
    for use in weight.uses():
        if is_op(use.node, "Cast", "Transpose", "Identity"):
            readers += weight_readers(use.node.outputs[0])
        else:
            readers.append(use.node)
    return list(dict.fromkeys(readers))


def is_plain_gemm(node: ir.Node) -> bool:
    """Whether a `Gemm` is `x @ W + b` with W perhaps transposed: nothing is scaled, and x is read as it is."""
    return (
        not attribute_int(node, "transA", 0)
        and attribute_float(node, "alpha", 1.0) == attribute_float(node, "beta", 1.0) == 1.0
    )


def matrix_shape(weight: ir.Value) -> tuple[int, int]:
    """Rows and columns of a stored 2-D weight."""
    assert weight.const_value is not None
    rows, columns = weight.const_value.shape.numpy()
    return rows, columns


def _with_bias(node: ir.Node, n: int) -> tuple[ir.Value, ir.Value | None, ir.Node | None]:
    product = node.outputs[0]
    if node.op_type == "Gemm":
        return product, node.inputs[2] if len(node.inputs) > 2 else None, None
    add = sole_consumer(product)
    if add is not None and is_op(add, "Add"):
        for operand, other in operands(add):
            stored = other if is_weight(other) else (producer(other, "Cast") or add).inputs[0]
            if operand is product and is_weight(stored) and shape_of(other) == (n,):
                return add.outputs[0], other, add
    return product, None, None
