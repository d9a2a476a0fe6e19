"""The pass `prompt-filter`: options, choice of the layer, and scores against numbers worked out head by head."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from decoders import HEADS, KV_HEADS, SIZE, changed, decoder

from effc.errors import UsageError
from effc.ir.program import Program, Task
from effc.ir.prompt_filter import SCORES
from effc.ir.rewrite.cut import cut_to
from effc.passes.pipeline_text import format_pipeline, parse_pipeline
from effc.passes.tokens.prompt_filter import PromptFilter


def options(**given: object) -> PromptFilter:
    return PromptFilter(**{"keep": 16, "forced": 3, **given})  # type: ignore[arg-type]


def scores_of(program: Program, feeds: dict[str, np.ndarray]) -> np.ndarray:
    model = cut_to(program.model, [SCORES])
    for value in [value for value in model.graph.inputs if not value.uses()]:
        model.graph.inputs.remove(value)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run([SCORES], {value.name: feeds[value.name] for value in session.get_inputs()})[0]


def expected_scores(q: np.ndarray, k: np.ndarray, present: np.ndarray, pool: int, zero: bool) -> np.ndarray:
    """One row, head by head: query head h reads key head floor(h / group)."""
    count = len(k)
    keys, query = k.reshape(count, KV_HEADS, SIZE).astype(np.float64), q[-1].reshape(HEADS, SIZE)
    raw = np.zeros(count)
    for head in range(HEADS):
        raw += keys[:, head * KV_HEADS // HEADS] @ query[head]
    result = np.zeros(count)
    for place in np.flatnonzero(present):
        around = [one for one in range(place - pool // 2, place + pool // 2 + 1) if 0 <= one < count and present[one]]
        result[place] = raw[around].sum() / (pool if zero else len(around))
    return result


@pytest.mark.parametrize("padding", ["valid", "zero"])
@pytest.mark.parametrize("pool", [1, 3, 5, 9])
@pytest.mark.parametrize("tokens", [1, 2, 5, 32])
def test_scores_are_those_of_the_definition(tokens: int, pool: int, padding: str) -> None:
    program = changed(decoder(), options(pool=pool, padding=padding))
    draw = np.random.default_rng(tokens)
    past = 2
    valid = np.ones((3, past + tokens), bool)
    valid[1, : past + tokens // 3] = False
    valid[2, :-1] = False
    feeds = {"valid": valid}
    for name, heads in (("q", HEADS), ("k", KV_HEADS)):
        feeds[name] = draw.standard_normal((3, tokens, heads * SIZE)).astype(np.float32)
    found = scores_of(program, feeds)
    assert found.shape == (3, tokens)
    for row in range(3):
        expected = expected_scores(feeds["q"][row], feeds["k"][row], valid[row, past:], pool, padding == "zero")
        np.testing.assert_allclose(found[row], expected, atol=1e-4)


def test_the_layer_is_at_forty_percent_and_without_a_window() -> None:
    def layer(count: int, windows: tuple[int, ...] = (), **given: object) -> int:
        (site,) = options(**given).match(decoder(count, windows=windows)).sites
        return site.payload[1]

    assert [layer(count) for count in (1, 2, 3, 8, 32)] == [0, 1, 1, 3, 13]
    assert layer(8, windows=(9, 0, 9, 9, 9, 9, 9, 0)) == 1
    assert layer(8, windows=(9, 0), layer=5) == 5


def test_what_is_left_alone() -> None:
    def reasons(program: Program, **given: object) -> list[str]:
        match = options(**given).match(program)
        assert not match.sites
        return [item.reason for item in match.left]

    windows = decoder(2, windows=(8, 9))
    assert [reason[:22] for reason in reasons(windows)] == ["its window of 8 tokens", "its window of 9 tokens"]
    assert reasons(decoder(2, windows=(8, 0)), layer=0) == [
        "its window of 8 tokens hides the others; take a layer without one"
    ]
    assert "only known as numbers" in reasons(decoder(bias=True))[0]
    assert reasons(changed(decoder(), options())) == ["its prompts are filtered already"]
    encoder = decoder()
    encoder.task = Task.ENCODER
    assert reasons(encoder) == ["its task is encoder; prompts are read by causal-lm"]
    assert not options().apply(decoder(), ()).rewritten


def test_the_report_says_what_is_kept() -> None:
    program = decoder(4)
    report = options(keep=1024, forced=64).apply(program, options().match(program).sites)
    figures = report.details["prompt_filter"]
    assert (figures["layer"], figures["layers"], figures["keep"], figures["forced"]) == (2, 4, 1024, 64)
    assert figures["kept_ratio"] == {"2048": 0.5, "8192": 0.125, "32768": 0.0312}
    assert "not shortened" in figures["checked"]


def test_the_graph_of_the_model_is_as_it_was() -> None:
    before, after = decoder(3), changed(decoder(3), options(layer=1))
    assert [value.name for value in after.graph.outputs] == [*(value.name for value in before.graph.outputs), SCORES]
    rest = cut_to(after.model, [str(value.name) for value in before.graph.outputs])
    assert [node.op_type for node in rest.graph] == [node.op_type for node in before.graph]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": 0}, "keep is 0, it must be from 1"),
        ({"keep": 64, "forced": 64}, "forced is 64, it must be from 0 to 63: fewer tokens than the 64 of keep"),
        ({"keep": 2, "forced": -1}, "forced is -1, it must be from 0 to 1"),
        ({"pool": 4}, "pool is 4, it must be an odd number"),
        ({"pool": 257}, "pool is 257"),
        ({"layer": -1}, "layer is -1"),
    ],
)
def test_bad_options(given: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        options(**given)


def test_a_layer_the_model_lacks() -> None:
    with pytest.raises(UsageError, match="layer is 2, the model has layers 0 to 1"):
        options(layer=2).match(decoder(2))


def test_pipeline_text() -> None:
    text = "prompt-filter{layer=5,keep=256,padding=zero,forced=0}"
    assert format_pipeline(parse_pipeline(text)) == text
    with pytest.raises(UsageError, match="gemfilter"):
        parse_pipeline("prompt-filter{scheme=snapkv}")
