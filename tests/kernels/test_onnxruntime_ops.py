"""CodedMatMul, CodedGather and DecodeWeight in real onnxruntime sessions."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto

from effc import kernels
from effc.kernels import codec

BF16 = np.dtype(ml_dtypes.bfloat16)
SHAPE = (600, 136)


def weight_of(dtype: np.dtype, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    rng = np.random.default_rng(7)
    weight = rng.standard_normal(shape) * 0.02
    weight[: shape[0] // 20] *= 1e3
    return weight.astype(dtype)


def layouts(dtype: np.dtype) -> tuple[codec.Layout, ...]:
    return ("raw", "huffman") if dtype == np.float16 else codec.LAYOUTS


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32), np.dtype(np.float16)])
def test_all_layouts_and_threads_give_the_same_bits(dtype: np.dtype, isa: str, open_session) -> None:
    weight = weight_of(dtype)
    sessions = [open_session(codec.encode(weight, layout), threads=t) for layout in layouts(dtype) for t in (1, 2, 3)]
    for m in (1, 2, 3, 8, 17, 64, 300):
        x = np.random.default_rng(m).standard_normal((1, m, SHAPE[1])).astype(np.float32)
        results = [session.run(None, {"x": x})[0] for session in sessions]
        exact = x.astype(np.float64) @ weight.astype(np.float64).T
        magnitude = np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T
        bound = (SHAPE[1] + 2) * np.finfo(np.float32).eps / 2 * magnitude
        assert results[0].shape == (1, m, SHAPE[0])
        assert np.all(np.abs(results[0] - exact) <= bound)
        for result in results[1:]:
            assert result.tobytes() == results[0].tobytes()


@pytest.mark.parametrize("wanted", ["raw", "rank4", "rank3"])
def test_runtime_layout_can_be_forced(wanted: str, open_session, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(BF16)
    monkeypatch.setenv("EFFC_RUNTIME_LAYOUT", wanted)
    session = open_session(codec.encode(weight, "huffman"), ("DecodeWeight",))
    assert np.array_equal(session.run(None, {})[0], weight.astype(np.float32))


def test_unknown_runtime_layout_is_an_error(open_session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFC_RUNTIME_LAYOUT", "zip")
    with pytest.raises(Exception, match="unknown layout 'zip'"):
        open_session(codec.encode(weight_of(BF16), "huffman"))


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32), np.dtype(np.float16)])
def test_gather_and_decode(dtype: np.dtype, isa: str, open_session) -> None:
    weight = weight_of(dtype)
    wide = weight.astype(np.float32)
    for layout in layouts(dtype):
        session = open_session(codec.encode(weight, layout), ("CodedGather", "DecodeWeight"))
        rows, everything = session.run(None, {"i": np.array([0, 5, -1, 599, -600, 5])})
        assert np.array_equal(rows, wide[[0, 5, -1, 599, -600, 5]])
        assert np.array_equal(everything, wide)


def test_gather_takes_int32_and_no_rows(open_session) -> None:
    weight = weight_of(BF16)
    session = open_session(codec.encode(weight, "rank4"), ("CodedGather",), index_type=TensorProto.INT32)
    assert np.array_equal(session.run(None, {"i": np.array([3], np.int32)})[0], weight[3:4].astype(np.float32))
    assert session.run(None, {"i": np.zeros(0, np.int32)})[0].shape == (0, SHAPE[1])


def test_gather_out_of_range_names_node_and_index(open_session) -> None:
    session = open_session(codec.encode(weight_of(BF16), "rank4"), ("CodedGather",))
    with pytest.raises(Exception, match=r"effc::CodedGather node 'node0': index 600 at position 1"):
        session.run(None, {"i": np.array([0, 600])})


def test_shapes_are_inferred(open_session) -> None:
    session = open_session(codec.encode(weight_of(BF16), "rank4"), ("CodedMatMul", "CodedGather", "DecodeWeight"))
    assert [output.shape for output in session.get_outputs()] == [
        ["batch", "seq", SHAPE[0]],
        ["count", SHAPE[1]],
        list(SHAPE),
    ]


@pytest.mark.parametrize("layout", codec.LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (1, 1)])
def test_empty_and_tiny_weights(shape: tuple[int, int], layout: codec.Layout, open_session) -> None:
    session = open_session(codec.encode(np.ones(shape, BF16), layout))
    for m in (0, 1, 40):
        y = session.run(None, {"x": np.ones((1, m, shape[1]), np.float32)})[0]
        assert np.array_equal(y, np.full((1, m, shape[0]), float(shape[1]), np.float32))


@pytest.mark.parametrize("layout", ["huffman", "rank4"])
def test_tied_nodes_share_one_weight_and_release_it(layout: codec.Layout, open_session) -> None:
    before = kernels.live_weights()
    session = open_session(codec.encode(weight_of(BF16), layout), ("CodedGather", "CodedMatMul", "CodedMatMul"))
    assert kernels.live_weights() == before + 1
    del session
    assert kernels.live_weights() == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rows": 601}, "does not fit rows 601"),
        ({"rows": -1}, "out of range"),
        ({"columns": 1 << 62}, "out of range"),
        ({"layout": "zip"}, "unknown layout 'zip'"),
        ({"layout": "rank3"}, "codes has shape"),
        ({"layout": "raw"}, "takes 1 tensors, got 5"),
        ({"dtype": 7}, "dtype 7 is not supported"),
        ({"dtype": 1}, "takes 6 tensors, got 5"),
        ({"dtype": 10}, "float16 weights have no rank layout"),
        ({"rows": None}, "attribute 'rows' is missing or not an int"),
        ({"rows": "many"}, "attribute 'rows' is missing or not an int"),
        ({"layout": 4}, "attribute 'layout' is missing or not a string"),
    ],
)
def test_wrong_attributes_are_refused(overrides: dict[str, object], message: str, open_session) -> None:
    with pytest.raises(Exception, match=message) as error:
        open_session(codec.encode(weight_of(BF16), "rank4"), **overrides)
    assert "effc::CodedMatMul node 'node0'" in str(error.value)


def test_damaged_weight_is_refused(open_session) -> None:
    coded = codec.encode(weight_of(BF16), "huffman")
    tensors = (*coded.tensors[:2], coded.tensors[2] ^ 0x5A, coded.tensors[3])
    with pytest.raises(Exception, match="the weight is damaged"):
        open_session(codec.CodedWeight(coded.dtype, coded.shape, "huffman", tensors))


def test_x_of_another_width_is_refused(open_session) -> None:
    session = open_session(codec.encode(weight_of(BF16), "rank4"))
    with pytest.raises(Exception, match=r"node0.*x has shape \[1,2,5\].*must be 136"):
        session.run(None, {"x": np.zeros((1, 2, 5), np.float32)})
