"""Makes a graph of its own of what the scores of a prompt depend on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from effc.backends.onnxruntime.interface import weight_entry
from effc.ir.dialect.stored_weight import reads_stored_weight
from effc.ir.program import Program
from effc.ir.prompt_filter import SCORES
from effc.ir.rewrite.cut import cut_to
from effc.ir.rewrite.edit import remove_dead
from effc.runtime.bundle import PromptFilter, SharedWeight

MODEL = "prompt_filter.onnx"


def take_prompt_filter(program: Program) -> ir.Model | None:
    """Take the scores out of a lowered program, which is left with the model alone.

    Returns:
        The graph of the scores: the first layers, no vocabulary, no outputs of the cache. Its initializers have the
        names of the program's and share their tensors. None when the program has no filter.
    """
    if program.prompt_filter is None:
        return None
    model = cut_to(program.model, [SCORES])
    graph = model.graph
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
    remove_dead(graph)
    graph.outputs[0].shape = ir.Shape(["batch", "seq"])
    rest = program.graph
    rest.outputs[:] = [value for value in rest.outputs if value.name != SCORES]
    remove_dead(rest)
    return model


def filter_entry(program: Program, model: ir.Model) -> PromptFilter:
    """What the manifest says about the filter; its weights must lie in their file."""
    kept = program.prompt_filter
    assert kept is not None
    weights = list(_shared(coded_weights(model.graph)))
    return PromptFilter(MODEL, kept.layer, kept.layers, kept.keep, kept.forced, weights)


def coded_weights(graph: ir.Graph) -> dict[ir.Value, None]:
    """Initializers that kernels of ours read as parts of weights, in order."""
    readers = [node for node in graph.all_nodes() if reads_stored_weight(node)]
    return {value: None for node in readers for value in node.inputs if value is not None and value.is_initializer()}


def _shared(values: Iterable[ir.Value]) -> Iterator[SharedWeight]:
    """Where they lie; those without content lie in the graph's own file."""
    for value in values:
        tensor = value.const_value
        assert tensor is not None
        if not tensor.nbytes:
            continue
        yield weight_entry(value)
