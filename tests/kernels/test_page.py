"""Bytes, decoded values and products of quantized pages against the numpy oracle."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import page_oracle as oracle
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from effc import kernels
from effc.kernels import kv_page
from effc.kernels.kv_page import PageSpec

F32 = np.float32
BITS = (2, 4, 8, 16)
SIZES = [  # head size, value size, page, salient
    (128, 128, 128, 0),
    (64, 64, 64, 64),
    (20, 33, 50, 16),
    (80, 20, 256, 160),
    (33, 80, 17, 0),
    (1, 1, 1, 0),
    (256, 16, 16, 16),
    (300, 130, 40, 32),
]
SCHEMES = [  # key scheme, value scheme, key group, value group
    ("channel", "token", 0, 0),
    ("channel", "token", 32, 32),
    ("channel", "token", 16, 48),
    ("channel", "separable", 64, 0),
    ("balanced", "token", 0, 16),
    ("balanced", "separable", 0, 0),
]


class Case:
    """Two random pages with holes, and what the oracle makes of them."""

    def __init__(self, spec: PageSpec, scale: float = 1.0, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.spec = spec
        self.keys = (rng.standard_normal((2, spec.page, spec.head_size)) * scale).astype(F32)
        self.values = (rng.standard_normal((2, spec.page, spec.value_size)) * scale).astype(F32)
        self.valid = rng.random((2, spec.page)) < 0.9
        self.importance = rng.integers(0, 9, (2, spec.page)).astype(F32)  # with ties
        self.query_max = rng.integers(0, 9, spec.head_size).astype(F32)

    def encode(self) -> np.ndarray:
        return kv_page.encode(self.spec, self.keys, self.values, self.valid, self.importance, self.query_max)

    def expected(self) -> np.ndarray:
        rows = zip(self.keys, self.values, self.valid, self.importance, strict=True)
        pages = [oracle.encode(self.spec, k, v, ok, i, self.query_max) for k, v, ok, i in rows]
        return np.stack([np.frombuffer(page, np.uint8) for page in pages])

    def check(self) -> np.ndarray:
        """Encode, and compare bytes and decoded values with the oracle."""
        pages = self.encode()
        expected = self.expected()
        assert pages.shape == expected.shape
        np.testing.assert_array_equal(pages, expected)
        keys, values = kv_page.decode(self.spec, pages)
        for page, k, v in zip(pages, keys, values, strict=True):
            np.testing.assert_array_equal(k, oracle.decode(self.spec, page)[0])
            np.testing.assert_array_equal(v, oracle.decode(self.spec, page)[1])
        return pages


def spec_of(sizes: tuple[int, int, int, int], schemes: tuple[str, str, int, int], first: int, second: int) -> PageSpec:
    head_size, value_size, page, salient = sizes
    key_scheme, value_scheme, key_group, value_group = schemes
    return PageSpec(
        head_size,
        value_size,
        page,
        (first, second),
        (second, first),
        salient,
        key_scheme,  # type: ignore[arg-type]
        value_scheme,  # type: ignore[arg-type]
        key_group,
        value_group,
    )


@pytest.mark.parametrize("schemes", SCHEMES)
@pytest.mark.parametrize("sizes", SIZES)
def test_bytes_and_decoded_values_are_the_oracles(
    sizes: tuple[int, int, int, int], schemes: tuple[str, str, int, int], isa: str
) -> None:
    for first, second in itertools.product(BITS, BITS):
        Case(spec_of(sizes, schemes, first, second)).check()


def relative_error(result: np.ndarray, weights: np.ndarray, rows: np.ndarray) -> float:
    """Largest error of weights @ rows, relative to the sum of magnitudes of the worst result."""
    exact = weights.astype(np.float64) @ rows.astype(np.float64)
    magnitude = np.abs(weights).astype(np.float64) @ np.abs(rows).astype(np.float64)
    return float(np.abs(result - exact).max() / max(magnitude.max(), 1e-300))


@pytest.mark.parametrize("schemes", SCHEMES)
@pytest.mark.parametrize("sizes", SIZES)
def test_products_are_those_of_the_decoded_rows(
    sizes: tuple[int, int, int, int], schemes: tuple[str, str, int, int], isa: str
) -> None:
    rng = np.random.default_rng(1)
    for (first, second), g in zip(
        [(2, 4), (4, 8), (8, 16), (16, 2), (4, 4), (2, 2), (8, 8), (16, 16), (2, 8), (8, 2)],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 41],
        strict=True,
    ):
        case = Case(spec_of(sizes, schemes, first, second))
        spec, pages = case.spec, case.encode()
        keys, values = (x.reshape(2 * spec.page, -1) for x in kv_page.decode(spec, pages))
        queries = rng.standard_normal((g, spec.head_size)).astype(F32)
        assert relative_error(kv_page.scores(spec, pages, queries), queries, keys.T) < 1e-5
        weights = rng.random((g, 2 * spec.page)).astype(F32)
        assert relative_error(kv_page.values(spec, pages, weights), weights, values) < 1e-5


@pytest.mark.parametrize("bits", BITS)
def test_a_query_gets_the_same_bits_alone_and_among_others(bits: int, isa: str) -> None:
    spec = PageSpec(80, 80, 50, (bits, bits), (bits, bits), key_group=16, value_group=32)
    pages = Case(spec).encode()
    queries = np.random.default_rng(2).standard_normal((39, 80)).astype(F32)
    together = kv_page.scores(spec, pages, queries)
    weights = np.abs(together)
    sums = kv_page.values(spec, pages, weights)
    for i in (0, 3, 7, 31, 32, 38):
        assert kv_page.scores(spec, pages, queries[i : i + 1]).tobytes() == together[i].tobytes()
        assert kv_page.values(spec, pages, weights[i : i + 1]).tobytes() == sums[i].tobytes()


def test_linear_attention_is_scores_then_values(isa: str) -> None:
    spec = PageSpec(20, 33, 50, (4, 8), (8, 2), 16)
    pages = Case(spec).encode()
    queries = np.random.default_rng(3).standard_normal((3, 20)).astype(F32)
    expected = kv_page.values(spec, pages, kv_page.scores(spec, pages, queries))
    np.testing.assert_array_equal(kv_page.linear_attention(spec, pages, queries), expected)


@pytest.mark.parametrize("schemes", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-41])
def test_magnitudes_at_the_ends_of_float32(
    scale: float, bits: int, schemes: tuple[str, str, int, int], isa: str
) -> None:
    spec = spec_of((40, 33, 50, 16), schemes, bits, bits)
    case = Case(spec, scale)
    pages = case.check()
    for decoded in kv_page.decode(spec, pages):
        assert np.isfinite(decoded).all()


def constant_channel(x: np.ndarray) -> None:
    x[..., 3] = 1.7


def zero_channels(x: np.ndarray) -> None:
    x[..., ::2] = 0


def negative(x: np.ndarray) -> None:
    np.negative(np.abs(x), out=x)


def outlier_channel(x: np.ndarray) -> None:
    x[..., 5] *= 1000


def all_zero(x: np.ndarray) -> None:
    x[:] = 0


def negative_zeros(x: np.ndarray) -> None:
    x[:] = -0.0


def largest_magnitudes(x: np.ndarray) -> None:
    np.copyto(x, np.where(x < 0, F32(-1.5 * 2.0**126), F32(1.7 * 2.0**126)))


@pytest.mark.parametrize("schemes", SCHEMES)
@pytest.mark.parametrize(
    "change",
    [constant_channel, zero_channels, negative, outlier_channel, all_zero, negative_zeros, largest_magnitudes],
)
def test_unusual_values(change: object, schemes: tuple[str, str, int, int], isa: str) -> None:
    assert callable(change)
    for bits in BITS:
        case = Case(spec_of((40, 33, 50, 16), schemes, bits, bits))
        change(case.keys)
        change(case.values)
        case.check()


@pytest.mark.parametrize("schemes", SCHEMES)
@pytest.mark.parametrize("seen", [0, 1, 2])
def test_few_valid_tokens(seen: int, schemes: tuple[str, str, int, int], isa: str) -> None:
    for bits in BITS:
        case = Case(spec_of((40, 33, 50, 16), schemes, bits, bits))
        case.valid[:] = False
        case.valid[:, 20 : 20 + seen] = True
        pages = case.check()
        keys, values = kv_page.decode(case.spec, pages)
        assert np.isfinite(keys).all()
        assert np.isfinite(values).all()


def test_invalid_tokens_do_not_touch_the_bytes(isa: str) -> None:
    case = Case(PageSpec(40, 33, 50, (4, 2), (8, 16), 16))
    pages = case.encode()
    case.keys[~case.valid] = np.nan
    case.values[~case.valid] = np.inf
    np.testing.assert_array_equal(case.encode(), pages)


def test_class_0_holds_the_most_important_valid_tokens() -> None:
    spec = PageSpec(16, 16, 40, (16, 2), (16, 2), 16)
    case = Case(spec)
    for page, valid, importance in zip(case.encode(), case.valid, case.importance, strict=True):
        marks = np.unpackbits(page[:5], bitorder="little").astype(bool)
        first, rest = np.flatnonzero(marks), np.flatnonzero(~marks)
        assert (len(first), len(rest)) == (16, 24)
        assert valid[first].all()
        others = rest[valid[rest]]
        assert importance[first].min() >= importance[others].max()
        tied = others[importance[others] == importance[first].min()]
        assert all(t > first[importance[first] == importance[first].min()].max() for t in tied)


def test_the_place_of_tokens_does_not_matter(isa: str) -> None:
    spec = PageSpec(64, 64, 128, (4, 4), (4, 4))
    case = Case(spec)
    case.valid[:] = True
    before = kv_page.linear_attention(spec, case.encode(), np.eye(64, dtype=F32))
    shuffle = np.random.default_rng(4).permutation(128)
    case.keys, case.values = case.keys[:, shuffle], case.values[:, shuffle]
    after = kv_page.linear_attention(spec, case.encode(), np.eye(64, dtype=F32))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-3)


def half_steps(spec: PageSpec, page: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Half a scale of each element of keys [page, D] of one class, from the bytes of a page."""
    groups = oracle.group_slices(spec.page, spec.key_group)
    unit = page[:4].view(F32)[0]
    count = spec.head_size * len(groups)
    scale = page[4 : 4 + 2 * count].view(np.float16).astype(np.float64) * float(unit)
    widths = [s.stop - s.start for s in groups]
    return np.repeat(scale.reshape(spec.head_size, -1), widths, axis=1).T / 2


