"""Every spelling in tests/golden/canonicalize: the graph it becomes, and that it computes the same.

A golden holds the graph as ONNX text, a line `=====`, and the canonical graph with what was left. Set
EFFC_UPDATE_GOLDENS=1 to rewrite the second half, then read the difference.
"""

import os
from pathlib import Path

import pytest
from graph_programs import SIZES, assert_same_outputs, canonical, program

from effc.ir.program import Task
from effc.ir.text import program_text
from effc.passes.canonicalize import Canonicalize

FOLDER = Path(__file__).parents[2] / "golden" / "canonicalize"
GOLDENS = sorted(FOLDER.glob("*.txt"))
SEPARATOR = "=====\n"


def _source(path: Path):
    text = path.read_text().partition(SEPARATOR)[0]
    return program(text, Task.CAUSAL_LM if "past" in text else Task.GENERIC)


def _described(path: Path) -> str:
    source = _source(path)
    left = [f"left {item.site}: {item.reason}" for item in Canonicalize().match(source).left]
    return "".join([program_text(canonical(source)), *(line + "\n" for line in left)])


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_canonical_form(path: Path) -> None:
    before, _, expected = path.read_text().partition(SEPARATOR)
    described = _described(path)
    if os.environ.get("EFFC_UPDATE_GOLDENS"):
        path.write_text(before + SEPARATOR + described)
    else:
        assert described == expected


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_same_outputs(path: Path) -> None:
    source = _source(path)
    result = canonical(source)
    for sizes in SIZES:
        assert_same_outputs(source, result, sizes)
    assert_same_outputs(source, result, {"batch": 2, "seq": 6, "past": 0}, padding=2, seed=1)


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_twice_is_once(path: Path) -> None:
    once = canonical(_source(path))
    assert program_text(canonical(once)) == program_text(once)


def test_all_kinds_have_spellings() -> None:
    spellings = [path.stem.split("_")[0] for path in GOLDENS]
    assert spellings.count("attention") >= 6
    assert {"attention", "rms", "layer", "gelu", "rotary", "left"} == set(spellings)
