"""Which cached tokens attention read, step by step."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from effc.kernels import load


@dataclass(frozen=True)
class TokenReads:
    """What one row and key head read in one step of one new token.

    Attributes:
        node: Name of the `CachedAttention`.
        row: Of the batch.
        head: Key head.
        tokens: Tokens the row has, the new one included.
        runs: int64 [n, 2]: begin and end of the runs that were read, tokens counted from the row's first.
    """

    node: str
    row: int
    head: int
    tokens: int
    runs: np.ndarray

    @property
    def read(self) -> int:
        """Tokens that were read."""
        return int((self.runs[:, 1] - self.runs[:, 0]).sum())


@contextmanager
def logged_reads() -> Iterator[list[TokenReads]]:
    """Log what every step of one token reads, in all sessions of the process, while the context is open.

    Yields:
        A list that is filled when the context is left, in the order of the steps.
    """
    library = load()
    library.effc_logged_reads.restype = ctypes.c_int64
    library.effc_logged_nodes.restype = ctypes.c_char_p
    found: list[TokenReads] = []
    library.effc_log_reads(1)
    try:
        yield found
    finally:
        library.effc_log_reads(0)
    found.extend(_collected(library))


def _collected(library: ctypes.CDLL) -> Iterator[TokenReads]:
    count = int(library.effc_logged_reads(None, ctypes.c_int64(0)))
    names = library.effc_logged_nodes()
    if count < 0 or names is None:
        raise MemoryError(library.effc_last_error().decode())
    numbers = np.empty(count, np.int64)
    library.effc_logged_reads(numbers.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(count))
    at = 0
    for node in names.decode().splitlines():
        row, head, tokens, runs = map(int, numbers[at : at + 4])
        at += 4
        yield TokenReads(node, row, head, tokens, numbers[at : at + 2 * runs].reshape(runs, 2))
        at += 2 * runs
