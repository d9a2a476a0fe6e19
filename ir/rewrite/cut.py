"""A model cut down to what some of its values depend on."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from effc.errors import InputError
from effc.ir.rewrite.edit import remove_dead


def cut_to(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy that gives the named values and computes nothing else.

    Raises:
        InputError: There is no such value.
    """
    copy = model.clone()
    graph = copy.graph
    values = {value.name: value for node in graph for value in node.outputs}
    values.update({value.name: value for value in (*graph.inputs, *graph.initializers.values())})
    missing = [name for name in names if name not in values]
    if missing:
        raise InputError(f"the graph has no value {', '.join(map(repr, missing))}.")
    graph.outputs[:] = [values[name] for name in dict.fromkeys(names)]
    remove_dead(graph)
    return copy
