"""Weights of a checkpoint bound to the initializers of a traced graph, without reading them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from effc.errors import InputError


@dataclass(frozen=True)
class Weights:
    """Where the parameters of a model come from.

    Attributes:
        tensors: Parameter name in the module -> lazy tensor in its stored dtype.
        ties: Parameter -> the parameter whose tensor it shares; only pairs that really are one weight.
        notes: What was decided, one sentence each.
    """

    tensors: Mapping[str, ir.TensorProtocol]
    ties: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def resolve_ties(tensors: Mapping[str, ir.TensorProtocol], ties: Mapping[str, str]) -> Weights:
    """Decide which ties of the configuration hold in this checkpoint.

    A tie whose two names are both stored holds when their bytes are equal (compared tensor by tensor); one with
    a single stored name takes that one; an unequal pair stays two weights, as transformers loads it.
    """
    bound, kept, notes = dict(tensors), {}, []
    for target, source in ties.items():
        if target in bound and source in bound:
            if not equal(bound[target], bound[source]):
                notes.append(f"{target} and {source} are declared tied but differ in the checkpoint: kept apart.")
                continue
            del bound[target]
        elif target in bound:
            bound[source] = bound.pop(target)
        kept[target] = source
    return Weights(bound, kept, tuple(notes))


def equal(left: ir.TensorProtocol, right: ir.TensorProtocol) -> bool:
    """Whether two tensors hold the same bytes."""
    if left.dtype != right.dtype or tuple(left.shape) != tuple(right.shape):
        return False
    return bool(np.array_equal(_bytes(left), _bytes(right)))


def _bytes(tensor: ir.TensorProtocol) -> np.ndarray:
    return np.frombuffer(tensor.tobytes(), dtype=np.uint8)


def bind(graph: ir.Graph, prefix: str, model: Any, weights: Weights, where: str) -> None:
    """Replace the placeholder tensors of a traced graph by the weights.

    Initializers lose `prefix`; tied ones become one; a weight stored in another float type than the float32 the
    graph computes in is followed by a `Cast`. Buffers keep their computed values unless the checkpoint has them.

    Args:
        graph: Traced graph, edited in place.
        prefix: What the wrapper put before the parameter names.
        model: The module the names belong to.
        weights: The weights.
        where: What to call the checkpoint in errors.

    Raises:
        InputError: A parameter the graph needs is not in the checkpoint, or has another shape.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    merge_tied(graph, prefix, weights.ties)
    missing, mismatched = [], []
    for value in list(graph.initializers.values()):
        name = (value.name or "").removeprefix(prefix)
        tensor = weights.tensors.get(name)
        if tensor is None:
            if name in parameters:
                missing.append(name)
            else:
                _detach(value)
            continue
        expected = tuple(value.const_value.shape)  # type: ignore[union-attr]
        if tuple(tensor.shape) != expected:
            mismatched.append(f"{name} is {list(tensor.shape)}, the configuration says {list(expected)}")
            continue
        replace_weight(graph, value, name, tensor)
    if missing:
        raise InputError(f"{where}: lacks {_some(missing)}. The checkpoint does not fit the architecture.")
    if mismatched:
        raise InputError(f"{where}: {_some(mismatched)}. The checkpoint does not fit its config.json.")


def merge_tied(graph: ir.Graph, prefix: str, ties: Mapping[str, str]) -> None:
    """Let every tied initializer's uses read the one it shares."""
    for target, source in ties.items():
        duplicate, kept = graph.initializers.get(prefix + target), graph.initializers.get(prefix + source)
        if duplicate is None or duplicate is kept:
            continue
        if kept is None:
            graph.initializers.pop(prefix + target)
            duplicate.name = prefix + source
            graph.register_initializer(duplicate)
            continue
        ir.convenience.replace_all_uses_with(duplicate, kept)
        graph.initializers.pop(prefix + target)


def _detach(value: ir.Value) -> None:
    """Keep a buffer's values as a numpy copy, so that the graph holds on to no torch storage."""
    assert value.const_value is not None
    tensor = value.const_value
    array = np.array(tensor.numpy(), copy=True)
    value.const_value = ir.Tensor(array, dtype=tensor.dtype, shape=ir.Shape(array.shape), name=value.name)


def replace_weight(graph: ir.Graph, value: ir.Value, name: str, tensor: ir.TensorProtocol) -> None:
    """Put a weight in the place of a placeholder, with a `Cast` where it is stored in another dtype."""
    assert value.const_value is not None
    wanted = value.const_value.dtype
    graph.initializers.pop(value.name or "")
    shape = ir.Shape(tensor.shape)  # type: ignore[arg-type]
    weight = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(weight)
    if tensor.dtype == wanted:
        ir.convenience.replace_all_uses_with(value, weight, replace_graph_outputs=True)
        return
    cast = ir.node("Cast", [weight], {"to": wanted}, name=f"{name}.cast")
    output = cast.outputs[0]
    output.name, output.type, output.shape = f"{name}.{wanted.name.lower()}", ir.TensorType(wanted), weight.shape
    ir.convenience.replace_all_uses_with(value, output, replace_graph_outputs=True)
    graph.insert_before(graph[0], cast)


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
