"""Finds the products and row lookups that read a weight, through the casts and transposes between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from effc.ir.analysis.linear import is_plain_gemm
from effc.ir.rewrite.dataflow import attribute_int, is_op, permutation


@dataclass(frozen=True)
class WeightReader:
    """One product or row lookup of a weight.

    Attributes:
        node: The `MatMul`, `Gemm` or `Gather`.
        path: Nodes between the weight and `node`, in that order.
        operand_index: Which input of `node` is the other operand: activations of a product, indices of a lookup. Not
            the value itself, which may be the result of another reader that is rewritten first.
        bias: Bias of a `Gemm`, else None.
        result: The value that holds the fp32 result.
        after: The `Cast` behind a lookup of a half-precision table, else None.
        transposed: The stored matrix is [K, N] and must be transposed to become [N, K].
    """

    node: ir.Node
    path: tuple[ir.Node, ...]
    operand_index: int
    bias: ir.Value | None
    result: ir.Value
    after: ir.Node | None
    transposed: bool

    @property
    def is_gather(self) -> bool:
        """Whether this is a row lookup."""
        return self.node.op_type == "Gather"

    def path_from_result(self) -> Iterator[ir.Node]:
        """All nodes of the site, last first, so that each can be removed when nothing reads it."""
        if self.after is not None:
            yield self.after
        yield self.node
        yield from reversed(self.path)


def weight_readers(weight: ir.Value) -> tuple[list[WeightReader], str]:
    """The readers of a 2-D weight.

    Returns:
        The readers and an empty string; or an empty list and the reason why some reader does not fit.
    """
    if weight.is_graph_output() or weight.is_graph_input():
        return [], "it is an input or output of the graph"
    readers: list[WeightReader] = []
    for path, node, index in _consumers(weight, ()):
        if node.graph is not weight.graph:
            where = f"node {node.name!r} ({node.op_type})"
            return [], f"{where} reads it inside a branch or loop, where it is no constant"
        reader = _reader(path, node, index)
        if isinstance(reader, str):
            return [], reader
        readers.append(reader)
    if not readers:
        return [], "no node reads it"
    if len({reader.transposed for reader in readers}) > 1:
        return [], "it is read both as [N, K] and as [K, N]"
    return readers, ""


def _consumers(
    value: ir.Value, path: tuple[ir.Node, ...]
) -> Iterator[tuple[tuple[ir.Node, ...], ir.Node, int]]:
    """Consumers of a weight, looking through widening casts, transposes and identities."""
    for node, at in value.uses():
        through = is_op(node, "Cast", "Transpose", "Identity") and not node.outputs[0].is_graph_output()
        if through and len(path) < 4:
            yield from _consumers(node.outputs[0], (*path, node))
        else:
            yield path, node, at


def _reader(path: tuple[ir.Node, ...], node: ir.Node, index: int) -> WeightReader | str:
    where = f"node {node.name!r} ({node.op_type})"
    if not is_op(node, "MatMul", "Gemm", "Gather"):
        return f"{where} reads it, which is neither a matrix product nor a row lookup"
    if any(step.op_type == "Transpose" and permutation(step) != (1, 0) for step in path):
        return f"{where} reads it through a transpose that is not of two axes"
    flips = sum(step.op_type == "Transpose" for step in path) % 2
    if node.op_type == "Gather":
        return _gather(path, node, index, flips, where)
    return _product(path, node, index, flips, where)


def _gather(path: tuple[ir.Node, ...], node: ir.Node, index: int, flips: int, where: str) -> WeightReader | str:
    operand = node.inputs[1]
    if index != 0 or flips or attribute_int(node, "axis", 0) != 0 or operand is None:
        return f"{where} looks up something other than rows"
    if node.outputs[0].dtype == ir.DataType.FLOAT:
        return WeightReader(node, path, 1, None, node.outputs[0], None, False)
    uses = list(node.outputs[0].uses())
    if len(uses) == 1 and _widens(uses[0].node) and not node.outputs[0].is_graph_output():
        after = uses[0].node
        return WeightReader(node, path, 1, None, after.outputs[0], after, False)
    return f"{where} gives rows that are not widened to fp32"


def _widens(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.attributes.get_int("to") == int(ir.DataType.FLOAT)


def _product(path: tuple[ir.Node, ...], node: ir.Node, index: int, flips: int, where: str) -> WeightReader | str:
    operand, weight = node.inputs[0], node.inputs[1]
    if index != 1 or operand is None or weight is None:
        return f"{where} has it as left operand"
    if weight.dtype not in (None, ir.DataType.FLOAT) or operand.dtype not in (None, ir.DataType.FLOAT):
        return f"{where} does not compute in fp32"
    bias = None
    if node.op_type == "Gemm":
        if not is_plain_gemm(node):
            return f"{where} scales or transposes its operands"
        flips = (flips + attribute_int(node, "transB", 0)) % 2
        bias = node.inputs[2] if len(node.inputs) > 2 else None
    return WeightReader(node, path, 0, bias, node.outputs[0], None, transposed=not flips)
