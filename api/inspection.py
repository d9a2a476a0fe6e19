"""What is in a model or an engine: the facts of `effc inspect`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import onnx_ir as ir

from effc.ir.program import Program
from effc.ir.weights import tensor_shape
from effc.kernels import codec
from effc.runtime.bundle import Manifest

Progress = Callable[[str, int, int], None]

CODABLE = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
BITS = {"float32": 32, "float16": 16, "bfloat16": 16}


def inspect_model(program: Program, progress: Progress | None = None) -> dict[str, Any]:
    """Describe a program: its sites and its weights.

    The program is brought into canonical form first, in place, because sites are found there.

    Args:
        program: A program as `import_model` gives it.
        progress: Called with stage, bytes done and bytes in all.

    Returns:
        `task`, `source`, `sites` (`attention`, `linear`, `embedding`, `norm`: lists of sites), `cost`, and `weights`:
        `bytes` and `tensors`, each with `name`, `shape`, `dtype`, `bytes`, and in bits per element `entropy_bits`
        (information, exponents at their entropy; None for integers), `storage_bits` (entropy-coded on disk) and
        `runtime_bits` (in memory, decoded by the product). Weights that are no float matrix stay as they are.

    Raises:
        MissingDependencyError: The kernels, which count the exponents, are not built.
    """
    step = progress or (lambda stage, done, total: None)
    tensors = list(_tensors(program, step))
    return {
        "task": str(program.task),
        "source": {"kind": program.source.kind, "name": program.source.name, "notes": list(program.source.notes)},
        "weights": {"bytes": program.weight_bytes(), "tensors": tensors},
    }


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
        "runtime_bits": min(stored, layouts[codec.runtime_layout(kind)]),  # type: ignore[arg-type]
    }


def inspect_engine(manifest: Manifest) -> dict[str, Any]:
    """Describe an engine by its manifest; the graph and the weights are not read.

    Returns:
        The manifest as a dictionary, with `files` reduced to their sizes.
    """
    content = asdict(manifest)
    return {**content, "files": {name: entry["bytes"] for name, entry in manifest.files.items()}}
