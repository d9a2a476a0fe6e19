"""Remembers traced graphs: tracing takes most of an import and depends on the configuration alone."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

import effc
from effc.frontends.architecture import Architecture
from effc.frontends.interface import Interface
from effc.frontends.trace import trace
from effc.ir.program import OPSET
from effc.ir.store import Store, content_key
from effc.ir.weights import tensor_shape

FORMAT = 1
UNBOUND = "unbound"
"""External location of a parameter in a remembered graph; the frontend binds every one of them."""
LIMITS = "effc.limits"


def traced_graph(
    architecture: Architecture, interface: Interface, prefix: str, progress: Callable[[str], None]
) -> tuple[ir.Model, tuple[str, ...]]:
    """The traced graph of an architecture: from the store when the same was traced before, else traced now.

    Args:
        architecture: What is traced.
        interface: Its module, inputs and outputs.
        prefix: What the wrapper puts before parameter names.
        progress: Called with a sentence at every step.

    Returns:
        The model with unread parameters, and notes.

    Raises:
        InputError: The module cannot be traced.
        OutputError: The store cannot be written.
    """
    store = Store()
    key = _key(architecture, interface)
    found = _load(store, key)
    if found is not None:
        progress("using the graph traced before")
        return found
    model, notes = trace(interface, progress)
    ClearMetadataAndDocStringPass()(model)
    _save(store, key, model, notes, {prefix + name for name, _ in _parameters(interface)})
    return model, notes


def _parameters(interface: Interface) -> Any:
    return interface.module.model.named_parameters(remove_duplicate=False)


def _key(architecture: Architecture, interface: Interface) -> str:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnxscript", "onnx-ir")}
    return content_key(
        what="traced graph",
        format=FORMAT,
        effc=effc.__version__,
        opset=OPSET,
        versions=versions,
        model_class=architecture.model_class.__name__,
        encoder_only=architecture.encoder_only,
        attention=str(getattr(interface.module.model.config, "_attn_implementation", None)),
        task=str(architecture.task),
        config=_named_by_content(architecture.config.to_dict()),
        inputs={name: list(tensor.shape) for name, tensor in interface.inputs.items()},
        axes=[dict(axes) for axes in interface.axes],
        outputs=interface.outputs,
    )


def _named_by_content(config: Any) -> Any:
    """A configuration without the places it was read from, which say nothing about the graph."""
    if isinstance(config, dict):
        return {key: _named_by_content(value) for key, value in config.items() if key != "_name_or_path"}
    return config


def _save(store: Store, key: str, model: ir.Model, notes: tuple[str, ...], parameters: set[str]) -> None:
    """Write the graph with its buffers and without its parameters."""
    shell = model.clone()
    for value in shell.graph.initializers.values():
        tensor = value.const_value
        if value.name in parameters and tensor is not None:
            shape = ir.Shape(tensor_shape(tensor))
            value.const_value = ir.ExternalTensor(
                UNBOUND, 0, tensor.nbytes, tensor.dtype, shape=shape, name=value.name, base_dir=""
            )
    shell.metadata_props[LIMITS] = json.dumps(notes)
    data = ir.to_proto(shell).SerializeToString()
    with store.writing(key) as file:
        file.write(data)


def _load(store: Store, key: str) -> tuple[ir.Model, tuple[str, ...]] | None:
    path = store.find(key)
    if path is None:
        return None
    try:
        model = ir.from_proto(onnx.ModelProto.FromString(path.read_bytes()))
        notes = tuple(json.loads(model.metadata_props.pop(LIMITS)))
    except (DecodeError, KeyError, ValueError):
        store.drop(key)
        return None
    return model, notes