@settings(max_examples=60, deadline=None)
@given(
    keys=hnp.arrays(F32, (40, 3), elements=st.floats(-(2.0**60), 2.0**60, width=32)),
    bits=st.sampled_from((2, 4, 8)),
    group=st.sampled_from((0, 16, 32)),
)
@example(keys=np.eye(40, 3, dtype=F32) * F32(2.7e-44), bits=4, group=0)
def test_decoded_keys_are_within_half_a_scale(keys: np.ndarray, bits: int, group: int) -> None:
    spec = PageSpec(3, 1, 40, (bits, bits), (16, 16), key_group=group)
    pages = kv_page.encode(spec, keys[None], np.zeros((1, 40, 1), F32))
    decoded = kv_page.decode(spec, pages)[0][0]
    error = np.abs(decoded.astype(np.float64) - keys.astype(np.float64))
    half = half_steps(spec, pages[0], keys)
    rounding = np.finfo(F32).eps * (np.abs(keys).max() + 4 * 2**bits * half)
    # A step below the normal numbers is a multiple of the smallest one, off by up to half of it for each code.
    rounding += 2**bits * float(np.finfo(F32).smallest_subnormal)
    assert (error <= half + rounding).all()


def mean_square_error(spec: PageSpec, x: np.ndarray, keys: bool) -> float:
    """Error of x [256, 128] as keys or as values of one page."""
    other = np.zeros((1, 256, 1), F32)
    spec = replace(spec, value_size=1) if keys else replace(spec, head_size=1)
    pages = kv_page.encode(spec, x[None] if keys else other, other if keys else x[None])
    return float(((kv_page.decode(spec, pages)[0 if keys else 1][0] - x) ** 2).mean())


