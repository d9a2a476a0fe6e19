"""`Program`: one model on its way from a frontend through the passes to a backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import onnx_ir as ir

from effc.ir.calibration import Calibration
from effc.ir.prompt_filter import PromptFilter

OPSET = 24
"""Opset of the IR. Newer ones have no onnxruntime CPU kernels for attention yet."""


class Task(StrEnum):
    """What the model is for; it decides inputs, checks and the way it is run."""

    CAUSAL_LM = "causal-lm"
    ENCODER = "encoder"
    VISION = "vision"
    VISION_LANGUAGE = "vision-language"
    GENERIC = "generic"


@dataclass(frozen=True)
class Source:
    """Where a program came from.

    Attributes:
        kind: `huggingface`, `gguf`, `torch-export`, `onnx` or `memory`.
        name: What the user called it: a path or a class name.
        config: The model's own configuration (Hugging Face `config.json` keys), empty if it has none.
        assets: Files that travel with the engine (tokenizer, generation config), file name -> path or content.
        content_hash: SHA-256 over the bytes that determine the program (weights, graph or config).
        weight_bytes: Bytes of the weights as stored in the source.
        notes: What the frontend decided for the user, one sentence each.
    """

    kind: str
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    assets: Mapping[str, Path | bytes] = field(default_factory=dict)
    content_hash: str = ""
    weight_bytes: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to the program.

    Attributes:
        name: Pass name, kebab-case.
        options: The pass as pipeline text, options included.
        contract: `exact`, `equivalent` or `approximate`.
        rewritten: Names of the sites that were changed.
        left: `(site, reason)` of every site that was left alone.
        details: Figures of the pass (bytes, rates), JSON-ready.
        measured: What the contract check measured, JSON-ready; empty when unchecked.
        seconds: Wall-clock seconds.
    """

    name: str
    options: str
    contract: str
    rewritten: tuple[str, ...]
    left: tuple[tuple[str, str], ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Program:
    """A model as effc sees it: an `onnx_ir.Model`, its task, its source and what was done to it.

    Weights are lazy: initializers hold tensors that read their bytes when asked and keep nothing
    (see `effc.ir.weights`). Symbolic sizes are named `batch`, `seq`, `past` and `total` (= past + seq).

    Attributes:
        model: The graph, at opset 24.
        task: What the model is for.
        source: Where it came from.
        records: One record per pass that ran, in order.
        calibration: Real inputs that passes may measure on; None when the user gave none.
        prompt_filter: How prompts are shortened; None when they are read whole. The graph then has the output
            `prompt_scores`.
    """

    model: ir.Model
    task: Task
    source: Source
    records: list[PassRecord] = field(default_factory=list)
    calibration: Calibration | None = None
    prompt_filter: PromptFilter | None = None

    @property
    def graph(self) -> ir.Graph:
        """The main graph."""
        return self.model.graph

    def clone(self) -> Program:
        """A program whose graph can be edited on its own; weights are shared, they are immutable."""
        return replace(self, model=self.model.clone(), records=list(self.records))

    def weight_bytes(self) -> int:
        """Bytes of all initializers in their stored dtype, tied weights once."""
        tensors = {id(value.const_value): value.const_value for value in self.graph.initializers.values()}
        return sum(tensor.nbytes for tensor in tensors.values() if tensor is not None)

    def cache_pairs(self) -> list[tuple[ir.Value, ir.Value]]:
        """Cache inputs with the outputs that carry them on, in the order of the inputs.

        `past_key_values.N.key` pairs with `present.N.key`, `past.X` with `present.X`.
        """
        outputs = {value.name: value for value in self.graph.outputs}
        pairs = []
        for value in self.graph.inputs:
            name = value.name or ""
            for prefix in ("past_key_values.", "past."):
                present = outputs.get("present." + name.removeprefix(prefix)) if name.startswith(prefix) else None
                if present is not None:
                    pairs.append((value, present))
                    break
        return pairs
