"""The bound cache: both modes against the model without a cache, and where its memory lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from effc.errors import EngineError, UsageError
from effc.runtime.bundle import CacheLayout, CachePort, Port
from effc.runtime.cache_ports import cache_bytes, port_shape
from effc.runtime.kv_state import KvState, next_capacity
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("most", [1, 4, 9, 10])
def test_a_long_step_is_cut_into_what_the_engine_takes(
    make_lm: Callable[..., Path], lm_oracle: Any, mode: str, most: int
) -> None:
    ids = [5, 200, 17, 17, 44, 0, 259, 3, 120, 8, 9, 10]
    with load(make_lm(mode)) as engine:
        assert engine.manifest.cache is not None
        layout = replace(engine.manifest.cache, longest_step=most)
        state = KvState(engine.session, layout, engine.manifest.inputs, 1)
        assert state.run(feed(ids[:2], 0), []) == {}
        logits = state.run(feed(ids[2:], 2), ["logits"])["logits"][0]
        assert state.length == len(ids)
        np.testing.assert_allclose(logits, lm_oracle.logits(ids)[2:], **TOLERANCE)


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


def page_session(page: int) -> onnxruntime.InferenceSession:
    """A stand-in for paged attention: token t, when it comes last of its page, marks the page in a copy."""
    nodes = [
        helper.make_node("Shape", ["attention_mask"], ["total"], start=1, end=2),
        helper.make_node("Sub", ["total", "one"], ["newest"]),
        helper.make_node("Div", ["newest", "size"], ["page"]),
        helper.make_node("Mod", ["total", "size"], ["rest"]),
        helper.make_node("Equal", ["rest", "zero"], ["full"]),
        helper.make_node("Shape", ["past"], ["count"], start=1, end=2),
        helper.make_node("Squeeze", ["count"], ["count_scalar"]),
        helper.make_node("Range", ["zero_scalar", "count_scalar", "one_scalar"], ["places"]),
        helper.make_node("Equal", ["places", "page"], ["here"]),
        helper.make_node("And", ["here", "full"], ["written"]),
        helper.make_node("Unsqueeze", ["written", "zero"], ["rows"]),
        helper.make_node("Cast", ["total"], ["mark"], to=2),
        helper.make_node("Where", ["rows", "mark", "past"], ["present"]),
    ]
    constants = {"one": [1], "size": [page], "zero": [0], "zero_scalar": 0, "one_scalar": 1}
    tensors = [onnx.numpy_helper.from_array(np.array(value, np.int64), name) for name, value in constants.items()]
    ports = [
        helper.make_tensor_value_info("input_ids", 7, ["batch", "seq"]),
        helper.make_tensor_value_info("attention_mask", 7, ["batch", "total"]),
        helper.make_tensor_value_info("past", 2, ["batch", "pages"]),
    ]
    output = helper.make_tensor_value_info("present", 2, ["batch", "pages"])
    graph = helper.make_graph(nodes, "pages", ports, [output], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


PAGED = [
    CachePort("past", "present", "uint8", ["batch", "past // 3"]),
    CachePort("ring", "ring.out", "float32", ["batch", 2, 5, 4]),
    CachePort("key", "key.out", "bfloat16", ["batch", 2, "past", 4]),
]


def test_pages_grow_with_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole pages of a full buffer move to the next one; so does nothing that does not grow."""
    monkeypatch.setattr("effc.runtime.kv_state.RESERVE", 0)
    monkeypatch.setattr("effc.runtime.kv_state.BLOCK", 4)
    inputs = [
        Port(name, "int64", ["batch", axis]) for name, axis in (("input_ids", "seq"), ("attention_mask", "total"))
    ]
    state = KvState(page_session(3), CacheLayout("in-place", PAGED[:1]), inputs, 1)
    rooms = []
    for total in range(1, 26):
        state.run({"input_ids": np.zeros((1, 1), np.int64), "attention_mask": np.ones((1, total), np.int64)}, [])
        pages = state.buffers["past"].numpy()[0]
        rooms.append(len(pages))
        assert pages[: total // 3].tolist() == [3 * (index + 1) for index in range(total // 3)]
        assert not pages[total // 3 :].any()
    assert sorted(set(rooms)) == [1, 2, 5, 10]


def test_bytes_of_a_cache_count_what_is_needed() -> None:
    layout = CacheLayout("in-place", PAGED)
    assert cache_bytes(layout, 8, batch=2) == {"past": 2 * 2, "ring": 2 * 40 * 4, "key": 2 * 2 * 8 * 4 * 2}
    assert cache_bytes(layout, 0) == {"past": 0, "ring": 160, "key": 0}


@pytest.mark.parametrize("symbol", ["pages", "total", "past // 0", "past // x", "total // 3"])
def test_unknown_symbols_of_pages_are_refused(symbol: str) -> None:
    with pytest.raises(EngineError, match="unknown symbol"):
        port_shape(CachePort("past", "present", "uint8", ["batch", symbol]), 1, 5)
