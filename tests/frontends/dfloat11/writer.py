"""An independent writer of the DFloat11 container, straight from its description: plain loops, no shared code."""

from __future__ import annotations

import heapq
from collections import Counter

import numpy as np

END = 256


def code_lengths(counts: dict[int, int]) -> dict[int, int]:
    """Huffman code lengths; rare counts are flattened while a code is longer than 32 bits."""
    flat = 1
    while True:
        heap = [(count, index, (symbol,)) for index, (symbol, count) in enumerate(sorted(counts.items()))]
        heapq.heapify(heap)
        lengths = dict.fromkeys(counts, 0)
        serial = len(heap)
        while len(heap) > 1:
            first, second = heapq.heappop(heap), heapq.heappop(heap)
            for symbol in first[2] + second[2]:
                lengths[symbol] += 1
            heapq.heappush(heap, (first[0] + second[0], serial, first[2] + second[2]))
            serial += 1
        if max(lengths.values()) <= 32:
            return lengths
        flat += 1
        for symbol in sorted(counts, key=lambda s: counts[s])[:flat]:
            counts = {**counts, symbol: 1}


def canonical_codes(lengths: dict[int, int]) -> dict[int, str]:
    """Codes as bit strings, shorter first, then by symbol."""
    codes, code, previous = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in lengths.items()):
        code <<= length - previous
        codes[symbol] = format(code, f"0{length}b")
        code, previous = code + 1, length
    return codes


def tables(codes: dict[int, str]) -> np.ndarray:
    """Decode tables addressed by 8-bit prefixes, then the row of lengths."""
    prefixes = sorted({code[: 8 * ((len(code) - 1) // 8)] for code in codes.values()}, key=lambda p: (len(p), p))
    rows = np.zeros((len(prefixes) + 1, 256), np.uint8)
    for row, prefix in enumerate(prefixes):
        last = 0
        for byte in range(256):
            bits = format(byte, "08b")
            entry = None
            for symbol, code in codes.items():
                rest = code[len(prefix) :]
                if code.startswith(prefix) and 0 < len(rest) <= 8 and bits.startswith(rest):
                    entry = symbol if symbol != END else last
            if entry is None and prefix + bits in prefixes:
                entry = 256 - prefixes.index(prefix + bits)
            last = last if entry is None else entry
            rows[row, byte] = last
    for symbol, code in codes.items():
        if symbol != END:
            rows[-1, symbol] = len(code)
    return rows


def write_group(words: np.ndarray, counts: dict[int, int] | None = None) -> dict[str, np.ndarray]:
    """The arrays of one group of bf16 words (u16, flat); `counts` overrides the statistics of the codebook."""
    exponents = ((words >> 7) & 0xFF).tolist()
    codes = canonical_codes(code_lengths({**(counts or Counter(exponents)), END: 1}))
    starts, text, position = [], [], 0
    for exponent in exponents:
        starts.append(position)
        text.append(codes[exponent])
        position += len(codes[exponent])
    bits = "".join(text)
    bits += codes[END][: -len(bits) % 8].ljust(-len(bits) % 8, "0")
    stream = np.array([int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)], np.uint8)
    blocks = -(-len(stream) // 4096)
    gaps: dict[int, int] = {}
    for start in starts:
        gaps.setdefault(start // 64, start % 64)
    packed = "".join(format(gaps.get(thread, 0), "05b") for thread in range(512 * blocks))
    return {
        "encoded_exponent": stream,
        "sign_mantissa": (((words >> 8) & 0x80) | (words & 0x7F)).astype(np.uint8),
        "luts": tables(codes),
        "gaps": np.array([int(packed[at : at + 8], 2) for at in range(0, len(packed), 8)], np.uint8),
        "output_positions": np.array([*block_positions(starts, blocks), len(words)], np.uint32),
    }


def block_positions(starts: list[int], blocks: int) -> list[int]:
    """Index of the first code that starts in each block of 4096 bytes."""
    positions = np.searchsorted(np.array(starts), 32768 * np.arange(blocks))
    return positions.tolist()
