"""A command line without a process, and stand-ins for the parts of the library behind it."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from effc.cli.main import run

SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schemas"


@dataclass(frozen=True)
class Result:
    """What a command line did."""

    code: int
    out: str
    err: str

    def json(self, schema: str) -> Any:
        """The one object on stdout, checked against its published schema."""
        content = json.loads(self.out)
        rules = json.loads((SCHEMAS / f"{schema}.json").read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator.check_schema(rules)
        jsonschema.validate(content, rules)
        return content


@pytest.fixture
def effc(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run `effc` with the given words."""

    def call(*words: object) -> Result:
        capfd.readouterr()
        code = run([str(word) for word in words])
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace a module by one that holds the given names."""

    def replace(module: str, **names: object) -> None:
        fake = types.ModuleType(module)
        vars(fake).update(names)
        monkeypatch.setitem(sys.modules, module, fake)

    return replace
