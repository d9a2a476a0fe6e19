"""The verdict on an engine: rounding for exact and equivalent passes, the budget for any."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import effc
from effc import verification
from effc.errors import OutputError, UsageError
from effc.passes.base import Contract


def model(factor: float) -> ir.Model:
    graph = onnx.parser.parse_graph("""
        g (float[batch, 8] x) => (float[batch, 8] y) { y = MatMul(x, w) }
    """)
    weight = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32) * np.float32(factor)
    graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]))


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> dict[float, Path]:
    """Engines of one model whose weight is scaled by a factor."""
    folder = tmp_path_factory.mktemp("engines")
    for factor in (1.0, 1.0 + 1e-7, 1.5):
        effc.optimize(model(factor), folder / str(factor))
    return {factor: folder / str(factor) for factor in (1.0, 1.0 + 1e-7, 1.5)}


def test_the_same_model_keeps_its_contract(engines) -> None:
    result = verification.verify(engines[1.0], engines[1.0])
    assert result["holds"] and result["bitwise"]
    assert (result["contract"], result["reason"]) == ("equivalent", "")
    assert 0 < result["allowed"] < 1e-4


def test_rounding_is_kept_and_another_model_is_not(engines) -> None:
    near = verification.verify(engines[1.0 + 1e-7], engines[1.0])
    assert near["holds"] and not near["bitwise"]
    far = verification.verify(engines[1.5], engines[1.0])
    assert not far["holds"]
    assert "outputs differ by more than rounding" in far["reason"]


def test_a_budget_binds_every_engine(engines) -> None:
    assert verification.verify(engines[1.0 + 1e-7], engines[1.0], budget="max-rel=1e-3")["holds"]
    missed = verification.verify(engines[1.0 + 1e-7], engines[1.0], budget="max-rel=1e-12")
    assert not missed["holds"]
    assert "max-rel" in missed["reason"]
    with pytest.raises(UsageError):
        verification.verify(engines[1.0], engines[1.0], budget="no-such-limit=1")


@pytest.mark.parametrize(
    ("contracts", "weakest"),
    [
        ([], Contract.EXACT),
        (["exact"], Contract.EXACT),
        (["exact", "equivalent"], Contract.EQUIVALENT),
        (["equivalent", "approximate", "exact"], Contract.APPROXIMATE),
    ],
)
def test_an_engine_promises_what_its_weakest_pass_does(contracts, weakest) -> None:
    manifest = SimpleNamespace(passes=[{"contract": one} for one in contracts])
    assert verification.weakest_contract(manifest) == weakest


def test_a_report_lies_outside_the_engine(engines, tmp_path) -> None:
    page = tmp_path / "page.html"
    result = verification.verify(engines[1.5], engines[1.0], report=page)
    assert result["contexts"] == []
    assert result["passkey"] is None
    assert result["reads"] is None
    assert "Compared with the source" in page.read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="lies in an engine folder"):
        verification.verify(engines[1.5], engines[1.0], report=engines[1.0] / "report.html")
    for place in (tmp_path, tmp_path / "no" / "page.html"):
        with pytest.raises(OutputError, match="in a folder that exists"):
            verification.verify(engines[1.5], engines[1.0], report=place)


def test_long_contexts_are_for_models_that_generate(engines) -> None:
    for wrong in ({"contexts": [64]}, {"passkey": [400]}, {"reads": 64}):
        with pytest.raises(UsageError, match="causal-lm engines only"):
            verification.verify(engines[1.0], engines[1.0], **wrong)
