"""Round trips, rates and refusals of the weight codec."""

from __future__ import annotations

import contextlib
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effc import kernels
from effc.kernels import codec

BF16 = np.dtype(ml_dtypes.bfloat16)
PATTERNS = np.arange(65536, dtype=np.uint16)
SIZES = (0, 1, 3, 63, 64, 65, 127, 128, 129, 200)


def bits(array: np.ndarray) -> np.ndarray:
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def layouts(dtype: np.dtype) -> tuple[codec.Layout, ...]:
    return ("raw", "huffman") if dtype == np.float16 else codec.LAYOUTS


def words(shape: tuple[int, int], kind: str, dtype: np.dtype, seed: int) -> np.ndarray:
    """A weight whose exponents are of one kind."""
    rng = np.random.default_rng(seed)
    if kind == "uniform":
        return np.frombuffer(rng.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)
    weight = (rng.standard_normal(shape) * 0.02).astype(dtype)
    if kind == "single":
        weight[...] = dtype.type(1.5)
    if kind == "late escapes":
        weight[: shape[0] // 2, 1::2] = dtype.type(7.0)
        escapes = np.frombuffer(rng.bytes(shape[1] * dtype.itemsize), dtype)
        weight[:1] = escapes
    return weight


@pytest.mark.parametrize("shape", [(256, 256), (65536, 1), (1, 65536), (512, 128), (64, 1024)])
@pytest.mark.parametrize("layout", codec.LAYOUTS)
def test_all_bfloat16_patterns_survive(shape: tuple[int, int], layout: codec.Layout) -> None:
    weight = PATTERNS.reshape(shape).view(BF16)
    assert np.array_equal(bits(codec.decode(codec.encode(weight, layout))), bits(weight))


@pytest.mark.parametrize("layout", ["raw", "rank4", "rank3"])
@pytest.mark.parametrize("shape", [(256, 256), (65536, 1), (1, 65536), (331, 198)])
def test_all_bfloat16_patterns_widen_in_every_kernel(shape: tuple[int, int], layout: codec.Layout, isa: str) -> None:
    weight = np.resize(PATTERNS, shape).view(BF16)
    wide = codec.widen(codec.encode(weight, layout))
    assert np.array_equal(bits(wide), bits(weight).astype(np.uint32) << 16)


@pytest.mark.parametrize("layout", ["raw", "huffman"])
def test_all_float16_patterns_survive(layout: codec.Layout) -> None:
    weight = np.resize(PATTERNS, (655, 101)).view(np.float16)
    assert np.array_equal(bits(codec.decode(codec.encode(weight, layout))), bits(weight))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.sampled_from(SIZES),
    columns=st.sampled_from(SIZES),
    kind=st.sampled_from(["normal", "uniform", "single", "late escapes"]),
    dtype=st.sampled_from([np.dtype(np.float32), np.dtype(np.float16), BF16]),
    threads=st.integers(1, 3),
)
def test_round_trips_and_transcodes(rows: int, columns: int, kind: str, dtype: np.dtype, threads: int) -> None:
    weight = words((rows, columns), kind, dtype, rows * 1000 + columns)
    coded = {layout: codec.encode(weight, layout, threads) for layout in layouts(dtype)}
    for source in coded.values():
        assert np.array_equal(bits(codec.decode(source, threads)), bits(weight))
        for layout, direct in coded.items():
            made = codec.transcode(source, layout, threads)
            for name, tensor in made.named().items():
                assert tensor.tobytes() == direct.named()[name].tobytes(), (source.layout, layout, name)


def test_planes_are_shared_between_layouts() -> None:
    stored = codec.encode(words((64, 256), "normal", BF16, 0), "huffman")
    loaded = codec.transcode(stored, "rank4")
    assert np.shares_memory(stored.tensors[0], loaded.tensors[0])


def test_arrays_outlive_their_weight() -> None:
    stream = codec.encode(words((64, 256), "normal", BF16, 0), "huffman").named()["stream"]
    before = stream.tobytes()
    for seed in range(3):
        codec.encode(words((64, 256), "normal", BF16, seed), "huffman")
    assert stream.tobytes() == before


def test_rates_of_normal_weights() -> None:
    weight = words((1024, 2048), "normal", BF16, 1)
    predicted = codec.predict(codec.exponent_histogram(weight), "bfloat16", weight.shape)
    assert predicted.entropy_bits == pytest.approx(10.545, abs=0.01)
    sizes = {layout: codec.encode(weight, layout).bits_per_weight for layout in codec.LAYOUTS}
    assert sizes["huffman"] <= predicted.entropy_bits + 0.08
    assert sizes["rank4"] <= 12.07
    assert sizes["rank3"] <= 11.44
    assert sizes["huffman"] == pytest.approx(predicted.storage_bits, abs=1e-3)
    assert sizes["rank4"] == pytest.approx(predicted.rank4_bits, abs=1e-9)
    assert sizes["rank3"] == pytest.approx(predicted.rank3_bits, abs=1e-9)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float16), BF16])
