"""Comparison of an imported ONNX graph with the file it came from, in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from effc.errors import ContractError
from effc.frontends.check import MEMORY_LIMIT, Case, Runner, compare_case, float32_bytes
from effc.frontends.sizes import BATCH, PAST, SEQ, TOTAL
from effc.ir.program import Program

SHAPES = (
    {BATCH: 1, SEQ: 7, PAST: 0},
    {BATCH: 2, SEQ: 5, PAST: 3},
    {BATCH: 2, SEQ: 1, PAST: 6},
    {BATCH: 1, SEQ: 33, PAST: 9},
)
STRING = ir.DataType.STRING
INTEGER_LIMIT = 2
"""Made-up integers are 0 and 1, which are valid token ids, masks and positions everywhere."""


def compare(program: Program, original: ir.Model, progress: Callable[[str], None]) -> str:
    """Run both on the same made-up inputs at four shapes.

    Returns:
        A sentence with what was compared, or why not.

    Raises:
        ContractError: The imported graph gives other values.
    """
    if float32_bytes(program) > MEMORY_LIMIT:
        return f"Not compared with the original: more than {MEMORY_LIMIT >> 20} MiB of float32 weights."
    strings = [value.name for value in (*original.graph.inputs, *original.graph.outputs) if value.dtype == STRING]
    if strings:
        return f"Not compared with the original: {strings[0]!r} is text, and only numbers are compared."
    progress("comparing with the original")
    compared: list[str] = []
    refused = ""
    try:
        runner = Runner(original).open()
    except ContractError as error:
        return f"Not compared with the original: {str(error)[:250]}"
    worst = 0.0
    with runner, Runner(program.model) as imported:
        for shape in SHAPES:
            feeds = made_up(program.graph, shape)
            given = {old.name or "": feeds[new.name or ""] for old, new in zip(_ports(original), program.graph.inputs)}
            try:
                values = runner.run(given)
            except ContractError as error:
                refused = str(error)[:250]
                continue
            names = [output.name or "" for output in program.graph.outputs]
            case = Case(f"{shape}", feeds, dict(zip(names, values.values(), strict=True)))
            worst = max(worst, compare_case(program, case, imported.run(feeds)))
            compared.append("x".join(str(size) for size in shape.values()))
    if not compared:
        return f"Not compared with the original: it does not run on made-up inputs ({refused})."
    return f"Compared with the original at batch x seq x past {', '.join(compared)}: largest difference {worst:.1e}."


def _ports(model: ir.Model) -> list[ir.Value]:
    initializers = set(model.graph.initializers)
    return [value for value in model.graph.inputs if value.name not in initializers]


def made_up(graph: ir.Graph, shape: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Random inputs for a graph: named sizes from `shape`, other symbolic sizes 2."""
    sizes = {**shape, TOTAL: shape[SEQ] + shape[PAST]}
    rng = np.random.default_rng(0)
    feeds = {}
    for value in graph.inputs:
        dims = [size if isinstance(size, int) else sizes.get(str(size.value), 2) for size in value.shape or ()]
        dtype = (value.dtype or ir.DataType.FLOAT).numpy()
        if value.name == "attention_mask":
            feeds[value.name] = np.ones(dims, dtype)
        elif np.issubdtype(dtype, np.integer) or dtype == np.bool_:
            feeds[value.name or ""] = rng.integers(0, INTEGER_LIMIT, dims).astype(dtype)
        else:
            feeds[value.name or ""] = rng.standard_normal(dims).astype(dtype)
    return feeds
