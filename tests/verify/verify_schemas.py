"""The JSON schemas of `docs/schemas`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "schemas"


def schema(name: str) -> dict[str, Any]:
    """The schema of one command's JSON object."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


VERDICT = {"contract", "allowed", "holds", "reason"}
"""Keys that `effc.verification` adds to what is measured."""


def measured_schema() -> dict[str, Any]:
    """The schema of `verify` without its verdict; every key must be described."""
    content = schema("verify")
    required = [name for name in content["required"] if name not in VERDICT]
    return {**content, "required": required, "additionalProperties": False}
