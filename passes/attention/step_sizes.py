"""Sizes of a running step from its tokens, so that nothing asks a cache tensor, whose length is a capacity."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effc.ir.rewrite.constants import new_constant, new_integers
from effc.ir.rewrite.dataflow import is_op
from effc.ir.rewrite.edit import insert_value, replace


class StepSizes:
    """`batch`, `seq`, `total` and `past = total - seq` as int64[1], computed at the top of the graph.

    `everyone` is boolean `[batch, total]`, all true. What nothing reads in the end is dead.

    Args:
        graph: Gets the nodes.
        input_ids: `[batch, seq]`.
        attention_mask: `[batch, total]`.
    """

    def __init__(self, graph: ir.Graph, input_ids: ir.Value, attention_mask: ir.Value) -> None:
        first = graph[0]
        self.graph = graph
        self.batch = insert_value(first, "Shape", [input_ids], {"start": 0, "end": 1})
        self.seq = insert_value(first, "Shape", [input_ids], {"start": 1, "end": 2})
        self.total = insert_value(first, "Shape", [attention_mask], {"start": 1, "end": 2})
        self.past = insert_value(first, "Sub", [self.total, self.seq])
        shape = insert_value(first, "Concat", [self.batch, self.total], {"axis": 0})
        self.everyone = insert_value(first, "Expand", [new_constant(graph, np.array(True)), shape])

    def replace_shapes_of(self, tensor: ir.Value) -> None:
        """Let nothing ask a cache tensor `[batch, heads, length, size]` for its sizes."""
        length = self.past if tensor.is_graph_input() else self.total
        for node in [use.node for use in list(tensor.uses()) if is_op(use.node, "Shape")]:
            assert tensor.shape is not None
            heads, size = (tensor.shape[axis] for axis in (1, 3))
            assert isinstance(heads, int) and isinstance(size, int)
            dims = [self.batch, new_integers(self.graph, heads), length, new_integers(self.graph, size)]
            chosen = dims[node.attributes.get_int("start", 0) : node.attributes.get_int("end", 4)]
            result = chosen[0] if len(chosen) == 1 else insert_value(node, "Concat", chosen, {"axis": 0})
            replace(node.outputs[0], result, node)
            assert node.graph is not None
            node.graph.remove(node, safe=True)


def step_sizes(graph: ir.Graph) -> StepSizes | None:
    """The sizes of a step of a model that takes `input_ids` and `attention_mask`; None for other models."""
    inputs = {value.name: value for value in graph.inputs}
    tokens = [inputs.get(name) for name in ("input_ids", "attention_mask")]
    if any(value is None or value.shape is None or len(value.shape) != 2 for value in tokens):
        return None
    input_ids, attention_mask = tokens
    assert input_ids is not None and attention_mask is not None
    return StepSizes(graph, input_ids, attention_mask)
