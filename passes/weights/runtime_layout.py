"""The layout a Huffman-coded weight takes in memory, as the kernel library chooses it."""

from __future__ import annotations

import os

from effc import kernels


def runtime_layout(dtype: str) -> str:
    """The layout on this machine: `rank3` where its kernel is the faster one, `rank4`, or `raw` for fp16.

    Args:
        dtype: `bfloat16`, `float16` or `float32`.
    """
    if dtype == "float16":
        return "raw"
    forced = os.environ.get("EFFC_RUNTIME_LAYOUT")
    if forced:
        return forced
    return "rank3" if dtype == "bfloat16" and kernels.isa() == "avx512" else "rank4"
