"""An independent decoder, written from docs/coded-weights.md with numpy alone."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from effc.kernels import codec

BF16 = np.dtype(ml_dtypes.bfloat16)


def bit_fields(row: np.ndarray, width: int, count: int) -> np.ndarray:
    """Unsigned fields of `width` bits of a byte string, least significant bit first."""
    flat = np.unpackbits(row, bitorder="little")[: width * count].reshape(count, width)
    return (flat << np.arange(width, dtype=np.uint8)).sum(axis=1).astype(np.uint8)


def huffman_exponents(lengths: np.ndarray, stream: np.ndarray, offsets: np.ndarray, count: int) -> np.ndarray:
    symbols = [e for e in range(256) if lengths[e]]
    if len(symbols) == 1:
        return np.full(count, symbols[0], np.uint8)
    codes: dict[tuple[int, int], int] = {}
    code = 0
    for length in range(1, 13):
        for symbol in symbols:
            if lengths[symbol] == length:
                codes[length, code] = symbol
                code += 1
        code <<= 1
    out: list[int] = []
    for chunk in range(len(offsets) - 1):
        wanted = min(16384, count - chunk * 16384)
        flat = iter(np.unpackbits(stream[offsets[chunk] : offsets[chunk + 1]], bitorder="little").tolist())
        for _ in range(wanted):
            value, length = 0, 0
            while (length, value) not in codes:
                value, length = value << 1 | next(flat), length + 1
            out.append(codes[length, value])
    return np.array(out, np.uint8)


def rank_exponents(tensors: dict[str, np.ndarray], layout: str, columns: int) -> np.ndarray:
    codes = tensors["codes"]
    rows = codes.shape[0]
    if layout == "rank4":
        tiles = codes.reshape(rows, -1, 64)
        code = np.concatenate([tiles & 15, tiles >> 4], axis=2).reshape(rows, -1)[:, :columns]
    else:
        code = np.stack([bit_fields(row, 3, columns) for row in codes])
    exponents = tensors["table"][code]
    escaped = code == (15 if layout == "rank4" else 0)
    exponents[escaped] = tensors["escapes"]
    assert np.array_equal(tensors["row_escapes"], np.concatenate([[0], np.cumsum(escaped.sum(axis=1))]))
    return exponents


def words_of(coded: codec.CodedWeight) -> np.ndarray:
    tensors = coded.named()
    rows, columns = coded.shape
    if coded.layout == "huffman":
        flat = huffman_exponents(tensors["code_lengths"], tensors["stream"], tensors["chunk_offsets"], rows * columns)
        exponents = flat.reshape(rows, columns)
    else:
        exponents = rank_exponents(tensors, coded.layout, columns)
    e, r = exponents.astype(np.uint32), tensors["sign_mantissa"].astype(np.uint32)
    if coded.dtype == "float16":
        low = np.stack([bit_fields(row, 3, columns) for row in tensors["low"]]).astype(np.uint32)
        return ((r & 0x80) << 8 | e << 10 | (r & 0x7F) << 3 | low).astype(np.uint16)
    upper = (r & 0x80) << 8 | e << 7 | (r & 0x7F)
    return upper.astype(np.uint16) if coded.dtype == "bfloat16" else upper << 16 | tensors["low"]


@pytest.mark.parametrize("shape", [(3, 200), (70, 300), (5, 128), (1, 1)])
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (BF16, "huffman"),
        (BF16, "rank4"),
        (BF16, "rank3"),
        (np.dtype(np.float32), "huffman"),
        (np.dtype(np.float32), "rank4"),
        (np.dtype(np.float32), "rank3"),
        (np.dtype(np.float16), "huffman"),
    ],
)
def test_documented_format(shape: tuple[int, int], dtype: np.dtype, layout: codec.Layout) -> None:
    rng = np.random.default_rng(shape[1])
    weight = (rng.standard_normal(shape) * 0.02).astype(dtype)
    weight[0, :] *= dtype.type(1e4)
    expected = weight.view(np.uint32 if dtype.itemsize == 4 else np.uint16)
    assert np.array_equal(words_of(codec.encode(weight, layout)), expected)
