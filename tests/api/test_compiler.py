"""What `optimize` refuses at once; the reference engine: made once per content and task."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from effc.compiler import optimize, reference_engine
from effc.errors import UsageError
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