@pytest.mark.parametrize(
    ("bits", "expected"), [(4, (0.0256, 0.0484, 0.0585, 0.2422)), (2, (0.661, 1.181, 1.191, 5.982))]
)
def test_schemes_rank_as_in_zipcache(bits: int, expected: tuple[float, ...]) -> None:
    """Two channels with outliers: separable beats channel, groups of 32 and plain tokens."""
    x = np.random.default_rng(1).standard_normal((256, 128)).astype(F32)
    x[:, 5] *= 20
    x[:, 77] *= 10
    plain = PageSpec(128, 128, 256, (bits, bits), (bits, bits))
    errors = (
        mean_square_error(replace(plain, value_scheme="separable"), x, keys=False),
        mean_square_error(plain, x, keys=True),
        mean_square_error(replace(plain, value_group=32), x, keys=False),
        mean_square_error(plain, x, keys=False),
    )
    assert list(errors) == sorted(errors)
    np.testing.assert_allclose(errors, expected, rtol=0.02)


def test_balancing_keys_with_an_outlier_channel_improves_scores() -> None:
    rng = np.random.default_rng(5)
    keys = rng.standard_normal((1, 128, 64)).astype(F32)
    keys[..., 7] *= 50
    queries = rng.standard_normal((8, 64)).astype(F32)
    exact = queries.astype(np.float64) @ keys[0].T
    values = np.zeros((1, 128, 1), F32)
    errors = []
    for query_max in (np.abs(queries).max(0), np.abs(keys[0]).max(0)):  # the second balances nothing: b = 1
        spec = PageSpec(64, 1, 128, (2, 2), (16, 16), key_scheme="balanced")
        pages = kv_page.encode(spec, keys, values, query_max=query_max)
        errors.append(float(((kv_page.scores(spec, pages, queries) - exact) ** 2).mean()))
    assert errors[0] < errors[1]


