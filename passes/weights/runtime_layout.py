"""The layout a Huffman-coded weight takes in memory, as the kernel library chooses it."""

from __future__ import annotations

import os


def runtime_layout(dtype: str) -> str:
    """The layout a weight is transcoded to at load: `rank4`, `raw` for fp16, or what EFFC_RUNTIME_LAYOUT names.

    Args:
        dtype: `bfloat16`, `float16` or `float32`.
    """
    return "raw" if dtype == "float16" else os.environ.get("EFFC_RUNTIME_LAYOUT") or "rank4"