@pytest.mark.parametrize("kind", ["normal", "uniform", "single"])
def test_prediction_matches_encoding(dtype: np.dtype, kind: str) -> None:
    weight = words((257, 300), kind, dtype, 3)
    name = {2: "bfloat16" if dtype == BF16 else "float16", 4: "float32"}[dtype.itemsize]
    predicted = codec.predict(codec.exponent_histogram(weight), name, weight.shape)
    for layout in layouts(dtype)[1:]:
        value = predicted.storage_bits if layout == "huffman" else getattr(predicted, f"{layout}_bits")
        assert codec.encode(weight, layout).bits_per_weight == pytest.approx(value, abs=2e-3)


def test_histogram_counts_exponents() -> None:
    weight = words((100, 333), "uniform", np.dtype(np.float32), 5)
    expected = np.bincount((bits(weight).ravel() >> 23) & 255, minlength=256)
    assert np.array_equal(codec.exponent_histogram(weight), expected)


def test_code_lengths_are_optimal_and_limited() -> None:
    fibonacci = np.zeros(256, np.uint64)
    a, b = 1, 1
    for i in range(40):
        fibonacci[i] = a
        a, b = b, a + b
    lengths = codec.huffman_lengths(fibonacci)
    assert lengths.max() == 12
    assert sum(2.0 ** -int(n) for n in lengths if n) == 1
    assert list(codec.huffman_lengths(np.ones(256, np.uint64))) == [8] * 256


def test_is_bf16() -> None:
    weight = words((50, 1000), "normal", BF16, 0).astype(np.float32)
    assert codec.is_bf16(weight)
    weight[-1, -1] += np.float32(1e-7)
    assert not codec.is_bf16(weight)


def damaged(coded: codec.CodedWeight, name: str, change: object) -> codec.CodedWeight:
    """The weight with one tensor replaced by `change(copy of it)`."""
    tensors = {key: value.copy() for key, value in coded.named().items()}
    result = change(tensors[name])  # type: ignore[operator]
    tensors[name] = tensors[name] if result is None else result
    return codec.CodedWeight(coded.dtype, coded.shape, coded.layout, tuple(tensors.values()))


def set_item(index: object, value: int) -> object:
    def change(array: np.ndarray) -> None:
        array[index] = value

    return change


@pytest.mark.parametrize(
    ("layout", "name", "change"),
    [
        ("huffman", "stream", lambda a: a[:-1]),
        ("huffman", "stream", lambda a: np.append(a, 0).astype(np.uint8)),
        ("huffman", "chunk_offsets", set_item(1, -5)),
        ("huffman", "chunk_offsets", set_item(1, 1 << 40)),
        ("huffman", "chunk_offsets", set_item(0, 1)),
        ("huffman", "chunk_offsets", lambda a: a[:-1]),
        ("huffman", "code_lengths", set_item(0, 1)),
        ("huffman", "code_lengths", set_item(slice(None), 0)),
        ("huffman", "code_lengths", set_item(121, 200)),
        ("huffman", "code_lengths", lambda a: a.astype(np.int32)),
        ("huffman", "sign_mantissa", lambda a: a[:, :-1]),
        ("rank4", "escapes", lambda a: a[:-1]),
        ("rank4", "row_escapes", set_item(5, 1 << 30)),
        ("rank4", "row_escapes", set_item(5, -1)),
        ("rank4", "codes", set_item(slice(None), 255)),
        ("rank4", "table", lambda a: a[:-1]),
        ("rank3", "codes", set_item(slice(None), 0)),
        ("rank3", "row_escapes", set_item(-1, 0)),
    ],
)
def test_damage_is_refused(layout: codec.Layout, name: str, change: object) -> None:
    coded = damaged(codec.encode(words((200, 300), "normal", BF16, 2), layout), name, change)
    with pytest.raises(codec.CorruptWeightError):
        codec.decode(coded)
    with pytest.raises(codec.CorruptWeightError):
        codec.transcode(coded, "rank4" if layout != "rank4" else "rank3")


@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 2**32), layout=st.sampled_from(["huffman", "rank4", "rank3"]))
def test_random_damage_never_crashes(seed: int, layout: codec.Layout) -> None:
    rng = np.random.default_rng(seed)
    coded = codec.encode(words((40, 500), "normal", BF16, 4), layout)
    name = rng.choice([key for key in coded.named() if key != "sign_mantissa"])

    def flip(array: np.ndarray) -> None:
        raw = array.view(np.uint8).reshape(-1)
        raw[rng.integers(0, raw.size, 3)] ^= rng.integers(1, 256, 3).astype(np.uint8)

    with contextlib.suppress(codec.CorruptWeightError):
        codec.decode(damaged(coded, name, flip))


def test_wrong_requests_are_named() -> None:
    with pytest.raises(ValueError, match="float64"):
        codec.encode(np.zeros((2, 2)), "raw")
    with pytest.raises(ValueError, match="no rank layout"):
        codec.encode(np.zeros((2, 2), np.float16), "rank4")
    with pytest.raises(ValueError, match="choose one of"):
        codec.encode(np.zeros((2, 2), np.float32), "zip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose one of"):
        kernels.select_isa("sse9")
    with pytest.raises(ValueError, match="matrix"):
        codec.encode(np.zeros(2, np.float32), "raw")
