import math
from pathlib import Path

import jsonschema
import numpy as np
import onnx_ir as ir
import pytest
from verify_models import causal_lm, encoder, write_engine
from verify_schemas import measured_schema

from effc.errors import ContractError, InputError, UsageError
from effc.ir.program import Program
from effc.runtime.session import Engine, load
from effc.verify.budget import Budget, parse_budget
from effc.verify.evaluation import enforce_budget, verify_engine
from effc.verify.inputs import FeedShape, make_feed, manifest_interface
from effc.verify.steps import run_at, window_logits
from effc.verify.text import windows


def perturbed(program: Program, factor: float) -> Program:
    """The same program with one weight scaled."""
    name = "w" if "w" in program.graph.initializers else "l0.down"
    value = program.graph.initializers[name]
    array = value.const_value.numpy()
    value.const_value = ir.Tensor((array.astype(np.float32) * factor).astype(array.dtype), name=name)
    return program


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    folder = tmp_path_factory.mktemp("engines")
    made = {
        "native": write_engine(causal_lm(), folder / "native"),
        "portable": write_engine(causal_lm(), folder / "portable", portable=True),
        "off": write_engine(perturbed(causal_lm(), 1.5), folder / "off", portable=True),
        "encoder": write_engine(encoder(), folder / "encoder"),
        "encoder-off": write_engine(perturbed(encoder(), 1.5), folder / "encoder-off"),
    }
    return {name: load(path) for name, path in made.items()}


def test_an_engine_equals_itself(engines: dict[str, Engine]) -> None:
    result = verify_engine(engines["portable"], engines["portable"], tokens=40, context=16)
    jsonschema.validate(result, measured_schema())
    assert result["bitwise"] is True
    assert (result["max_abs"], result["max_rel"], result["top1"], result["kl"]) == (0, 0, 1, 0)
    assert result["perplexity"]["ratio"] == 1
    assert result["perplexity"]["tokens"] == 15 + 15 + 7
    assert {(row["batch"], row["seq"], row["past"]) for row in result["shapes"]} >= {(3, 7, 0), (2, 1, 9), (1, 1, 0)}


def test_two_cache_modes_agree(engines: dict[str, Engine]) -> None:
    assert engines["native"].manifest.cache.mode == "in-place"
    assert engines["portable"].manifest.cache.mode == "growing"
    result = verify_engine(engines["native"], engines["portable"], tokens=40, context=16)
    assert result["max_rel"] < 1e-5
    assert result["perplexity"]["ratio"] == pytest.approx(1, abs=1e-6)


def test_a_changed_engine_is_measured(engines: dict[str, Engine]) -> None:
    result = verify_engine(engines["off"], engines["portable"], tokens=200, context=32, text="a b c d " * 100)
    jsonschema.validate(result, measured_schema())
    assert result["bitwise"] is False
    assert result["max_rel"] > 0.01
    assert result["kl"] > 1e-4
    assert result["perplexity"]["ratio"] != 1
    with pytest.raises(ContractError, match=r"max-rel is .*, the budget allows 0.01"):
        enforce_budget(result, Budget(max_rel=0.01))
    enforce_budget(result, parse_budget("max-rel=100,top1=0,kl=100,perplexity=100"))
    for ratio in (101.0, None):
        with pytest.raises(ContractError, match="perplexity is"):
            enforce_budget({**result, "contexts": [{"ratio": ratio}]}, parse_budget("perplexity=100"))


def test_perplexity_against_a_direct_computation(engines: dict[str, Engine]) -> None:
    """Whole windows in one run, softmax in float64."""
    engine, text = engines["portable"], "The quick brown fox jumps over the lazy dog, twice in a row. " * 3
    result = verify_engine(engine, engine, text=text, tokens=150, context=70)
    ids = [byte % 37 for byte in text.encode()[:150]]
    losses = []
    for start in range(0, 150, 70):
        window = np.array([ids[start : start + 70]])
        feed = {
            "input_ids": window,
            "attention_mask": np.ones_like(window),
            "position_ids": np.arange(window.shape[1])[None],
        }
        logits = engine.run(feed)["logits"][0].astype(np.float64)
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        losses += [-math.log(probabilities[place, window[0, place + 1]]) for place in range(window.shape[1] - 1)]
    assert result["perplexity"]["tokens"] == len(losses)
    assert result["perplexity"]["source"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_a_past_is_the_run_before(engines: dict[str, Engine]) -> None:
    """Running 9 + 1 tokens gives the last row of running 10."""
    for name in ("native", "portable"):
        engine = engines[name]
        interface = manifest_interface(engine.manifest)
        stepped = run_at(engine, interface, FeedShape(2, 1, 9, True))["logits"]
        whole = engine.run(make_feed(interface, FeedShape(2, 10, 0, True)))["logits"]
        np.testing.assert_allclose(stepped[:, 0], whole[:, -1], atol=1e-5)


def test_window_logits_in_chunks(engines: dict[str, Engine]) -> None:
    ids = [number % 37 for number in range(130)]
    chunks = list(window_logits(engines["portable"], ids))
    assert [len(chunk) for chunk in chunks] == [64, 64, 2]
    others = list(window_logits(engines["portable"], ids, 100))
    assert [len(chunk) for chunk in others] == [100, 30]
    np.testing.assert_allclose(np.concatenate(chunks), np.concatenate(others), atol=1e-5)


def test_encoders_have_no_perplexity(engines: dict[str, Engine]) -> None:
    result = verify_engine(engines["encoder-off"], engines["encoder"])
    jsonschema.validate(result, measured_schema())
    assert result["perplexity"] is None
    assert result["top1"] is None
    assert result["max_rel"] == pytest.approx(0.5, rel=0.2) or result["max_rel"] > 0.4
    assert [row["padded"] for row in result["shapes"]] == [True, False, False]


def test_windows() -> None:
    assert list(windows([1, 2, 3, 4, 5], 2, None)) == [[1, 2], [3, 4]]
    assert list(windows([1, 2, 3, 4, 5], 3, 9)) == [[9, 1, 2], [9, 3, 4], [9, 5]]
    assert list(windows([9, 1, 2], 3, 9)) == [[9, 1, 2]]
    assert list(windows([1, 2], 10, None)) == [[1, 2]]


def test_refusals(engines: dict[str, Engine], tmp_path: Path) -> None:
    engine = engines["portable"]
    with pytest.raises(UsageError, match="one model"):
        verify_engine(engine, engines["encoder"])
    with pytest.raises(UsageError, match="at least 2"):
        verify_engine(engine, engine, context=1)
    with pytest.raises(UsageError, match="chunk is 0"):
        verify_engine(engine, engine, chunk=0)
    with pytest.raises(UsageError, match="longer text"):
        verify_engine(engine, engine, text="x")
    with pytest.raises(InputError, match="plain text file"):
        verify_engine(engine, engine, text=tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [("speed=1", "max-abs, max-rel"), ("top1=2", "from 0 to 1"), ("kl=x", "a number"), ("kl", "NAME=NUMBER")],
)
def test_bad_budgets(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_budget(text)


def test_a_null_figure_breaks_its_limit() -> None:
    assert parse_budget("max-rel=1").broken({"max_rel": None}) == ["max-rel is infinite, the budget allows 1"]
    assert parse_budget("") == Budget()
