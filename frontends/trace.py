"""From a torch module to an ONNX graph: `torch.export`, then `torch.onnx`, without touching a weight."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from effc.errors import InputError
from effc.frontends import sizes
from effc.frontends.environment import require
from effc.frontends.interface import Interface
from effc.ir.program import OPSET

_SUGGESTED_LIMIT = re.compile(r"^\s*(\w+) = Dim\('\w+', (?:min=\d+, )?max=(\d+)\)", re.MULTILINE)


def trace(interface: Interface, progress: Callable[[str], None]) -> tuple[ir.Model, tuple[str, ...]]:
    """Export the interface's module at opset 24, unoptimised, sizes and ports named.

    Parameters stay torch tensors that the exporter never reads; they carry the names of the module's parameters.

    Returns:
        The model, and notes (limits the module itself puts on a size).

    Raises:
        InputError: The module cannot be traced or has an operator without an ONNX form.
    """
    progress("tracing the model (torch.export)")
    exported, limits = _export_within_limits(interface)
    progress("converting to ONNX")
    model = to_onnx(exported, _name(interface))
    name_ports(model.graph, tuple(interface.inputs), interface.outputs)
    sizes.name_sizes(model.graph, interface.axes)
    return model, tuple(f"The model limits {name} to {limit}." for name, limit in limits.items())


def _export_within_limits(interface: Interface) -> tuple[Any, dict[str, int]]:
    """Export, taking over the upper limits that the trace finds (a position table, for example)."""
    limits: dict[str, int] = {}
    while True:
        try:
            return _export(interface, limits), limits
        except Exception as error:
            found = {name: int(limit) for name, limit in _SUGGESTED_LIMIT.findall(str(error))}
            if not found or found.items() <= limits.items():
                raise InputError(
                    f"{_name(interface)}: cannot be traced by torch.export: {_first_lines(error)}. "
                    "Export it yourself and pass the ExportedProgram or an ONNX file."
                ) from error
            limits.update(found)


def _export(interface: Interface, limits: Mapping[str, int]) -> Any:
    torch: Any = require("torch", "Tracing a model")
    named: dict[str, Any] = {}

    def dimension(name: str) -> Any:
        # `past + seq` is no dimension torch.export can state over several inputs: `total` is free in the trace.
        if name == sizes.TOTAL:
            return torch.export.Dim.DYNAMIC
        return named.setdefault(name, torch.export.Dim(name, max=limits.get(name)))

    dynamic = [{axis: dimension(name) for axis, name in axes.items()} for axes in interface.axes]
    plain = len(dynamic) - interface.variadic
    shapes: tuple[Any, ...] = tuple(dynamic[:plain])
    if interface.variadic:
        shapes = (*shapes, tuple(dynamic[plain:]))
    with torch.no_grad():
        return torch.export.export(
            interface.module, tuple(interface.inputs.values()), dynamic_shapes=shapes, strict=False
        )


def to_onnx(exported: Any, name: str) -> ir.Model:
    """Convert an `ExportedProgram` to ONNX at opset 24 without optimising it.

    The optimiser must not run here: on unread weights it would merge different tensors that look alike.
    """
    torch: Any = require("torch", "Converting a model to ONNX")
    try:
        program = torch.onnx.export(
            exported,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            verbose=False,
            custom_translation_table=_translations(),
        )
    except Exception as error:
        raise InputError(f"{name}: has no ONNX form: {_first_lines(error.__cause__ or error)}.") from error
    model = program.model
    RemoveUnusedNodesPass()(model)
    return model


def _translations() -> dict[Any, Any] | None:
    """Lowerings for operators that torch lacks or gets wrong (grouped expert products, floor division)."""
    try:
        from transformers.exporters.exporter_onnx import _ONNX_TRANSLATION_TABLE
    except ImportError:
        return None
    return dict(_ONNX_TRANSLATION_TABLE)


def name_ports(graph: ir.Graph, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    """Give inputs and outputs their names; an output that is an input or appears twice goes through `Identity`."""
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    seen: set[int] = set()
    for index, (value, name) in enumerate(zip(list(graph.outputs), outputs, strict=True)):
        if value.is_graph_input() or value.is_initializer() or id(value) in seen:
            identity = ir.node("Identity", [value])
            identity.outputs[0].shape, identity.outputs[0].type = value.shape, value.type
            graph.append(identity)
            graph.outputs[index] = value = identity.outputs[0]
        seen.add(id(value))
        value.name = name


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:600]}"


def _name(interface: Interface) -> str:
    return type(getattr(interface.module, "model", interface.module)).__name__
