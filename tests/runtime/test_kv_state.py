"""The bound cache: both modes against the model without a cache, and where its memory lies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import helper

from effc.errors import EngineError, UsageError
from effc.runtime.bundle import CacheLayout, CachePort, Port
from effc.runtime.kv_state import KvState, next_capacity, port_shape
from effc.runtime.session import Engine, load

MODES = ("in-place", "growing")
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # float32 over sums of 32


def feed(ids: list[int], start: int) -> dict[str, np.ndarray]:
    total = start + len(ids)
    return {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(start, total)[None],
    }


def run_in_steps(engine: Engine, ids: list[int], sizes: list[int]) -> np.ndarray:
    state = engine.new_state(1)
    logits, start = [], 0
    for size in sizes:
        logits.append(state.run(feed(ids[start : start + size], start), ["logits"])["logits"][0])
        start += size
    assert state.length == start
    return np.concatenate(logits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [[9], [1] * 9, [5, 1, 3], [1, 7, 1], [8, 1]])
def test_steps_equal_the_whole_without_a_cache(
    make_lm: Callable[..., Path], lm_oracle: Any, mode: str, sizes: list[int]
) -> None:
    ids = [5, 200, 17, 17, 44, 0, 259, 3, 120]
    with load(make_lm(mode)) as engine:
        np.testing.assert_allclose(run_in_steps(engine, ids, sizes), lm_oracle.logits(ids), **TOLERANCE)


@pytest.mark.parametrize("mode", MODES)
def test_long_run_grows_and_stays_right(make_lm: Callable[..., Path], lm_oracle: Any, mode: str) -> None:
    ids = [int(item) for item in np.random.default_rng(1).integers(0, 260, 90)]
    with load(make_lm(mode)) as engine:
        np.testing.assert_allclose(run_in_steps(engine, ids, [1] * 90), lm_oracle.logits(ids), **TOLERANCE)


def test_in_place_growth_copies_once_and_keeps_the_tokens(
    make_lm: Callable[..., Path], lm_oracle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effc.runtime.kv_state.RESERVE", 0)
    monkeypatch.setattr("effc.runtime.kv_state.BLOCK", 4)
    ids = [int(item) for item in np.random.default_rng(2).integers(0, 260, 41)]
    with load(make_lm("in-place")) as engine:
        state = engine.new_state(1)
        logits, capacities = [], []
        for index, item in enumerate(ids):
            logits.append(state.run(feed([item], index), ["logits"])["logits"][0, 0])
            capacities.append(next(iter(state.buffers.values())).shape()[2])
        assert sorted(set(capacities)) == [4, 8, 16, 32, 64]
        np.testing.assert_allclose(np.array(logits), lm_oracle.logits(ids), **TOLERANCE)


def test_in_place_buffers_stay_where_they_are(make_lm: Callable[..., Path]) -> None:
    with load(make_lm("in-place")) as engine:
        state = engine.new_state(1)
        state.run(feed([7, 8, 9], 0), [])
        before = {name: value.data_ptr() for name, value in state.buffers.items()}
        for index in range(3, 40):
            state.run(feed([index], index), ["logits"])
        after = {name: value.data_ptr() for name, value in state.buffers.items()}
        assert len(before) == 4
        assert before == after


def test_growing_cache_is_as_long_as_its_tokens(make_lm: Callable[..., Path]) -> None:
    with load(make_lm("growing")) as engine:
        state = engine.new_state(1)
        for index in range(5):
            state.run(feed([index], index), ["logits"])
            assert {value.shape()[2] for value in state.buffers.values()} == {index + 1}


@pytest.mark.parametrize("mode", MODES)
def test_results_outlive_later_runs_and_the_state(make_lm: Callable[..., Path], mode: str) -> None:
    with load(make_lm(mode)) as engine:
        state = engine.new_state(1)
        first = state.run(feed([7, 8, 9], 0), ["logits"])["logits"]
        copy = first.copy()
        for index in range(3, 20):
            state.run(feed([index], index), ["logits"])
        del state
    np.testing.assert_array_equal(first, copy)


def test_max_length_bounds_capacity_and_refuses_more(make_lm: Callable[..., Path]) -> None:
    with load(make_lm("in-place")) as engine:
        state = engine.new_state(1, max_length=5)
        state.run(feed([1, 2, 3], 0), [])
        assert {value.shape()[2] for value in state.buffers.values()} == {5}
        state.run(feed([1, 2], 3), ["logits"])
        with pytest.raises(UsageError, match="at most 5 tokens, 6 were fed"):
            state.run(feed([1], 5), ["logits"])


def test_capacity_doubles_within_the_limit() -> None:
    assert next_capacity(1, 0, None) == 192
    assert next_capacity(193, 192, None) == 384
    assert next_capacity(1000, 192, None) == 1152
    assert next_capacity(10, 0, 20) == 20
    assert next_capacity(20, 10, 20) == 20


def test_fixed_state_is_carried_from_run_to_run() -> None:
    # A counter of one number: no growing axis at all.
    layout = CacheLayout("in-place", [CachePort("count", "count_out", "float32", ["batch", 1])])
    inputs = [Port("input_ids", "float32", ["batch", "seq"])]
    nodes = [
        helper.make_node("ReduceSum", ["input_ids"], ["sum"], keepdims=1),
        helper.make_node("Add", ["count", "sum"], ["count_out"]),
        helper.make_node("Identity", ["count_out"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "count", [value("input_ids", 1, [1, "s"]), value("count", 1, [1, 1])],
        [value("count_out", 1, [1, 1]), value("y", 1, [1, 1])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for mode in MODES:
        state = KvState(session, CacheLayout(mode, layout.ports), inputs, 1)
        seen = [state.run({"input_ids": np.ones((1, 3), np.float32)}, ["y"])["y"].item() for _ in range(100)]
        assert seen == [3.0 * (index + 1) for index in range(100)]


def test_unknown_mode_and_symbol_are_refused(make_lm: Callable[..., Path]) -> None:
    with load(make_lm()) as engine, pytest.raises(EngineError, match="cache mode 'paged', which is unknown"):
        KvState(engine.session, CacheLayout("paged", []), engine.manifest.inputs, 1)
    with pytest.raises(EngineError, match="unknown symbol 'pages'"):
        port_shape(CachePort("k", "k_out", "float32", ["batch", "pages"]), 1, 0)


def test_bfloat16_cache_is_bound_without_numpy_knowing_the_type(make_engine: Callable[..., Path]) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["input_ids"], ["new"], to=16),
            helper.make_node("Concat", ["past", "new"], ["present"], axis=1),
            helper.make_node("Cast", ["present"], ["y"], to=1),
        ],
        "append",
        [value("input_ids", 1, ["b", "s"]), value("past", 16, ["b", "p"])],
        [value("present", 16, ["b", "t"]), value("y", 1, ["b", "t"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    layout = CacheLayout("growing", [CachePort("past", "present", "bfloat16", ["batch", "past"])])
    state = KvState(session, layout, [Port("input_ids", "float32", ["batch", "seq"])], 1)
    for number in (1.5, -2.0, 0.25):
        result = state.run({"input_ids": np.array([[number]], np.float32)}, ["y"])["y"]
    np.testing.assert_array_equal(result, [[1.5, -2.0, 0.25]])
