"""The DFloat11 decoder against an independent writer, bit for bit, and against damage."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from effc.errors import InputError
from effc.frontends.dfloat11_stream import Group, decode_group

_spec = importlib.util.spec_from_file_location("dfloat11_writer", Path(__file__).parent / "writer.py")
assert _spec is not None
assert _spec.loader is not None
writer = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(writer)


def _gaussian(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(0, 0.02, count).astype(ml_dtypes.bfloat16).view(np.uint16)


@pytest.mark.parametrize("count", [0, 1, 2, 63, 1000, 12287, 12700, 40001])
def test_round_trip(count: int) -> None:
    words = _gaussian(count)
    if count == 0:
        group = Group(*(np.zeros(0, np.uint8),) * 5)
    else:
        group = Group(**writer.write_group(words))
    np.testing.assert_array_equal(decode_group(group, "g"), words)


def test_long_codes_use_all_four_table_levels() -> None:
    doubling = {exponent: 1 << (exponent - 100) for exponent in range(100, 129)}
    words = (np.random.default_rng(0).integers(100, 129, 3000) << 7).astype(np.uint16)
    arrays = writer.write_group(words, doubling)
    assert arrays["luts"][-1].max() > 24
    np.testing.assert_array_equal(decode_group(Group(**arrays), "g"), words)


def test_one_exponent_signs_and_denormals() -> None:
    for words in (np.full(9000, 0x3F80, np.uint16), np.array([0x0000, 0x8000, 0x0001, 0x807F], np.uint16)):
        np.testing.assert_array_equal(decode_group(Group(**writer.write_group(words)), "g"), words)


@pytest.fixture(scope="module")
def good() -> Group:
    return Group(**writer.write_group(_gaussian(20000)))


def _changed(array: np.ndarray, index: int, value: int) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


def test_damage_is_refused(good: Group) -> None:
    damaged = {
        "gaps": replace(good, gaps=_changed(good.gaps, 100, good.gaps[100] ^ 0xFF)),
        "short gaps": replace(good, gaps=good.gaps[:10]),
        "positions": replace(good, output_positions=_changed(good.output_positions, 1, 7)),
        "falling": replace(good, output_positions=_changed(good.output_positions, 0, 5)),
        "short stream": replace(good, encoded_exponent=good.encoded_exponent[:-4096]),
        "pointer": replace(good, luts=_changed(good.luts.reshape(-1), 0, 241).reshape(good.luts.shape)),
        "tables": replace(good, luts=good.luts[:1]),
        "missing": replace(good, sign_mantissa=good.sign_mantissa[:-100]),
    }
    for group in damaged.values():
        with pytest.raises(InputError, match="DFloat11 group 'g'"):
            decode_group(group, "g")