def test_overhead_is_what_the_layout_says() -> None:
    assert kv_page.page_bytes(PageSpec(128, 128, 128, (4, 4), (4, 4))) == 2 * (128 * 128 // 2 + 528)
    assert kv_page.page_bytes(PageSpec(128, 128, 128, (16, 16), (16, 16))) == 2 * 2 * 128 * 128
    two = PageSpec(64, 64, 48, (8, 2), (8, 2), 16, "balanced", "separable")
    first = 64 * 16 + 80 + 16 * 64 + 80
    second = 64 * 16 + 144 + 32 * 16 + 144
    assert kv_page.page_bytes(two) == 16 + 128 + 128 + first + second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page": 0}, "page is 0 — give 1 to 256"),
        ({"page": 257}, "page is 257"),
        ({"head_size": 0}, "head_size is 0"),
        ({"value_size": 5000}, "value_size is 5000"),
        ({"key_bits": (3, 4)}, "key_bits has a class of 3 bits — give 2, 4, 8 or 16"),
        ({"value_bits": (4, 0)}, "value_bits has a class of 0 bits"),
        ({"salient": 8}, "salient is 8 — give a multiple of 16"),
        ({"salient": 80}, "salient is 80 — give 0 to 64"),
        ({"key_group": 20}, "key_group is 20 — give 0"),
        ({"value_group": -16}, "value_group is -16"),
        ({"key_group": 32, "key_scheme": "balanced"}, "balanced keys have one group"),
        ({"value_group": 32, "value_scheme": "separable"}, "separable values have one group"),
        ({"key_scheme": "row"}, "unknown scheme 'row'"),
    ],
)
def test_specs_that_no_page_has_are_refused(changes: dict[str, object], message: str) -> None:
    spec = replace(PageSpec(16, 16, 64), **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        kv_page.page_bytes(spec)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_tokens_that_are_not_finite_are_refused(bad: float, isa: str) -> None:
    case = Case(PageSpec(16, 16, 64, (8, 2), (8, 2), 16))
    case.valid[:] = True
    case.values[1, 5, 3] = bad
    case.keys[1, 9, 15] = bad
    with pytest.raises(ValueError, match="token 69 has a key or value that is not finite"):
        case.encode()


def test_arrays_that_do_not_fit_are_refused() -> None:
    spec = PageSpec(16, 16, 64, salient=16, key_scheme="balanced")
    keys = np.zeros((1, 64, 16), F32)
    with pytest.raises(ValueError, match="values has shape"):
        kv_page.encode(spec, keys, keys[:, :5])
    with pytest.raises(ValueError, match="needs the importance"):
        kv_page.encode(spec, keys, keys)
    with pytest.raises(ValueError, match="need query_max"):
        kv_page.encode(spec, keys, keys, importance=np.zeros((1, 64), F32))
    with pytest.raises(ValueError, match="pages has shape"):
        kv_page.decode(spec, np.zeros((2, 3), np.uint8))


def test_no_pages_give_empty_results() -> None:
    spec = PageSpec(16, 16, 64)
    pages = kv_page.encode(spec, np.zeros((0, 64, 16), F32), np.zeros((0, 64, 16), F32))
    assert pages.shape == (0, kv_page.page_bytes(spec))
    assert kv_page.scores(spec, pages, np.zeros((2, 16), F32)).shape == (2, 0)
    assert not kv_page.values(spec, pages, np.zeros((2, 0), F32)).any()


def test_every_instruction_set_encodes_the_same_bytes() -> None:
    before = kernels.isa()
    case = Case(PageSpec(200, 136, 96, (4, 2), (2, 8), 32, value_group=64))
    made = []
    for name in kernels.available_isas():
        kernels.select_isa(name)
        made.append(case.encode().tobytes())
    kernels.select_isa(before)
    assert len(set(made)) == 1
