"""Gated feed-forward sites: `down(activation(gate(x)) * up(x))` (Shazeer, "GLU Variants Improve Transformer", 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from effc.ir.analysis.linear import LinearSite, linear_sites
from effc.ir.rewrite.dataflow import attribute_int, is_op, operands, producer

_ACTIVATIONS = {"Gelu": "gelu", "Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Swish": "silu"}


@dataclass(frozen=True)
class GatedMlpSite:
    """A gated feed-forward block.

    Attributes:
        name: Name of the down weight, for reports only.
        gate: Linear site whose output is activated; the same as `up` when one product computes both.
        up: Linear site it is multiplied with.
        down: Linear site that follows.
        product: The `Mul` of both.
        activation: `silu`, `gelu`, `gelu-tanh`, `relu`, `sigmoid` or `tanh`.
    """

    name: str
    gate: LinearSite
    up: LinearSite
    down: LinearSite
    product: ir.Node
    activation: str


def gated_mlp_sites(graph: ir.Graph) -> tuple[GatedMlpSite, ...]:
    """All gated feed-forward sites of a graph, in order of their down products."""
    linears = linear_sites(graph)
    by_output = {site.output: site for site in linears}
    return tuple(site for down in linears if (site := _site(down, by_output)) is not None)


def _site(down: LinearSite, by_output: dict[ir.Value, LinearSite]) -> GatedMlpSite | None:
    product = producer(down.x, "Mul")
    if product is None:
        return None
    for activated, plain in operands(product):
        found = _activated(activated)
        up = _linear_of(plain, by_output)
        gate = _linear_of(found[0], by_output) if found is not None else None
        if found is not None and gate is not None and up is not None:
            return GatedMlpSite(down.name, gate, up, down, product, found[1])
    return None


def _activated(value: ir.Value) -> tuple[ir.Value, str] | None:
    """`(x, activation)` of an activated value."""
    node = producer(value, *_ACTIVATIONS, "Mul")
    if node is None or node.inputs[0] is None:
        return None
    if node.op_type == "Mul":
        for x, other in operands(node):
            sigmoid = producer(other, "Sigmoid")
            if sigmoid is not None and sigmoid.inputs[0] is x:
                return x, "silu"
        return None
    tanh = (
        is_op(node, "Gelu")
        and "approximate" in node.attributes
        and node.attributes["approximate"].as_string() == "tanh"
    )
    return node.inputs[0], "gelu-tanh" if tanh else _ACTIVATIONS[node.op_type]


def _linear_of(value: ir.Value, by_output: dict[ir.Value, LinearSite]) -> LinearSite | None:
    """The linear site a value comes from, directly or as a part of its split output."""
    split = value.producer()
    if (
        is_op(split, "Split", "Slice")
        and split is not None
        and split.inputs[0] is not None
        and attribute_int(split, "axis", -1)
    ):
        return by_output.get(split.inputs[0])
    return by_output.get(value)
