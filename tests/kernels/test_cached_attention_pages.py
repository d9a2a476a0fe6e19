"""CachedAttention with paged caches in real onnxruntime sessions, against float64."""

from __future__ import annotations

from dataclasses import asdict, replace

import ml_dtypes
import numpy as np
import pytest
from attention_oracle import Form
from cached_attention_model import DENSE, Model, open_model
from paged_cache_oracle import PagedCache, Pages

from effc import kernels

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
F16 = np.dtype(np.float16)

GQA = Form(4, 2, 32, 32, scale=32**-0.5)
ODD = Form(3, 1, 27, 45, scale=27**-0.5, softcap=20.0)
WINDOW = Form(4, 2, 32, 16, scale=0.2, window=70)
ROTARY = Form(4, 2, 32, 32, scale=0.2, rotary="half", rotary_size=32)

STORAGES = {
    "int8": Pages(),
    "int4": Pages(key_bits=(4, 4), value_bits=(4, 4), key_group=16, value_group=16),
    "no sinks, int2": Pages(sinks=0, recent=0, key_bits=(2, 2), value_bits=(2, 2)),
    "zipcache": Pages(
        salient=16,
        key_bits=(4, 2),
        value_bits=(4, 2),
        value_scheme="separable",
        importance="normalised",
    ),
    "mikv": Pages(salient=16, key_bits=(16, 4), value_bits=(16, 4), key_scheme="balanced", importance="accumulated"),
    "causal count": Pages(salient=16, key_bits=(8, 4), value_bits=(8, 2), importance="causal-count"),
    "balanced": Pages(key_scheme="balanced", value_scheme="separable", key_bits=(8, 8), value_bits=(8, 8)),
    "bfloat16": Pages(key_bits=(16, 16), value_bits=(16, 16), page=16, salient=16),
}
FORMS = {"gqa": GQA, "odd": ODD, "window": WINDOW}
STEPS = [(0, 1), (1, 30), (30, 31), (31, 31), (31, 131), *((i, i + 1) for i in range(131, 140)), (140, 215), (215, 230)]


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def make_feeds(form: Form, batch: int, seq: int, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    feeds = {
        "query": normal(rng, batch, seq, form.heads * form.head_size),
        "key": normal(rng, batch, seq, form.kv_heads * form.head_size),
        "value": normal(rng, batch, seq, form.kv_heads * form.value_size),
        "valid": np.ones((batch, seq), bool),
    }
    if form.rotary != "none":
        angles = rng.uniform(0, 6, (batch, seq, form.rotary_size // 2))
        feeds |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    return feeds


def part_of(feeds: dict[str, np.ndarray], begin: int, end: int) -> dict[str, np.ndarray]:
    part = {name: feeds[name][:, begin:end] for name in ("query", "key", "value", "cos", "sin") if name in feeds}
    return part | {"valid": feeds["valid"][:, :end]}


def storage_of(pages: Pages) -> dict[str, object]:
    return DENSE | asdict(pages) | {"storage": "pages"}


def open_pages(form: Form, pages: Pages, past: list[np.ndarray], threads: int = 2) -> Model:
    optional = ["cos", "sin"] if form.rotary != "none" else []
    return open_model(form, past, optional, threads=threads, storage=storage_of(pages))


def check_cache(cache: PagedCache, present: list[np.ndarray], tolerance: float = 0) -> None:
    """The tensors hold what the oracle holds."""
    for b, row in enumerate(cache.rows):
        places = cache.places(b)
        for tensor, exact in zip(present[:2], (row.keys, row.values), strict=False):
            kept = tensor[b, :, : len(places)].astype(np.float64)
            np.testing.assert_allclose(kept, exact[:, places], rtol=tolerance, atol=tolerance)
        capacity = present[2].shape[2]
        first = max(0, len(row.pages) - capacity) if cache.form.window else 0
        for p in range(first, len(row.pages)):
            place = p % capacity if cache.form.window else p
            for head, page in enumerate(row.pages[p]):
                differing = np.mean(present[2][b, head, place] != page)
                assert differing <= tolerance * 1000, (b, p, head)
        if len(present) > 3:
            room = cache.pages.places
            used = present[3][b, :, : len(places)]
            counts = present[3][b, :, room : room + len(places)]
            if cache.pages.two_classes:
                np.testing.assert_allclose(used, row.sums[:, places], rtol=2e-5, atol=1e-6)
                assert np.array_equal(counts, row.counts[:, places])
            np.testing.assert_allclose(present[3][b, :, 2 * room :], row.query_max, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", STORAGES)
def test_steps_match_float64(name: str, form: str, isa: str) -> None:
    pages, dtype = STORAGES[name], BF16 if name in ("int8", "zipcache") else F16 if name == "int4" else F32
    feeds = make_feeds(FORMS[form], 3, 230)
    feeds["valid"][1, :40] = False
    feeds["valid"][2, 57:75] = False
    cache = PagedCache(FORMS[form], pages, dtype, 3)
    past = cache.empty()
    model = open_pages(FORMS[form], pages, past)
    for begin, end in STEPS:
        part = part_of(feeds, begin, end)
        y, past = model.run(part, past)
        np.testing.assert_allclose(y, cache.step(part), atol=2e-5, rtol=1e-5)
        check_cache(cache, past)


def test_rotated_keys_are_stored(isa: str) -> None:
    feeds = make_feeds(ROTARY, 1, 120)
    cache = PagedCache(ROTARY, STORAGES["int8"], F32, 1)
    past = cache.empty()
    model = open_pages(ROTARY, STORAGES["int8"], past)
    for begin, end in [(0, 100), (100, 119), (119, 120)]:
        part = part_of(feeds, begin, end)
        y, past = model.run(part, past)
        np.testing.assert_allclose(y, cache.step(part), atol=1e-3)
        check_cache(cache, past, tolerance=2e-6 if end < 100 else 1e-5)


@pytest.mark.parametrize("name", ["int4", "zipcache", "mikv"])
@pytest.mark.parametrize("form", ["gqa", "odd", "window"])
def test_a_row_alone_and_padded_in_a_batch_are_the_same_bits(name: str, form: str, isa: str) -> None:
    pages, shape, padding = STORAGES[name], FORMS[form], 43
    alone = make_feeds(shape, 1, 140)
    batch = make_feeds(shape, 3, 140 + padding, seed=9)
    for item in ("query", "key", "value"):
        batch[item][1, padding:] = alone[item][0]
    batch["valid"][1, :padding] = False
    one, many = PagedCache(shape, pages, F32, 1).empty(), PagedCache(shape, pages, F32, 3).empty()
    model, model_batch = open_pages(shape, pages, one), open_pages(shape, pages, many)
    for begin, end in [(0, 90), *((i, i + 1) for i in range(90, 100)), (100, 140)]:
        y, one = model.run(part_of(alone, begin, end), one)
        first = begin + padding if begin else 0
        y_batch, many = model_batch.run(part_of(batch, first, end + padding), many)
        assert y_batch[1, -(end - begin) :].tobytes() == y[0].tobytes()
        for index, (a, b) in enumerate(zip(one, many, strict=True)):
            rows = a.shape[2] if index == 2 and not shape.window else None
            assert b[1, :, :rows].tobytes() == a[0].tobytes()


@pytest.mark.parametrize("name", ["int8", "zipcache"])
def test_threads_and_places_do_not_change_a_bit(name: str, isa: str) -> None:
    pages = STORAGES[name]
    feeds = make_feeds(GQA, 2, 200)
    feeds["valid"][1, :20] = False
    results = []
    for threads in (1, 2):
        for in_place in (False, True):
            past = PagedCache(GQA, pages, BF16, 2).empty(capacity=7)
            model = open_pages(GQA, pages, past, threads)
            found = []
            for begin, end in [(0, 150), *((i, i + 1) for i in range(150, 200))]:
                y, past = model.run(part_of(feeds, begin, end), past, in_place)
                found.append(y.tobytes())
            used = PagedCache(GQA, pages, BF16, 2)
            used.step(feeds)
            live = len(used.places(0))
            found += [past[i][0, :, :live].tobytes() for i in (0, 1)] + [past[2].tobytes()]
            results.append(found)
    assert all(result == results[0] for result in results[1:])


def test_no_token_is_quantized_twice() -> None:
    pages = STORAGES["int4"]
    feeds = make_feeds(GQA, 2, 300)
    past = PagedCache(GQA, pages, F32, 2).empty(capacity=9)
    model = open_pages(GQA, pages, past)
    before = kernels.quantized_tokens()
    for begin, end in [(0, 100), *((i, i + 1) for i in range(100, 300))]:
        _, past = model.run(part_of(feeds, begin, end), past, in_place=True)
    full = pages.pages(300) * pages.page
    assert kernels.quantized_tokens() - before == full * GQA.kv_heads * 2


def test_16_bit_pages_lose_rounding_only(isa: str) -> None:
    feeds = make_feeds(GQA, 1, 260)
    dense = [np.zeros((1, 2, 0, 32), np.float32)] * 2
    pages = STORAGES["bfloat16"]
    past = PagedCache(GQA, pages, BF16, 1).empty()
    model, plain = open_pages(GQA, pages, past), open_model(GQA, dense)
    for begin, end in [(0, 250), *((i, i + 1) for i in range(250, 260))]:
        y, past = model.run(part_of(feeds, begin, end), past)
        wanted, dense = plain.run(part_of(feeds, begin, end), dense)
        np.testing.assert_allclose(y, wanted, atol=2e-3)


def test_a_bias_reaches_the_right_tokens_of_a_page(isa: str) -> None:
    pages = STORAGES["zipcache"]
    feeds = make_feeds(GQA, 1, 150)
    cache = PagedCache(GQA, pages, F32, 1)
    past = cache.empty()
    y, past = open_pages(GQA, pages, past).run(part_of(feeds, 0, 149), past)
    cache.step(part_of(feeds, 0, 149))
    last = part_of(feeds, 149, 150) | {"bias": normal(np.random.default_rng(3), 1, 4, 1, 150)}
    y, _ = open_model(GQA, past, ["bias"], storage=storage_of(pages)).run(last, past)
    np.testing.assert_allclose(y, cache.step(last), atol=2e-5)


def test_shapes_are_inferred() -> None:
    past = PagedCache(WINDOW, STORAGES["zipcache"], F32, 1).empty()
    outputs = open_pages(WINDOW, STORAGES["zipcache"], past).session.get_outputs()
    assert [output.type for output in outputs] == ["tensor(float)"] * 3 + ["tensor(uint8)", "tensor(float)"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"page": 512}, "attribute 'page' is 512; it must be from 1 to 256"),
        ({"salient": 8, "importance": "normalised"}, "salient is 8 — give a multiple of 16"),
        ({"salient": 64}, "attribute 'salient' is 64; it must be from 0 to 32"),
        ({"key_bits": [8]}, "attribute 'key_bits' must be two of 2, 4, 8, 16"),
        ({"value_bits": [8, 3]}, "attribute 'value_bits' must be two of 2, 4, 8, 16"),
        ({"key_scheme": "row"}, "attribute 'key_scheme' is 'row'; it must be one of 'channel', 'balanced'"),
        ({"value_scheme": "none"}, "attribute 'value_scheme' is 'none'"),
        ({"salient": 16, "importance": "none"}, "attribute 'importance' is 'none'"),
        ({"sinks": -1}, "attribute 'sinks' is -1"),
        ({"recent": None}, "attribute 'recent' is missing or not an int"),
    ],
)
def test_wrong_attributes_are_refused(overrides: dict[str, object], message: str) -> None:
    past = PagedCache(GQA, STORAGES["int8"], F32, 1).empty()
    with pytest.raises(Exception, match=message) as error:
        open_model(GQA, past, storage=storage_of(STORAGES["int8"]), **overrides)
    assert "effc::CachedAttention node 'attention'" in str(error.value)


def test_wrong_tensors_are_refused() -> None:
    pages = STORAGES["int8"]
    past = PagedCache(GQA, pages, F32, 1).empty()
    feeds = make_feeds(GQA, 1, 100)
    model = open_pages(GQA, pages, past)
    with pytest.raises(Exception, match="the past has 0 pages, but `valid` counts 99 past tokens, which fill 2"):
        model.run(part_of(feeds, 99, 100), past)
    short = [past[0][:, :, :-1], *past[1:]]
    with pytest.raises(Exception, match=r"past exact_key has shape \[1,2,47,32\], but must be \[1,2,48,32\]"):
        model.run(part_of(feeds, 0, 1), short)


@pytest.mark.parametrize("tensor", [0, 1])
def test_a_damaged_exact_buffer_is_refused(tensor: int) -> None:
    pages = replace(STORAGES["int8"], recent=0)
    feeds = make_feeds(GQA, 1, 80)
    past = PagedCache(GQA, pages, F32, 1).empty()
    model = open_pages(GQA, pages, past)
    _, past = model.run(part_of(feeds, 0, 20), past)
    past[tensor][0, 1, 9, 3] = np.nan
    with pytest.raises(Exception, match="the attention of row 0, head 2"):
        model.run(part_of(feeds, 20, 80), past)


@pytest.mark.parametrize("name", ["int8", "int4", "zipcache", "mikv"])
def test_the_order_of_pages_does_not_matter(name: str, isa: str) -> None:
    feeds, pages = make_feeds(GQA, 1, 400), STORAGES[name]
    past = PagedCache(GQA, pages, BF16, 1).empty()
    model = open_pages(GQA, pages, past)
    _, past = model.run(part_of(feeds, 0, 399), past)
    full = pages.pages(399)
    assert full > 5
    shuffled = [array.copy() for array in past]
    order = np.random.default_rng(4).permutation(full)
    shuffled[2][:, :, :full] = past[2][:, :, order]
    outputs = [model.run(part_of(feeds, 399, 400), cache)[0] for cache in (past, shuffled)]
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-6)
