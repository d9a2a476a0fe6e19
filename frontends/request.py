"""What the caller of `import_model` asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from effc.ir.program import Task


@dataclass(frozen=True)
class Request:
    """Options of one import.

    Attributes:
        name: What the user called the model.
        task: Task asked for, or None to find out.
        dtype: Dtype to store float weights in, or None to keep theirs.
        twin: Two layers of random weights instead of the checkpoint's.
        check: Compare the graph with the source.
        progress: Told what is being done.
    """

    name: str
    task: Task | None
    dtype: ir.DataType | None
    twin: bool
    check: bool
    progress: Callable[[str], None]
