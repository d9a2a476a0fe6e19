from pathlib import Path

import jsonschema
import pytest
from verify_models import causal_lm, encoder, write_engine
from verify_schemas import schema

from effc.errors import EngineError, UsageError
from effc.verify.bench_worker import runs_for
from effc.verify.benchmark import _Process, bench_engine, folder_bytes, ratios, spread


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    return {
        "native": write_engine(causal_lm(), folder / "native"),
        "portable": write_engine(causal_lm(), folder / "portable", portable=True),
        "encoder": write_engine(encoder(), folder / "encoder"),
    }


def test_two_engines_side_by_side(folders: dict[str, Path]) -> None:
    lines: list[str] = []
    result = bench_engine(
        folders["native"], folders["portable"], prompt_tokens=5, new_tokens=3, repeats=2, progress=lines.append
    )
    jsonschema.validate(result, {**schema("bench"), "additionalProperties": False})
    for side in ("engine", "against"):
        rate = result[side]["decode_tokens_per_s"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert result[side]["items_per_s"] is None
        assert 20e6 < result[side]["peak_rss"] < 500e6
    assert result["engine"]["bytes"] == folder_bytes(folders["native"])
    medians = [result[side]["prefill_tokens_per_s"]["median"] for side in ("engine", "against")]
    assert result["ratio"]["prefill_tokens_per_s"] == pytest.approx(medians[0] / medians[1])
    turns = [line for line in lines if line.startswith("turn")]
    assert [("native" in line) for line in turns] == [True, False, True, False]


def test_an_encoder_alone(folders: dict[str, Path]) -> None:
    result = bench_engine(folders["encoder"], prompt_tokens=6, batch=2, repeats=1, threads=1)
    jsonschema.validate(result, {**schema("bench"), "additionalProperties": False})
    assert result["against"] is None
    assert result["ratio"] is None
    assert result["engine"]["decode_tokens_per_s"] is None
    assert result["engine"]["items_per_s"]["median"] > 0


def test_arithmetic() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert spread([]) is None
    engine = {"rate": {"median": 6.0, "min": 1.0, "max": 9.0}, "load_s": 1.0, "none": None, "zero": 1}
    against = {"rate": {"median": 3.0, "min": 1.0, "max": 9.0}, "load_s": 4.0, "none": None, "zero": 0}
    assert ratios(engine, against) == {"rate": 2.0, "load_s": 0.25, "none": None, "zero": None}
    assert [runs_for(seconds) for seconds in (0.0, 1e-3, 0.15, 5.0)] == [1000, 200, 2, 1]


def test_refusals(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="repeats is 0"):
        bench_engine(folders["native"], repeats=0)
    with pytest.raises(UsageError, match="one task"):
        bench_engine(folders["native"], folders["encoder"])
    with pytest.raises(EngineError, match="not an engine folder"):
        bench_engine(tmp_path)


def test_errors_of_the_worker_arrive(folders: dict[str, Path], tmp_path: Path) -> None:
    with _Process.start(folders["encoder"]) as process:
        process.ask("load", threads=1)
        with pytest.raises(EngineError, match="carries no cache"):
            process.ask("generate", batch=1, prompt_tokens=1, new_tokens=1)
        process.process.kill()
        with pytest.raises(EngineError, match="ended by signal 9 during 'memory'"):
            process.ask("memory")
