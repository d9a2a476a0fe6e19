"""Embedding sites: rows looked up in a stored 2-D table."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from effc.ir.analysis.layer_names import unique_names
from effc.ir.analysis.linear import matrix_shape, stored_matrix, weight_readers
from effc.ir.rewrite.dataflow import attribute_int, is_op, sole_consumer


@dataclass(frozen=True)
class EmbeddingSite:
    """`y = table[indices]` with a table that is stored in the file.

    Attributes:
        name: The table's name, for reports only.
        node: The `Gather`.
        indices: Which rows, any shape.
        output: The rows `[…, width]`, after a `Cast` that directly follows the lookup.
        weight: The initializer, in its stored type.
        route: Nodes between initializer and lookup (`Cast`), from the initializer on.
        rows: Rows of the table.
        width: Elements of a row.
        uses: How many nodes read the table, through casts and transposes: more than one means it is tied.
    """

    name: str
    node: ir.Node
    indices: ir.Value
    output: ir.Value
    weight: ir.Value
    route: tuple[ir.Node, ...]
    rows: int
    width: int
    uses: int


def embedding_sites(graph: ir.Graph) -> tuple[EmbeddingSite, ...]:
    """All embedding sites of a graph, in order."""
    return unique_names([site for node in graph if (site := embedding_site(node)) is not None])


def embedding_site(node: ir.Node) -> EmbeddingSite | None:
    """The site of one node; None when it does not look up rows of a stored 2-D table."""
    if not is_op(node, "Gather") or attribute_int(node, "axis", 0) != 0 or node.inputs[1] is None:
        return None
    found = stored_matrix(node.inputs[0])
    if found is None or found[2]:
        return None
    weight, route, _ = found
    cast = sole_consumer(node.outputs[0])
    output = cast.outputs[0] if cast is not None and is_op(cast, "Cast") else node.outputs[0]
    return EmbeddingSite(
        str(weight.name),
        node,
        node.inputs[1],
        output,
        weight,
        route,
        *matrix_shape(weight),
        len(weight_readers(weight)),
    )
