"""Lets the caller ask for the logits of the last tokens only: a prompt needs those of its last one.

The vocabulary product is often most of the prefill of a small model. The graph gets an input `num_logits` whose default
means all, so an engine that is run without it gives every logit.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from effc.ir.program import Program, Task

NAME = "num_logits"
ALL = np.iinfo(np.int64).max
ROWWISE = frozenset({"Add", "Mul", "Div", "Sub", "Tanh", "Cast", "Identity"})
"""Ops that may stand between the vocabulary product and the output: they treat every token alone."""


def add_num_logits(program: Program) -> bool:
    """Give a causal language model the input `num_logits` (int64 [1], by default all).

    Returns:
        Whether the logits come from one product over the vocabulary that nothing else reads.
    """
    graph = program.graph
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    taken = NAME in graph.initializers or any(value.name == NAME for value in graph.inputs)
    if program.task != Task.CAUSAL_LM or logits is None or taken:
        return False
    path = _path_to_product(logits)
    if not path:
        return False
    product = path[-1]
    hidden = product.inputs[0]
    assert hidden is not None
    count = _input(graph)
    tape = Tape()
    first = tape.op("Neg", [count])
    end, axis = (
        tape.op("Constant", [], {"value": ir.Tensor(np.array([number], np.int64), name=name)})
        for name, number in (("end", ALL), ("axis", 1))
    )
    kept = tape.op("Slice", [hidden, first, end, axis])
    kept.type = hidden.type
    kept.shape = _shortened(hidden)
    graph.insert_before(product, list(tape.nodes))
    product.replace_input_with(0, kept)
    for node in path:
        node.outputs[0].shape = _shortened(node.outputs[0])
    return True


def _path_to_product(logits: ir.Value) -> list[ir.Node]:
    """Nodes from the output back to the vocabulary product; empty when there is no such path."""
    path: list[ir.Node] = []
    value: ir.Value | None = logits
    while value is not None:
        node = value.producer()
        if node is None or not _read_once(value, logits):
            return []
        path.append(node)
        if node.op_type in ("CodedMatMul", "MatMul") and _tokens(node.inputs[0]):
            return path
        if node.op_type not in ROWWISE:
            return []
        by_token = [item for item in node.inputs if not _same_for_all_tokens(item)]
        value = by_token[0] if len(by_token) == 1 and _tokens(by_token[0]) else None
    return []


def _read_once(value: ir.Value, logits: ir.Value) -> bool:
    """Whether nothing but the output `logits` depends on a value on the way to it."""
    if value is logits:
        return not value.uses()
    return len(value.uses()) == 1 and not value.is_graph_output()


def _same_for_all_tokens(value: ir.Value | None) -> bool:
    """Whether an operand of an elementwise op has no axis of tokens."""
    return value is not None and value.shape is not None and (len(value.shape) < 2 or value.shape[-2] == 1)


def _tokens(value: ir.Value | None) -> bool:
    """Whether a value is [batch, seq, width], computed from the tokens."""
    return value is not None and value.shape is not None and len(value.shape) == 3 and not value.is_initializer()


def _shortened(value: ir.Value) -> ir.Shape | None:
    if value.shape is None:
        return None
    return ir.Shape([value.shape[0], "logits", value.shape[2]])


def _input(graph: ir.Graph) -> ir.Value:
    """The new input; an input that is also an initializer has a default."""
    value = ir.Value(
        name=NAME,
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape([1]),
        const_value=ir.Tensor(np.array([ALL], np.int64), name=NAME),
    )
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value
