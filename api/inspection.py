"""What is in a model or an engine: the facts of `effc inspect`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import onnx_ir as ir

from effc.ir.analysis.attention import AttentionSite, attention_sites
from effc.ir.analysis.cost import node_costs, total_cost
from effc.ir.analysis.embedding import EmbeddingSite, embedding_sites
from effc.ir.analysis.linear import LinearSite, linear_sites
from effc.ir.analysis.norm import NormSite, norm_sites
from effc.ir.program import Program
from effc.ir.weights import tensor_shape
from effc.kernels import codec
from effc.passes.pipeline import run_pipeline
from effc.passes.weights.runtime_layout import runtime_layout
from effc.runtime.bundle import Manifest

Progress = Callable[[str, int, int], None]

CODABLE = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
SIZES = {"prefill": {"batch": 1, "seq": 512, "past": 0}, "decode": {"batch": 1, "seq": 1, "past": 512}}
"""Sizes at which the cost of a model with a cache is stated."""
BITS = {"float32": 32, "float16": 16, "bfloat16": 16}


def inspect_model(program: Program, progress: Progress | None = None) -> dict[str, Any]:
    """Describe a program: its sites and its weights.

    The program is brought into canonical form first, in place, because sites are found there.

    Args:
        program: A program as `import_model` gives it.
        progress: Called with stage, bytes done and bytes in all.

    Returns:
        `task`, `source`, `sites` (`attention`, `linear`, `embedding`, `norm`: lists of sites), `left` (`site` and
        `reason` of what was not recognised), `cost` (phase -> `sizes`, `flops`, `bytes`), and `weights`: `bytes` and
        `tensors`, each with `name`, `shape`, `dtype`, `bytes`, and in bits per element `entropy_bits`
        (information, exponents at their entropy; None for integers), `storage_bits` (entropy-coded on disk) and
        `runtime_bits` (in memory, decoded by the product). Weights that are no float matrix stay as they are.

    Raises:
        MissingDependencyError: The kernels, which count the exponents, are not built.
    """
    step = progress or (lambda stage, done, total: None)
    step("canonicalize", 0, 0)
    run_pipeline(program, ())
    graph = program.graph
    return {
        "task": str(program.task),
        "source": {"kind": program.source.kind, "name": program.source.name, "notes": list(program.source.notes)},
        "sites": {
            "attention": [_attention(site) for site in attention_sites(graph)],
            "linear": [_linear(site) for site in linear_sites(graph)],
            "embedding": [_embedding(site) for site in embedding_sites(graph)],
            "norm": [_norm(site) for site in norm_sites(graph)],
        },
        "left": [{"site": site, "reason": reason} for site, reason in program.records[-1].left],
        "cost": _cost(program),
        "weights": {"bytes": program.weight_bytes(), "tensors": list(_tensors(program, step))},
    }


def _attention(site: AttentionSite) -> dict[str, Any]:
    facts = ("name", "heads", "kv_heads", "head_size", "value_size", "scale", "softcap", "causal", "window")
    cache = site.past_key is not None
    return {**{fact: getattr(site, fact) for fact in facts}, "cache": cache, "mask_understood": site.understood}


def _linear(site: LinearSite) -> dict[str, Any]:
    return {"name": site.name, "n": site.n, "k": site.k, "bias": site.bias is not None, "tied": site.uses > 1}


def _embedding(site: EmbeddingSite) -> dict[str, Any]:
    return {"name": site.name, "rows": site.rows, "width": site.width, "tied": site.uses > 1}


def _norm(site: NormSite) -> dict[str, Any]:
    return {"name": site.name, "kind": site.kind, "width": site.width, "epsilon": site.epsilon}


def _cost(program: Program) -> dict[str, Any]:
    """Operations and bytes moved for typical sizes; empty for a model with sizes of other names than ours."""
    symbols = {
        str(size.value)
        for value in program.graph.inputs
        for size in value.shape or ()
        if isinstance(size, ir.SymbolicDim)
    }
    chosen = SIZES if "past" in symbols else {"items": {"batch": 1, "seq": 128}}
    costs = {}
    for phase, sizes in chosen.items():
        if symbols <= {*sizes, "total"}:
            total = total_cost(node_costs(program.graph, sizes))
            costs[phase] = {"sizes": sizes, "flops": total.flops, "bytes": total.bytes}
    return costs


def _tensors(program: Program, step: Progress) -> Iterator[dict[str, Any]]:
    """One row per weight, tied ones once; reads one weight at a time."""
    total, done, seen = program.weight_bytes(), 0, set()
    for name, value in program.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        step("weights", done, total)
        yield _row(name, tensor)
        done += tensor.nbytes


def _row(name: str, tensor: ir.TensorProtocol) -> dict[str, Any]:
    shape, dtype = tensor_shape(tensor), tensor.dtype
    stored = float(dtype.bitwidth)
    row = {"name": name, "shape": list(shape), "dtype": dtype.name.lower(), "bytes": tensor.nbytes}
    if dtype not in CODABLE or math.prod(shape) == 0:
        return {**row, "entropy_bits": None, "storage_bits": stored, "runtime_bits": stored}
    words = tensor.numpy()
    kind = "bfloat16" if dtype == ir.DataType.FLOAT and codec.is_bf16(words) else CODABLE[dtype]
    matrix = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
    predicted = codec.predict(codec.exponent_histogram(words), kind, matrix)  # type: ignore[arg-type]
    if len(shape) != 2:
        return {**row, "entropy_bits": predicted.entropy_bits, "storage_bits": stored, "runtime_bits": stored}
    layouts = {"rank4": predicted.rank4_bits, "rank3": predicted.rank3_bits, "raw": float(BITS[kind])}
    return {
        **row,
        "entropy_bits": predicted.entropy_bits,
        "storage_bits": min(stored, predicted.storage_bits),
        "runtime_bits": min(stored, layouts[runtime_layout(kind)]),
    }


def inspect_engine(manifest: Manifest) -> dict[str, Any]:
    """Describe an engine by its manifest; the graph and the weights are not read.

    Returns:
        The manifest as a dictionary, with `files` reduced to their sizes.
    """
    content = asdict(manifest)
    return {**content, "files": {name: entry["bytes"] for name, entry in manifest.files.items()}}
