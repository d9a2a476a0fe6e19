"""An architecture without weights, traced to a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from effc.errors import InputError
from effc.frontends import skeleton
from effc.frontends.architecture import Architecture
from effc.frontends.causal_lm import causal_lm_interface
from effc.frontends.encoder import encoder_interface
from effc.frontends.interface import Interface
from effc.frontends.trace_cache import traced_graph
from effc.frontends.vision import vision_interface
from effc.ir.program import Task

PREFIX = "model."
"""What the wrappers put before the parameter names of the model."""


@dataclass(frozen=True)
class Lowered:
    """A traced model whose weights are still placeholders.

    Attributes:
        whole: The module that was built; its names are those of the checkpoint.
        part: The module that was traced: `whole`, or its encoder.
        interface: Inputs, outputs, sizes.
        graph: The ONNX model; initializers are called `PREFIX` + name in `part`.
    """

    whole: Any
    part: Any
    interface: Interface
    graph: ir.Model

    @property
    def part_name(self) -> str:
        """Name of `part` inside `whole` with a trailing dot, empty for the whole."""
        if self.part is self.whole:
            return ""
        return next(name for name, module in self.whole.named_modules() if module is self.part) + "."


def lower(architecture: Architecture, progress: Callable[[str], None]) -> Lowered:
    """Build the architecture without weights and trace it.

    Raises:
        InputError: It cannot be built or traced.
    """
    try:
        return _lower(architecture, "sdpa", progress)
    except InputError as fused:
        # Some fused attentions have no ONNX form (Falcon's, for one); their separate products may have.
        try:
            return _lower(architecture, "eager", progress)
        except InputError:
            raise fused from None


def _lower(architecture: Architecture, attention: str, progress: Callable[[str], None]) -> Lowered:
    progress(f"building {architecture.model_class.__name__}")
    whole, notes = skeleton.build(architecture.model_class, architecture.config, attention)
    if attention == "eager":
        notes = (*notes, "Its fused attention has no ONNX form; attention is exported as separate products.")
    part = traced_part(whole, architecture)
    interface = interface_of(part, architecture.task)
    graph, limits = traced_graph(architecture, interface, PREFIX, progress)
    interface = replace(interface, notes=(*architecture.notes, *notes, *interface.notes, *limits))
    return Lowered(whole, part, interface, graph)


def traced_part(model: Any, architecture: Architecture) -> Any:
    """The module that is imported: the model, or the encoder of a pair."""
    return model.get_encoder() if architecture.encoder_only else model


def interface_of(model: Any, task: Task) -> Interface:
    """The interface of a module for its task."""
    makers: dict[Task, Callable[[Any], Interface]] = {
        Task.CAUSAL_LM: causal_lm_interface,
        Task.VISION: vision_interface,
    }
    return makers.get(task, encoder_interface)(model)
