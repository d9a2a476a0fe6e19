"""effc: a compiler for deploying efficient transformer models.

Public names are imported on first use, so `import effc` costs next to nothing and never loads torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from effc import errors
from effc.errors import EffcError

__version__ = "0.1.0"

_HOMES = {
    "Program": "effc.ir.program",
    "import_model": "effc.frontends",
    "load": "effc.runtime.session",
    "optimize": "effc.compiler",
    "parse_pipeline": "effc.passes.pipeline_text",
}

__all__ = ["EffcError", "Program", "__version__", "errors", "import_model", "load", "optimize", "parse_pipeline"]

if TYPE_CHECKING:
    from effc.compiler import optimize
    from effc.frontends import import_model
    from effc.ir.program import Program
    from effc.passes.pipeline_text import parse_pipeline
    from effc.runtime.session import load


def __getattr__(name: str) -> object:
    """Import a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'effc' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return sorted(__all__)
