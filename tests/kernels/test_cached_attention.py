"""CachedAttention with dense caches in real onnxruntime sessions, against float64."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from attention_oracle import Form, attend
from cached_attention_model import DENSE, open_model

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
F16 = np.dtype(np.float16)
RNG_SEED = 11

FORMS = {
    "tiny": Form(1, 1, 4, 4, scale=0.5),
    "odd": Form(6, 2, 33, 17, scale=33**-0.5),
    "gqa": Form(8, 2, 64, 64, scale=0.125, rotary="half", rotary_size=64),
    "mqa": Form(5, 1, 48, 80, scale=0.2, rotary="interleaved", rotary_size=20),
    "softcap": Form(2, 2, 16, 16, scale=0.7, softcap=5.0),
    "window": Form(4, 2, 40, 24, scale=0.3, window=37, rotary="half", rotary_size=12),
    "both ways": Form(4, 4, 24, 24, scale=0.3, causal=0),
    "both ways, window": Form(4, 4, 24, 24, scale=0.3, causal=0, window=19),
}


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def make_feeds(
    form: Form, batch: int, seq: int, past: int, seed: int = RNG_SEED, bias: bool = False
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    feeds = {
        "query": normal(rng, batch, seq, form.heads * form.head_size),
        "key": normal(rng, batch, seq, form.kv_heads * form.head_size),
        "value": normal(rng, batch, seq, form.kv_heads * form.value_size),
        "valid": np.ones((batch, seq + past), bool),
    }
    if form.rotary != "none":
        angles = rng.uniform(0, 6, (batch, seq, form.rotary_size // 2))
        feeds |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    if bias:
        feeds["bias"] = normal(rng, batch, form.heads, seq, seq + past)
    return feeds


def make_past(form: Form, batch: int, capacity: int, dtype: np.dtype = F32, seed: int = 5) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        normal(rng, batch, form.kv_heads, capacity, size).astype(dtype) for size in (form.head_size, form.value_size)
    ]


def optional(feeds: dict[str, np.ndarray]) -> list[str]:
    return [name for name in ("bias", "cos", "sin") if name in feeds]


def expected(
    form: Form, feeds: dict[str, np.ndarray], past: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens = feeds["valid"].shape[1] - feeds["query"].shape[1]
    return attend(form, past=(past[0][:, :, :tokens], past[1][:, :, :tokens]), **feeds)


def tokens_of(feeds: dict[str, np.ndarray], begin: int, end: int, past: int) -> dict[str, np.ndarray]:
    """New tokens [begin, end) of a step, as a step of their own."""
    part = {name: feeds[name][:, begin:end] for name in ("query", "key", "value", "cos", "sin") if name in feeds}
    part["valid"] = feeds["valid"][:, : past + end]
    if "bias" in feeds:
        part["bias"] = feeds["bias"][:, :, begin:end, : past + end]
    return part


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    ("batch", "seq", "past"), [(1, 1, 0), (2, 1, 700), (3, 5, 130), (1, 70, 0), (2, 150, 77), (1, 0, 5), (2, 129, 0)]
)
def test_matches_float64(name: str, batch: int, seq: int, past: int, isa: str) -> None:
    form = FORMS[name]
    feeds = make_feeds(form, batch, seq, past, bias=name in ("tiny", "odd"))
    if batch > 1:
        feeds["valid"][1, : (seq + past) // 3] = False
    if seq + past > 10:
        feeds["valid"][0, (seq + past) // 2] = False
    cache = make_past(form, batch, past)
    y, present = open_model(form, cache, optional(feeds)).run(feeds, cache)
    wanted, keys, values = expected(form, feeds, cache)
    np.testing.assert_allclose(y, wanted, atol=4e-6, rtol=2e-6)
    np.testing.assert_allclose(present[0], keys, atol=1e-6)
    assert np.array_equal(present[1], values.astype(np.float32))


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize(("seq", "past"), [(1, 200), (3, 40), (90, 60)])
def test_16_bit_caches(dtype: np.dtype, seq: int, past: int, isa: str) -> None:
    form = FORMS["odd"]
    feeds = make_feeds(form, 2, seq, past)
    cache = make_past(form, 2, past, dtype)
    y, present = open_model(form, cache).run(feeds, cache)
    wanted, keys, values = expected(form, feeds, cache)
    np.testing.assert_allclose(y, wanted, atol=4e-6, rtol=2e-6)
    for made, exact in zip(present, (keys, values), strict=True):
        assert made.dtype == dtype
        assert made.tobytes() == exact.astype(np.float32).astype(dtype).tobytes()


def test_rounding_of_every_kind_of_number(isa: str) -> None:
    form = Form(1, 1, 1, 1)
    rng = np.random.default_rng(0)
    numbers = np.frombuffer(rng.bytes(4 * 4000), np.float32)
    numbers = np.concatenate(
        [numbers[np.abs(numbers) < 65519], rng.uniform(-1, 1, 4000) * 2.0 ** rng.integers(-30, 15, 4000)]
    )
    numbers = numbers.astype(np.float32)[None, :, None]
    zeros = np.zeros_like(numbers)
    feeds = {"query": zeros, "key": numbers, "value": zeros, "valid": np.ones(numbers.shape[:2], bool)}
    for dtype in (F16, BF16):
        cache = make_past(form, 1, 0, dtype)
        present = open_model(form, cache).run(feeds, cache)[1][0]
        assert present.tobytes() == numbers[:, None].astype(dtype).tobytes()


@pytest.mark.parametrize("name", ["gqa", "odd", "window"])
@pytest.mark.parametrize(("seq", "past"), [(1, 0), (1, 900), (4, 300), (120, 0), (200, 65)])
def test_a_row_alone_and_padded_in_a_batch_are_the_same_bits(name: str, seq: int, past: int, isa: str) -> None:
    form = FORMS[name]
    alone = make_feeds(form, 1, seq, past)
    cache = make_past(form, 1, past)
    y, present = open_model(form, cache, optional(alone)).run(alone, cache)
    padding = 53
    batch = make_feeds(form, 3, seq, past + padding, seed=3)
    padded = make_past(form, 3, past + padding, seed=4)
    for item in ("query", "key", "value", "cos", "sin"):
        if item in batch:
            batch[item][1] = alone[item][0]
    batch["valid"][1, :padding] = False
    for both, one in zip(padded, cache, strict=True):
        both[1, :, padding:] = one[0]
    y_batch, present_batch = open_model(form, padded, optional(batch)).run(batch, padded)
    assert y_batch[1].tobytes() == y[0].tobytes()
    assert present_batch[0][1, :, padding:].tobytes() == present[0][0].tobytes()


def test_padding_inside_the_new_tokens(isa: str) -> None:
    form = FORMS["gqa"]
    alone = make_feeds(form, 1, 90, 0)
    cache = make_past(form, 1, 0)
    y = open_model(form, cache, optional(alone)).run(alone, cache)[0]
    batch = make_feeds(form, 2, 131, 0, seed=3)
    for item in ("query", "key", "value", "cos", "sin"):
        batch[item][1, 41:] = alone[item][0]
    batch["valid"][1, :41] = False
    y_batch = open_model(form, make_past(form, 2, 0), optional(batch)).run(batch, make_past(form, 2, 0))[0]
    assert y_batch[1, 41:].tobytes() == y[0].tobytes()
    assert not y_batch[1, :41].any()


@pytest.mark.parametrize("name", ["gqa", "odd", "window", "softcap"])
def test_chunks_and_single_steps_equal_one_shot(name: str, isa: str) -> None:
    form = FORMS[name]
    feeds = make_feeds(form, 2, 140, 0, bias=name == "odd")
    feeds["valid"][1, :9] = False
    cache = make_past(form, 2, 0)
    model = open_model(form, cache, optional(feeds))
    whole, present = model.run(feeds, cache)
    results = []
    for begin, end in [(0, 30), (30, 30), (30, 133), *((i, i + 1) for i in range(133, 140))]:
        y, cache = model.run(tokens_of(feeds, begin, end, 0), cache)
        results.append(y)
    np.testing.assert_allclose(np.concatenate(results, axis=1), whole, atol=2e-6, rtol=1e-6)
    assert [a.tobytes() for a in cache] == [a.tobytes() for a in present]


@pytest.mark.parametrize(("seq", "past"), [(1, 600), (1, 64), (150, 40)])
def test_threads_and_places_do_not_change_a_bit(seq: int, past: int, isa: str) -> None:
    form = FORMS["gqa"]
    feeds = make_feeds(form, 2, seq, past)
    feeds["valid"][1, :20] = False
    cache = make_past(form, 2, past + seq + 10)
    results = [
        open_model(form, cache, optional(feeds), threads=threads).run(feeds, cache, in_place)
        for threads in (1, 2, 3)
        for in_place in (False, True)
    ]
    first, first_present = results[0]
    for y, present in results[1:]:
        assert y.tobytes() == first.tobytes()
        for a, b in zip(present, first_present, strict=True):
            assert a[:, :, : past + seq].tobytes() == b[:, :, : past + seq].tobytes()
            assert a.shape == b.shape


@pytest.mark.parametrize("ring", [37, 41, 64])
def test_a_ring_equals_a_dense_cache_with_the_window(ring: int, isa: str) -> None:
    form = FORMS["window"]
    feeds = make_feeds(form, 2, 170, 0)
    feeds["valid"][1, :25] = False
    dense = make_past(form, 2, 0)
    rings = [np.zeros((2, form.kv_heads, ring, a.shape[3]), np.float32) for a in dense]
    plain = open_model(form, dense, optional(feeds))
    model = open_model(form, rings, optional(feeds), storage=DENSE | {"ring": ring})
    for begin, end in [(0, 20), (20, 21), (21, 90), (90, 150), *((i, i + 1) for i in range(150, 170))]:
        part = tokens_of(feeds, begin, end, 0)
        wanted, dense = plain.run(part, dense)
        y, rings = model.run(part, rings, in_place=begin % 2 == 0)
        assert y.tobytes() == wanted.tobytes()
        kept = np.arange(max(0, end - ring), end)
        for a, b in zip(rings, dense, strict=True):
            assert np.array_equal(a[:, :, kept % ring], b[:, :, kept])


def test_what_nobody_sees_is_not_read() -> None:
    form = replace(FORMS["window"], rotary="none", rotary_size=0)
    for seq in (1, 3, 80):
        feeds = make_feeds(form, 1, seq, 300)
        cache = make_past(form, 1, 420)
        wanted = expected(form, feeds, cache)[0]
        for array in cache:
            array[:, :, : 300 - form.window + 1] = np.nan
            array[:, :, 300:] = np.nan
        y, _ = open_model(form, cache).run(feeds, cache, in_place=True)
        np.testing.assert_allclose(y, wanted, atol=4e-6)
    feeds = make_feeds(form, 1, 2, 300)
    feeds["valid"][:, :290] = False
    cache = make_past(form, 1, 300)
    wanted = expected(form, feeds, cache)[0]
    for array in cache:
        array[:, :, :290] = np.nan
    np.testing.assert_allclose(open_model(form, cache).run(feeds, cache)[0], wanted, atol=4e-6)


def test_rows_without_tokens_give_zeros(isa: str) -> None:
    form = FORMS["odd"]
    feeds = make_feeds(form, 2, 3, 20)
    feeds["valid"][1] = False
    cache = make_past(form, 2, 20)
    y = open_model(form, cache).run(feeds, cache)[0]
    assert y[0].all()
    assert not y[1].any()


def test_a_bias_may_hide_everything(isa: str) -> None:
    form = FORMS["tiny"]
    for seq in (1, 80):
        feeds = make_feeds(form, 1, seq, 20, bias=True)
        feeds["bias"][0, 0, 0] = -np.inf
        cache = make_past(form, 1, 20)
        y = open_model(form, cache, ["bias"]).run(feeds, cache)[0]
        assert not y[0, 0].any()
        np.testing.assert_allclose(y, expected(form, feeds, cache)[0], atol=4e-6)


def test_large_scores_are_no_error(isa: str) -> None:
    form = Form(2, 1, 8, 8, scale=1e6)
    for seq in (1, 100):
        feeds = make_feeds(form, 1, seq, 50)
        cache = make_past(form, 1, 50)
        feeds |= {name: np.abs(feeds[name]) * np.float32(1e20) for name in ("query", "key")}
        cache[0] = np.abs(cache[0]) * np.float32(1e20)
        assert np.isfinite(open_model(form, cache).run(feeds, cache)[0]).all()


@pytest.mark.parametrize("name", ["gqa", "odd"])
def test_bias_of_one_row_or_one_head(name: str) -> None:
    form = FORMS[name]
    feeds = make_feeds(form, 2, 3, 30, bias=True)
    cache = make_past(form, 2, 30)
    whole = feeds["bias"]
    for bias in (whole[:1], whole[:, :1], whole[:1, :1]):
        feeds["bias"] = bias
        y = open_model(form, cache, optional(feeds)).run(feeds, cache)[0]
        np.testing.assert_allclose(y, expected(form, feeds, cache)[0], atol=4e-6)


def test_angles_may_be_shared_by_the_rows() -> None:
    form = FORMS["gqa"]
    feeds = make_feeds(form, 3, 4, 10)
    feeds |= {name: feeds[name][:1] for name in ("cos", "sin")}
    cache = make_past(form, 3, 10)
    y = open_model(form, cache, optional(feeds)).run(feeds, cache)[0]
    np.testing.assert_allclose(y, expected(form, feeds, cache)[0], atol=4e-6)


def test_key_and_value_types_may_differ() -> None:
    form = FORMS["gqa"]
    feeds = make_feeds(form, 1, 1, 90)
    cache = [make_past(form, 1, 90, F16)[0], make_past(form, 1, 90, F32)[1]]
    y, present = open_model(form, cache, optional(feeds)).run(feeds, cache)
    np.testing.assert_allclose(y, expected(form, feeds, cache)[0], atol=4e-6)
    assert [a.dtype for a in present] == [F16, F32]


def test_shapes_are_inferred() -> None:
    form = FORMS["odd"]
    session = open_model(form, make_past(form, 1, 3)).session
    assert [output.shape for output in session.get_outputs()] == [
        ["batch", "seq", 6 * 17],
        ["batch4", 2, "new0", 33],
        ["batch4", 2, "new1", 17],
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads": 0}, "attribute 'heads' is 0; it must be from 1"),
        ({"heads": 5}, "attribute 'heads' is 5; it must be a multiple of kv_heads"),
        ({"heads": None}, "attribute 'heads' is missing or not an int"),
        ({"scale": float("nan")}, "attribute 'scale' is nan"),
        ({"scale": 1}, "attribute 'scale' is missing or not a float"),
        ({"softcap": -1.0}, "attribute 'softcap' is negative"),
        ({"causal": 2}, "attribute 'causal' is 2"),
        ({"window": -1}, "attribute 'window' is -1"),
        ({"rotary": "spiral"}, "attribute 'rotary' is 'spiral'"),
        ({"rotary_size": 3}, "attribute 'rotary_size' is 3"),
        ({"rotary": "half", "rotary_size": 5}, "attribute 'rotary_size' is 5"),
        ({"storage": DENSE | {"storage": "heap"}}, "attribute 'storage' is 'heap'"),
        ({"ring": 8}, "attribute 'ring' is 8; a ring must hold the window, which is 0"),
        ({"ring": 8, "window": 9}, "attribute 'ring' is 8; a ring must hold the window, which is 9"),
    ],
)
def test_wrong_attributes_are_refused(overrides: dict[str, object], message: str) -> None:
    form = FORMS["odd"]
    with pytest.raises(Exception, match=message) as error:
        open_model(form, make_past(form, 1, 3), **overrides)
    assert "effc::CachedAttention node 'attention'" in str(error.value)


def run_changed(changes: dict[str, np.ndarray], past: list[np.ndarray] | None = None, seq: int = 2) -> None:
    form = FORMS["gqa"]
    feeds = make_feeds(form, 2, seq, 6, bias=True) | changes
    cache = past or make_past(form, 2, 6)
    open_model(form, cache, optional(feeds)).run(feeds, cache)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": np.zeros((2, 2, 5), np.float32)}, r"query has shape \[2,2,5\], but must be \[any,any,512\]"),
        ({"key": np.zeros((2, 1, 128), np.float32)}, r"key has shape \[2,1,128\], but must be \[2,2,128\]"),
        ({"value": np.zeros((1, 2, 128), np.float32)}, r"value has shape \[1,2,128\]"),
        ({"valid": np.ones((1, 8), bool)}, r"valid has shape \[1,8\]"),
        ({"valid": np.ones((2, 1), bool)}, "valid counts 1 tokens in all, fewer than the 2 new ones"),
        ({"valid": np.ones((2, 20), bool)}, r"bias has shape \[2,8,2,8\]"),
        ({"bias": np.zeros((2, 3, 2, 8), np.float32)}, r"bias has shape \[2,3,2,8\]"),
        ({"cos": np.zeros((2, 2, 31), np.float32)}, r"cos has shape \[2,2,31\], but must be \[1 or batch"),
        ({"sin": np.zeros((3, 2, 32), np.float32)}, r"sin has shape \[3,2,32\]"),
    ],
)
def test_wrong_shapes_are_refused(changes: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(Exception, match=message) as error:
        run_changed(changes)
    assert "effc::CachedAttention node 'attention'" in str(error.value)


def test_a_past_that_is_too_short_is_refused() -> None:
    with pytest.raises(Exception, match="the past has 5 places, but `valid` counts 6 past tokens"):
        run_changed({}, make_past(FORMS["gqa"], 2, 5))
    with pytest.raises(Exception, match=r"past key has shape \[3,2,6,64\]"):
        run_changed({}, make_past(FORMS["gqa"], 3, 6))


@pytest.mark.parametrize(("seq", "token"), [(1, 0), (90, 77)])
@pytest.mark.parametrize("name", ["key", "value"])
def test_new_tokens_that_are_not_finite_are_refused(name: str, seq: int, token: int, isa: str) -> None:
    feeds = make_feeds(FORMS["gqa"], 2, seq, 6)
    feeds[name][1, token, 64] = np.nan
    where = f"effc::CachedAttention node 'attention': {name} of row 1, head 1, token {token} is NaN"
    with pytest.raises(Exception, match=where):
        run_changed({name: feeds[name]}, seq=seq)
    feeds[name][1, token, 64] = -np.inf
    with pytest.raises(Exception, match=f"{name} of row 1, head 1, token {token} is infinite"):
        run_changed({name: feeds[name]}, seq=seq)


@pytest.mark.parametrize("seq", [1, 90])
def test_a_damaged_cache_or_query_is_reported(seq: int, isa: str) -> None:
    for index in (0, 1):
        cache = make_past(FORMS["gqa"], 2, 6)
        cache[index][1, 1, 3, 0] = np.nan
        with pytest.raises(Exception, match=r"the attention of row 1, head 4, token [0-9]+ is not finite"):
            run_changed({}, cache, seq)
    query = make_feeds(FORMS["gqa"], 2, seq, 6)["query"]
    query[0, 0, 70] = np.nan
    with pytest.raises(Exception, match="the attention of row 0, head 1, token 0 is not finite"):
        run_changed({"query": query}, seq=seq)


def test_numbers_too_large_for_the_cache_are_refused() -> None:
    form = FORMS["tiny"]
    feeds = make_feeds(form, 1, 1, 0)
    feeds["value"][0, 0, 2] = 7e4
    cache = make_past(form, 1, 0, F16)
    with pytest.raises(Exception, match=r"row 0, head 0, token 0 is too large for the 16-bit type"):
        open_model(form, cache).run(feeds, cache)


def test_cache_types_are_checked() -> None:
    form = FORMS["tiny"]
    cache = [array.astype(np.uint8) for array in make_past(form, 1, 3)]
    with pytest.raises(Exception, match="past key is uint8; it must be one of float32, float16, bfloat16"):
        open_model(form, cache).run(make_feeds(form, 1, 1, 3), cache)


def test_a_graph_without_its_cache_is_refused() -> None:
    form = FORMS["tiny"]
    with pytest.raises(Exception, match="it has 8 inputs; this storage needs 9") as error:
        open_model(form, make_past(form, 1, 3)[:1])
    assert isinstance(error.value, ort.capi.onnxruntime_pybind11_state.RuntimeException)
