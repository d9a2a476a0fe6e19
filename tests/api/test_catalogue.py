"""What passes say about themselves is read from their class, fields and docstring."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest

from effc import catalogue
from effc.passes import registry
from effc.passes.base import Contract, Match, Pass, PassReport


@dataclass(frozen=True)
class Sample(Pass):
    """First line.

    Options:
        rate: How much, over
            two lines.
        kind (word): Which one.
        names: Several.

    Source: nowhere: not an option.
    """

    name: ClassVar[str] = "sample"
    contract: ClassVar[Contract] = Contract.EXACT
    rate: float = field(default=0.5, metadata={"range": (0, 1)})
    kind: Literal["a", "b"] | None = None
    names: tuple[str, ...] = ("x", "y")
    flag: bool = True
    count: int = 3

    def match(self, program):
        return Match()

    def apply(self, program, sites):
        return PassReport()


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(registry.BUILTIN, "sample", "tests.sample:Sample")
    monkeypatch.setitem(registry.BUILTIN, "broken", "effc.no_such_module:Broken")
    monkeypatch.setattr(catalogue, "pass_class", lambda name: Sample if name == "sample" else registry.pass_class(name))


def test_options_have_type_default_range_and_meaning() -> None:
    page = catalogue.describe_pass("sample")
    assert (page["name"], page["contract"]) == ("sample", "exact")
    rows = [tuple(option.values()) for option in page["options"]]
    assert rows == [
        ("rate", "number", "0.5", "0 to 1", "How much, over two lines."),
        ("kind", "word or none", "none", "a, b", "Which one."),
        ("names", "text, several joined by |", "x|y", None, "Several."),
        ("flag", "true or false", "true", None, ""),
        ("count", "whole number", "3", None, ""),
    ]


def test_a_pass_that_cannot_be_imported_is_listed_with_the_reason() -> None:
    rows = {row["name"]: row for row in catalogue.list_passes()}
    assert rows["sample"] == {"name": "sample", "contract": "exact", "summary": "First line."}
    assert rows["broken"]["contract"] is None
    assert "effc.no_such_module" in rows["broken"]["summary"]
