"""The JSON schemas of `docs/schemas`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "schemas"


def schema(name: str) -> dict[str, Any]:
    """The schema of one command's JSON object."""
    return json.loads((FOLDER / f"{name}.schema.json").read_text(encoding="utf-8"))
