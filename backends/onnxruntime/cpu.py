"""The `ort-cpu` backend: onnxruntime's CPU provider with our custom-op library, the embedded default."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

import effc
from effc import kernels
from effc.backends.base import Backend, Progress
from effc.backends.engine_folder import write_assets
from effc.backends.lowering import STEPS
from effc.backends.onnxruntime.external_weights import write_external_weights
from effc.backends.onnxruntime.interface import angle_tables, cache_layout, ports
from effc.backends.onnxruntime.last_logits import add_num_logits
from effc.backends.onnxruntime.portable_weights import use_portable_layouts
from effc.backends.onnxruntime.prompt_filter import MODEL as FILTER_MODEL
from effc.backends.onnxruntime.prompt_filter import coded_weights, filter_entry, take_prompt_filter
from effc.backends.onnxruntime.static_cache import lower_static_caches, static_caches
from effc.backends.onnxruntime.widen_weights import widen_cast_weights
from effc.errors import MissingDependencyError
from effc.ir.analysis.weight_memory import weight_memory
from effc.ir.dialect import infer_dialect_types, is_dialect_node
from effc.ir.dialect.inline import inline_dialect
from effc.ir.program import Program
from effc.passes.attention.cached_attention import CachedAttention
from effc.runtime.bundle import Manifest

MODEL = "model.onnx"
IR_VERSION = 11
"""The ONNX IR version every onnxruntime that has opset 24 reads."""


class OnnxRuntimeCpu(Backend):
    """Writes `model.onnx` and `weights.bin` for onnxruntime on a CPU."""

    name: ClassVar[str] = "ort-cpu"

    def unavailable(self) -> str:
        """Engines can always be written; native ones need the kernel library to run."""
        try:
            kernels.library_path()
        except MissingDependencyError as error:
            return str(error)
        return ""

    def static_caches(self, program: Program) -> list[str]:
        """Those that GroupQueryAttention can keep."""
        return static_caches(program)

    def lower_static_caches(self, program: Program) -> None:
        """Replace them by GroupQueryAttention."""
        lower_static_caches(program)

    def lower(self, program: Program, *, portable: bool) -> Program:
        """Widen small half-precision weights, make attention and cache one op or inline the dialect."""
        lowered = program.clone()
        if portable:
            use_portable_layouts(lowered.graph)
            inline_dialect(lowered.model)
        else:
            infer_dialect_types(lowered.graph)
            raising = CachedAttention()
            raising.apply(lowered, raising.match(lowered).sites)
            add_num_logits(lowered)
        widen_cast_weights(lowered.model)
        RemoveUnusedNodesPass()(lowered.model)
        RemoveUnusedOpsetsPass()(lowered.model)
        return lowered

    def write(self, program: Program, folder: Path, *, portable: bool, progress: Progress | None = None) -> Manifest:
        """Stream the weights, save the graph, copy the assets."""
        graph, prompt_filter = program.graph, take_prompt_filter(program)
        native = any(is_dialect_node(node) for node in graph.all_nodes())
        memory = weight_memory(program)
        models = {MODEL: program.model, **({FILTER_MODEL: prompt_filter} if prompt_filter is not None else {})}
        shared = [*(coded_weights(prompt_filter.graph) if prompt_filter is not None else ()), *angle_tables(program)]
        always = [value.const_value for value in shared if value.const_value is not None]
        stored = write_external_weights([model.graph for model in models.values()], folder, progress, always=always)
        for name, model in models.items():
            _save(model, folder / name)
        write_assets(program, folder)
        return Manifest(
            effc_version=effc.__version__,
            task=str(program.task),
            target=self.name,
            portable=portable,
            needs_kernels=native,
            model=MODEL,
            inputs=ports(program, (value for value in graph.inputs if not value.is_initializer())),
            optional_inputs=ports(program, (value for value in graph.inputs if value.is_initializer())),
            outputs=ports(program, graph.outputs),
            cache=cache_layout(program),
            pipeline=",".join(record.options for record in program.records if record.name not in STEPS),
            passes=[_record(record) for record in program.records],
            source=_source(program),
            config=dict(program.source.config),
            bytes={
                "source": program.source.weight_bytes,
                "engine": 0,
                "weights_stored": stored,
                "weights_memory": memory,
            },
            versions=_versions(),
            opset=program.model.opset_imports[""],
            ir_version=IR_VERSION,
            files={},
            prompt_filter=filter_entry(program, prompt_filter) if prompt_filter is not None else None,
        )


def _save(model: ir.Model, path: Path) -> None:
    ClearMetadataAndDocStringPass()(model)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "effc", effc.__version__
    ir.save(model, path)


def _record(record: Any) -> dict[str, Any]:
    plain = asdict(record)
    plain["rewritten"] = list(record.rewritten)
    plain["left"] = [{"site": site, "reason": reason} for site, reason in record.left]
    return plain


def _source(program: Program) -> dict[str, Any]:
    source = program.source
    return {
        "kind": source.kind,
        "name": source.name,
        "content_hash": source.content_hash,
        "weight_bytes": source.weight_bytes,
        "notes": list(source.notes),
    }


def _versions() -> dict[str, str]:
    names = ("onnxruntime", "onnx", "onnx-ir", "onnxscript", "torch", "transformers")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
