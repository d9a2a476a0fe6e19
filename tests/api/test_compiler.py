"""What `optimize` refuses at once; the reference engine: made once per content and task."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest

from effc.compiler import optimize, reference_engine
from effc.errors import InputError, UsageError
from effc.ir.program import Program
from effc.passes.base import Contract, Match, Pass, PassReport, Site
from effc.runtime.bundle import read_manifest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A hidden state from ids, which may be read as an encoder or as a generic model."""
    graph = onnx.parser.parse_graph("""
        lookup (int64[batch, seq] input_ids) => (float[batch, seq, 4] last_hidden_state) {
            last_hidden_state = Gather(table, input_ids)
        }
    """)
    graph.initializer.append(onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "table"))
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_it_is_made_once(model: Path) -> None:
    folder = reference_engine(model)
    os.utime(folder / "effc.json", (0, 0))
    assert reference_engine(model) == folder
    assert (folder / "effc.json").stat().st_mtime > 0


def test_every_task_has_its_own(model: Path) -> None:
    folders = {task: reference_engine(model, task=task) for task in ("encoder", "generic")}
    assert {task: read_manifest(folder).task for task, folder in folders.items()} == {t: t for t in folders}


def test_an_engine_and_an_empty_path_are_no_models(model: Path) -> None:
    engine = reference_engine(model)
    with pytest.raises(UsageError, match="is an engine folder already"):
        optimize(engine, engine.parent / "again")
    with pytest.raises(UsageError, match="path of the model is empty"):
        optimize("", engine.parent / "again")


def test_a_wrong_budget_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="budget"):
        optimize(tmp_path / "no-such-model", tmp_path / "engine", budget="max-rel=nan")


@dataclass(frozen=True)
class MeasuresRows(Pass):
    """Reports the shapes of the hidden state over the calibration data."""

    name: ClassVar[str] = "measures-rows"
    contract: ClassVar[Contract] = Contract.EXACT
    uses_calibration: ClassVar[bool] = True

    def match(self, program: Program) -> Match:
        return Match([Site("table")])

    def apply(self, program: Program, sites: Sequence[Site]) -> PassReport:
        data = program.calibration
        shapes = (
            [] if data is None else [v["last_hidden_state"].shape for v in data.observe(program, ["last_hidden_state"])]
        )
        return PassReport(["table"], details={"shapes": shapes})


def test_a_pass_measures_on_the_calibration_data(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"input_ids": [1, 2, 3]}\n{"input_ids": [0]}\n{"input_ids": [3, 2, 1]}\n')
    said: list[str] = []
    given = {"calibrate": file, "calibrate_tokens": 5, "announce": said.append}
    result = optimize(model, tmp_path / "e", passes=[MeasuresRows()], check=False, **given)
    record = next(one for one in result.program.records if one.name == "measures-rows")
    assert record.details["shapes"] == [(1, 3, 4), (1, 1, 4), (1, 1, 4)]
    assert result.summary["calibration"]["windows"] == 3
    assert result.summary["calibration"]["tokens"] == 5
    assert any("3 windows, 5 tokens" in line for line in said)
    without = optimize(model, tmp_path / "e", passes=[MeasuresRows()], check=False)
    assert without.summary["calibration"] is None


def test_calibration_data_are_refused_before_the_model_is_read(tmp_path: Path) -> None:
    file, model = tmp_path / "data.txt", tmp_path / "no-such-model"
    file.write_text("words")
    with pytest.raises(UsageError, match=r"no pass of the pipeline uses calibration data \(canonicalize\)"):
        optimize(model, tmp_path / "engine", calibrate=file)
    with pytest.raises(UsageError, match="calibrate_tokens is 0"):
        optimize(model, tmp_path / "engine", passes=[MeasuresRows()], calibrate=file, calibrate_tokens=0)
    with pytest.raises(InputError, match="does not exist"):
        optimize(model, tmp_path / "engine", passes=[MeasuresRows()], calibrate=tmp_path / "none.txt")
