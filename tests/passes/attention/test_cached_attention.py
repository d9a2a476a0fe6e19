"""The pass `cached-attention`: graphs before and after as text, and numbers step by step through both.

A golden holds the graph as ONNX text, a line `=====`, and the raised graph with what was left.
EFFC_UPDATE_GOLDENS=1 rewrites the second half.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graph_programs import canonical, program, random_feeds, run, tolerance

from effc.ir.dialect.inline import inline_dialect
from effc.ir.program import Program, Task
from effc.ir.text import program_text
from effc.passes.attention.cached_attention import CachedAttention

FOLDER = Path(__file__).parents[2] / "golden" / "cached_attention"
GOLDENS = sorted(FOLDER.glob("*.txt"))
SEPARATOR = "=====\n"
CACHE = {"past": "past_key_values", "present": "present"}
STEPS = ((1,), (5, 1, 1), (9, 4, 1), (1,) * 12, (2, 17, 3))


def source(path: Path) -> Program:
    """The first half; ONNX text has no dots in names, so the cache gets its own here. In canonical form."""
    one = program(path.read_text().partition(SEPARATOR)[0], Task.CAUSAL_LM)
    for value in (*one.graph.inputs, *one.graph.outputs):
        first, _, kind = str(value.name).partition("_")
        if first in ("past", "present"):
            value.name = f"{CACHE[first]}.0.{kind}"
    return canonical(one)


def raised(one: Program, options: CachedAttention) -> Program:
    result = one.clone()
    options.apply(result, options.match(result).sites)
    return result


def options_for(path: Path) -> CachedAttention:
    return CachedAttention(rotary="inside" if path.stem == "rotated" else "outside")


def described(path: Path) -> str:
    one, options = source(path), options_for(path)
    left = [f"left {item.site}: {item.reason}" for item in options.match(one).left]
    return "".join([program_text(raised(one, options)), *(line + "\n" for line in left)])


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_raised_form(path: Path) -> None:
    before, _, expected = path.read_text().partition(SEPARATOR)
    if os.environ.get("EFFC_UPDATE_GOLDENS"):
        path.write_text(before + SEPARATOR + described(path))
    else:
        assert described(path) == expected


def outputs(one: Program, feeds: Mapping[str, np.ndarray], past: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(zip([value.name for value in one.graph.outputs], run(one, {**feeds, **past}), strict=True))


def step_through(before: Program, after: Program, steps: Sequence[int], padding: int) -> None:
    """Run both on the same tokens, each on its own cache."""
    runnable = after.clone()
    inline_dialect(runnable.model)
    pairs = [(str(past.name), str(present.name)) for past, present in before.cache_pairs()]
    pasts = [empty(before), empty(runnable)]
    done = 0
    for count in steps:
        feeds = random_feeds(before, {"batch": 2, "seq": count, "past": done}, seed=done, padding=padding)
        feeds = {name: array for name, array in feeds.items() if not name.startswith("past")}
        expected, found = (outputs(one, feeds, past) for one, past in zip((before, runnable), pasts, strict=True))
        pasts = [{past: result[present] for past, present in pairs} for result in (expected, found)]
        seen = feeds["attention_mask"][:, done:].astype(bool)
        for name in expected.keys() - {present for _, present in pairs}:
            limit = tolerance(np.dtype(np.float32), float(np.abs(expected[name]).max(initial=0.0)))
            difference = np.abs(expected[name] - found[name])
            if difference.ndim > 1:
                by_token = difference if difference.shape[:2] == seen.shape else difference.swapaxes(1, 2)
                difference = by_token[seen]
            assert difference.max(initial=0.0) <= limit
        done += count


def empty(one: Program) -> dict[str, np.ndarray]:
    """Caches without tokens; a ring holds what must not be read."""
    sizes = {"batch": 2, "past": 0}
    shapes = {
        str(past.name): [size if isinstance(size, int) else sizes[str(size)] for size in past.shape]
        for past, _ in one.cache_pairs()
    }
    return {name: np.full(shape, 9, np.float32) for name, shape in shapes.items()}


RAISED = [path for path in GOLDENS if not path.stem.startswith("left")]


@pytest.mark.parametrize("options", [{}, {"ring": "off"}, {"rotary": "inside"}], ids=str)
@pytest.mark.parametrize("path", RAISED, ids=lambda path: path.stem)
def test_same_numbers(path: Path, options: dict[str, str]) -> None:
    one = source(path)
    result = raised(one, CachedAttention(**options))  # type: ignore[arg-type]
    assert any(node.op_type == "CachedAttention" for node in result.graph)
    padding = 3 if "padding" in path.stem or path.stem == "heads_first" else 0
    for steps in STEPS:
        step_through(one, result, steps, padding)


def test_a_ring_is_an_option() -> None:
    one = source(FOLDER / "window_and_padding.txt")
    for options, size in ((CachedAttention(), 5), (CachedAttention(ring="off"), "past")):
        result = raised(one, options)
        assert [past.shape[2] for past, _ in result.cache_pairs()] == [size, size]


def test_sizes_of_the_cache_are_taken_from_the_tokens() -> None:
    """A buffer that is longer than its tokens must not be asked for its length."""
    one = source(FOLDER / "causal_and_padding.txt")
    keys = one.graph.inputs[5]
    count = ir.node("Shape", [keys], {"start": 2, "end": 3}, name="count")
    one.graph.insert_before(one.graph[0], count)
    one.graph.outputs.append(count.outputs[0])
    count.outputs[0].name, count.outputs[0].dtype, count.outputs[0].shape = "count", ir.DataType.INT64, ir.Shape([1])
    result = raised(one, CachedAttention())
    assert {use.node.op_type for past, _ in result.cache_pairs() for use in past.uses()} == {"CachedAttention"}
    step_through(one, result, (3, 1), 1)


def test_report_counts_the_bytes() -> None:
    one, options = source(FOLDER / "window_and_padding.txt"), CachedAttention()
    report = options.apply(one, options.match(one).sites)
    (figures,) = report.details["cache"]
    assert figures["bytes"] == 2 * 2 * 5 * 8 * 4
    assert figures["dense_bytes"] == 2 * 2 * 8192 * 8 * 2
    assert (figures["storage"], figures["bits"], figures["bits_with_parameters"]) == ("dense", 32.0, 32.0)


def test_twice_is_once() -> None:
    options = CachedAttention()
    once = raised(source(FOLDER / "window_and_padding.txt"), options)
    assert not options.match(once).sites
    assert program_text(raised(once, options)) == program_text(once)
