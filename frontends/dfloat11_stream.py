"""Decoder of one DFloat11 group: Huffman-coded exponents beside raw signs and mantissas, to bf16 words.

Source: Zhang et al. 2025, "70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via
Dynamic-Length Float" (arXiv 2504.11651), section 3. A thread owns 64 bits of the stream and decodes every
code that starts there; `gaps` says where its first code starts. All threads are decoded side by side, one code a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from effc.errors import InputError

BITS_PER_THREAD = 64
THREADS_PER_BLOCK = 512
GAP_BITS = 5
POINTERS_FROM = 240
MAX_CODE_BITS = 32
LANES = 1 << 18
"""Threads decoded at once; bounds the memory of a step."""


@dataclass(frozen=True)
class Group:
    """The arrays of one group, as they lie in the checkpoint.

    Attributes:
        encoded_exponent: u8 [nB], bit stream, most significant bit first.
        sign_mantissa: u8 [n], sign in bit 7 and mantissa in bits 6..0.
        luts: u8 [nL, 256], decode tables, and the code length of each exponent in the last row.
        gaps: u8, 5 bits per thread, packed most significant bit first.
        output_positions: u32 [blocks + 1], index of the first element of each block.
    """

    encoded_exponent: np.ndarray
    sign_mantissa: np.ndarray
    luts: np.ndarray
    gaps: np.ndarray
    output_positions: np.ndarray


def decode_group(group: Group, where: str) -> np.ndarray:
    """The bf16 words of a group.

    Args:
        group: Its arrays.
        where: Name of the group, for errors.

    Returns:
        u16 [n].

    Raises:
        InputError: The arrays contradict each other; nothing is guessed.
    """
    count = group.sign_mantissa.size
    if count == 0:
        return np.zeros(0, np.uint16)
    starts = _thread_starts(group, where)
    exponents = np.empty(count, np.uint8)
    done, expected_start = 0, 0
    for first in range(0, starts.size, LANES):
        lanes = starts[first : first + LANES]
        if lanes[0] != expected_start and done < count:
            raise _damaged(
                where, f"thread {first} starts at bit {lanes[0]}, the thread before ends at {expected_start}"
            )
        symbols, counts, ends = _decode_lanes(group, lanes, first)
        done = _check_and_place(group, where, symbols, counts, ends, lanes, first, exponents, done)
        expected_start = int(ends[-1])
    if done != count:
        raise _damaged(where, f"the stream holds {done} codes for {count} weights")
    raw = group.sign_mantissa.astype(np.uint16)
    return ((raw & 0x80) << 8) | (exponents.astype(np.uint16) << 7) | (raw & 0x7F)


def _thread_starts(group: Group, where: str) -> np.ndarray:
    """Bit at which the first code of each thread starts, int64."""
    threads = -(-group.encoded_exponent.size // (BITS_PER_THREAD // 8))
    if group.luts.ndim != 2 or group.luts.shape[1] != 256 or not 2 <= group.luts.shape[0] <= 18:
        raise _damaged(where, f"luts has shape {list(group.luts.shape)}, expected [2 to 18, 256]")
    tables = group.luts[:-1]
    pointers = tables[tables >= POINTERS_FROM].astype(np.int64)
    if pointers.size and (256 - pointers).max() >= tables.shape[0]:
        raise _damaged(where, "a decode table points to a table that does not exist")
    if group.gaps.size * 8 < threads * GAP_BITS:
        raise _damaged(where, f"gaps has {group.gaps.size} bytes for {threads} threads")
    blocks = -(-threads // THREADS_PER_BLOCK)
    positions = group.output_positions.astype(np.int64)
    if positions.size not in (blocks, blocks + 1) or positions[0] != 0 or np.any(np.diff(positions) < 0):
        raise _damaged(where, "output_positions does not rise from 0 with one entry a block")
    if positions[-1] != group.sign_mantissa.size:
        raise _damaged(where, f"output_positions ends at {positions[-1]}, there are {group.sign_mantissa.size} weights")
    bits = np.unpackbits(group.gaps, count=threads * GAP_BITS).reshape(threads, GAP_BITS)
    gaps = bits @ (1 << np.arange(GAP_BITS - 1, -1, -1))
    return BITS_PER_THREAD * np.arange(threads, dtype=np.int64) + gaps


def _decode_lanes(group: Group, starts: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode every code that starts in each lane's 64 bits.

    Returns:
        Symbols u8 [lanes, 64], number of codes [lanes], and the bit after the last code [lanes].
    """
    origin = BITS_PER_THREAD * first
    stop = origin + BITS_PER_THREAD * (starts.size + 1)
    window = group.encoded_exponent[origin // 8 : stop // 8]
    stream = np.zeros((starts.size + 2) * BITS_PER_THREAD // 8, np.uint8)
    stream[: window.size] = window
    cursors = starts - origin
    limits = BITS_PER_THREAD * np.arange(1, starts.size + 1)
    symbols = np.zeros((starts.size, BITS_PER_THREAD), np.uint8)
    counts = np.zeros(starts.size, np.int64)
    for step in range(BITS_PER_THREAD):
        active = np.flatnonzero(cursors < limits)
        if not active.size:
            break
        symbol = _lookup(group.luts, _peek(stream, cursors[active]))
        symbols[active, step] = symbol
        counts[active] += 1
        cursors[active] += np.maximum(group.luts[-1][symbol], 1)
    return symbols, counts, cursors + origin


def _peek(stream: np.ndarray, cursors: np.ndarray) -> np.ndarray:
    """The 32 bits at each cursor, most significant bit first, u32."""
    byte = cursors >> 3
    word = np.zeros(cursors.size, np.uint64)
    for index in range(5):
        word = (word << np.uint64(8)) | stream[byte + index]
    return ((word >> (8 - (cursors & 7)).astype(np.uint64)) & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def _lookup(luts: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Follow the decode tables, eight bits a level."""
    row = np.zeros(bits.size, np.int64)
    entry = np.zeros(bits.size, np.uint8)
    for level in range(MAX_CODE_BITS // 8):
        follow = (level == 0) | (entry >= POINTERS_FROM)
        byte = (bits >> np.uint32(24 - 8 * level)) & np.uint32(255)
        row = np.where(follow, 0 if level == 0 else 256 - entry.astype(np.int64), row)
        entry = np.where(follow, luts[row, byte], entry)
    return entry


def _check_and_place(
    group: Group,
    where: str,
    symbols: np.ndarray,
    counts: np.ndarray,
    ends: np.ndarray,
    starts: np.ndarray,
    first: int,
    exponents: np.ndarray,
    done: int,
) -> int:
    """Put the codes of all lanes in order; codes past the last weight are padding."""
    total = done + int(counts.sum())
    offsets = done + np.concatenate([[0], np.cumsum(counts)])
    inside = offsets[1:-1] < exponents.size
    if np.any((ends[:-1] != starts[1:]) & inside):
        lane = first + int(np.flatnonzero((ends[:-1] != starts[1:]) & inside)[0])
        raise _damaged(where, f"thread {lane} does not end where the next one starts")
    for lane in range(-first % THREADS_PER_BLOCK, starts.size, THREADS_PER_BLOCK):
        block = (first + lane) // THREADS_PER_BLOCK
        if min(offsets[lane], exponents.size) != min(int(group.output_positions[block]), exponents.size):
            raise _damaged(where, f"block {block} starts with weight {offsets[lane]}, output_positions says otherwise")
    codes = symbols[np.arange(BITS_PER_THREAD) < counts[:, None]][: exponents.size - done]
    if np.any(codes >= POINTERS_FROM) or np.any(group.luts[-1][codes] == 0):
        raise _damaged(where, "a code leads to no exponent")
    exponents[done : done + codes.size] = codes
    return min(total, exponents.size)


def _damaged(where: str, what: str) -> InputError:
    return InputError(f"DFloat11 group {where!r}: {what}. The checkpoint is damaged: download it again.")
