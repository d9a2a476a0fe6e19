"""Conversion of ONNX models to the opset of the IR."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from effc.frontends.environment import quiet
from effc.ir.program import OPSET

FIRST_NATIVE = 18
"""Oldest opset that onnxscript's converter takes; older ones first go through ONNX's own."""


def convert(model: ir.Model) -> list[str]:
    """Bring a model to opset 24 in place where the converters can.

    Weights are not touched: ONNX's own converter sees them as inputs.

    Returns:
        Notes; one says why when the model stays at its opset.
    """
    version = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx"))
    if version is None or version == OPSET:
        return []
    if version > OPSET:
        return [f"The model stays at opset {version}: there is no converter down to {OPSET}."]
    try:
        with quiet():
            if version < FIRST_NATIVE:
                _convert_old(model)
            _convert_native(model)
    except Exception as error:
        reached = model.graph.opset_imports.get("", version)
        reason = " ".join(str(error).split())[:200]
        return [f"The model stays at opset {reached}, the conversion to {OPSET} fails: {reason}."]
    return [f"Converted from opset {version} to {OPSET}."]


def _convert_native(model: ir.Model) -> None:
    from onnxscript import version_converter

    version_converter.convert_version(model, target_version=OPSET)
    reached = model.graph.opset_imports.get("")
    if reached != OPSET:
        raise ValueError(f"onnxscript's converter stops at {reached}")


def _convert_old(model: ir.Model) -> None:
    from onnx_ir.passes.common import _c_api_utils

    proto = _c_api_utils.call_onnx_api(
        lambda bare: onnx.version_converter.convert_version(bare, FIRST_NATIVE), model
    )
    converted = ir.serde.deserialize_model(proto)
    weights = {value.name: value for value in model.graph.initializers.values()}
    inputs = {value.name for value in model.graph.inputs}
    for value in list(converted.graph.inputs):
        if value.name in weights and value.name not in inputs:
            value.const_value = weights[value.name].const_value
            converted.graph.inputs.remove(value)
            converted.graph.register_initializer(value)
    model.graph = converted.graph
