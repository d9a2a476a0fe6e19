"""How many bytes the weights of a program take once its engine is loaded."""

from __future__ import annotations

import onnx_ir as ir

from effc.ir.dialect import is_dialect_node
from effc.ir.dialect.stored_weight import stored_weight
from effc.ir.program import Program


def weight_memory(program: Program) -> int:
    """Bytes of all weights in memory: coded ones in their runtime layout, the rest as stored.

    The runtime layout of a coded weight is the one the `lossless-weights` pass recorded for this machine.
    """
    runtime_bits = {
        entry["name"]: entry["runtime_bits"] * entry["shape"][0] * entry["shape"][1]
        for record in program.records
        for entry in record.details.get("tensors", ())
    }
    coded = _huffman_parts(program.graph)
    plain = {
        id(value.const_value): value.const_value.nbytes
        for value in program.graph.initializers.values()
        if value.const_value is not None and value not in coded
    }
    return sum(plain.values()) + round(sum(bits for name, bits in runtime_bits.items() if name in coded.values()) / 8)


def _huffman_parts(graph: ir.Graph) -> dict[ir.Value, str]:
    """Initializers that belong to a Huffman-coded weight, with the name of that weight."""
    parts: dict[ir.Value, str] = {}
    for node in graph.all_nodes():
        if is_dialect_node(node) and node.attributes.get_string("layout") == "huffman":
            weight = stored_weight(node)
            parts.update(dict.fromkeys(weight.tensors, weight.name))
    return parts
