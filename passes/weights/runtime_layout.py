"""The layout a Huffman-coded weight takes in memory, as the kernel library chooses it."""

from __future__ import annotations

import os

from effc.errors import UsageError

LAYOUTS = ("rank4", "rank3", "raw")
VARIABLE = "EFFC_RUNTIME_LAYOUT"


def runtime_layout(dtype: str) -> str:
    """The layout a weight is transcoded to at load: `rank4`, `raw` for fp16, or what EFFC_RUNTIME_LAYOUT names.

    Args:
        dtype: `bfloat16`, `float16` or `float32`.

    Raises:
        UsageError: EFFC_RUNTIME_LAYOUT names no such layout.
    """
    chosen = os.environ.get(VARIABLE) or LAYOUTS[0]
    if chosen not in LAYOUTS:
        raise UsageError(f"{VARIABLE} is {chosen!r}. Set it to one of {', '.join(LAYOUTS)}, or leave it unset.")
    return "raw" if dtype == "float16" else chosen
