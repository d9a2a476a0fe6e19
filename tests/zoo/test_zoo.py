"""Every architecture of the zoo through `optimize` and `verify`, held against the table in `docs/coverage.md`.

The table is part of the test: a row that no longer holds is a failure. EFFC_WRITE_COVERAGE=1 writes it anew.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import effc
from effc.compiler import reference_engine
from effc.errors import EffcError
from effc.ir.analysis.attention import attention_sites
from effc.verify.evaluation import verify_engine

_spec = importlib.util.spec_from_file_location("effc_zoo", Path(__file__).parent / "architectures.py")
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules["effc_zoo"] = _module
_spec.loader.exec_module(_module)

TABLE = Path(__file__).parents[2] / "docs" / "coverage.md"
QUICK = ("llama", "gemma3", "gpt2", "bert", "vit")
HEADER = """# Coverage

Tiny random bf16 models of each architecture, built by transformers, through
`effc optimize --passes lossless-weights` and `effc verify`. They prove plumbing, never quality. The test
`tests/zoo/test_zoo.py` writes this table and fails when a row no longer holds.

Columns: *attention* is the number of attention nodes in canonical form; *cache* says how the KV
cache grows; *difference* is the largest relative difference of the outputs from the source exported
plainly to onnxruntime in fp32; *coded* counts the weights that decode to the SHA-256 of their source.

| architecture | exercises | result | attention | cache | coded | difference |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    feature: str
    result: str
    attention: str = ""
    cache: str = ""
    coded: str = ""
    difference: str = ""

    def text(self) -> str:
        cells = (self.name, self.feature, self.result, self.attention, self.cache, self.coded, self.difference)
        return "| " + " | ".join(cells) + " |"


def _row(architecture: Any, folder: Path) -> Row:
    """Compile and verify one architecture; an effc error is the reason of a row that does not pass."""
    model = architecture.save(folder / "model", "bfloat16")
    try:
        result = effc.optimize(model, folder / "engine", passes="lossless-weights{min-bytes=0,min-saving=0}")
        reference = reference_engine(model)
    except EffcError as error:
        return Row(architecture.name, architecture.feature, f"no: {_reason(error)}")
    with effc.load(folder / "engine") as engine, effc.load(reference) as plain:
        figures = verify_engine(engine, plain, tokens=64, context=32)
    assert figures["max_rel"] < 1e-3, figures
    if figures["top1"] is not None:
        assert figures["top1"] == 1.0, figures
    records = {record["name"]: record for record in result.summary["passes"]}
    attention = len(attention_sites(result.program.graph))
    cache = result.manifest.cache if result.manifest is not None else None
    return Row(
        architecture.name,
        architecture.feature,
        "yes",
        str(attention),
        cache.mode if cache is not None else "",
        str(records["lossless-weights"]["measured"]["weights_identical"]),
        f"{figures['max_rel']:.0e}",
    )


def _reason(error: EffcError) -> str:
    return re.sub(r"\S*/model\b", "model", str(error).splitlines()[0]).replace("|", "/")[:160]


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, Row]]:
    """Rows that were measured; written to the table at the end when asked for."""
    measured: dict[str, Row] = {}
    yield measured
    if os.environ.get("EFFC_WRITE_COVERAGE") == "1":
        passed = sum(row.result == "yes" for row in measured.values())
        lines = [row.text() for row in measured.values()]
        TABLE.write_text(HEADER + "\n".join(lines) + f"\n\n{passed} of {len(measured)} pass.\n", encoding="utf-8")


def _expected(name: str) -> str:
    line = next((line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |")), "")
    return line.split("|")[3].strip() if line else "missing from docs/coverage.md"


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(item, id=item.name, marks=() if item.name in QUICK else (pytest.mark.slow,)) for item in _module.ZOO],
)
def test_architecture(architecture: Any, tmp_path: Path, rows: dict[str, Row]) -> None:
    row = _row(architecture, tmp_path)
    rows[architecture.name] = row
    if os.environ.get("EFFC_WRITE_COVERAGE") != "1":
        assert row.result == _expected(architecture.name)
