"""Scheme `lowrank` of `sparse-attention`: inputs that bring a prefix, angles of its positions, what is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from decoders import KV_HEADS, SIZE, changed, decoder, run_steps

from effc.errors import InputError, UsageError
from effc.ir.analysis.cached_attention import cached_attention_sites
from effc.ir.dialect.cached_attention import constant_values
from effc.ir.dialect.inline import inline_dialect
from effc.ir.dialect.selections import LowRankSelection
from effc.ir.program import Program
from effc.passes.attention.cached_attention import CachedAttention
from effc.passes.attention.kv_cache import KvCache
from effc.passes.attention.sparse_attention import SparseAttention
from effc.passes.pipeline import expand
from effc.passes.pipeline_text import format_pipeline, parse_pipeline

AXES = {
    "tokens": ["1", "prefix", "rank"],
    "basis": ["1", str(KV_HEADS), str(SIZE), "rank"],
    "values": ["1", str(KV_HEADS), "prefix", str(SIZE)],
    "landmarks": ["1", str(KV_HEADS), "chunks", str(SIZE)],
    "outliers": ["1", str(KV_HEADS), "outliers"],
    "outlier_keys": ["1", str(KV_HEADS), "outliers", "8", str(SIZE)],
}


def lowrank(**options: Any) -> SparseAttention:
    return SparseAttention("lowrank", **options)


def reasons(program: Program, options: SparseAttention) -> list[str]:
    return [item.reason for item in options.match(program).left]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inputs_and_angles(dtype: str) -> None:
    options = lowrank(longest=3000, first=1)
    result = changed(decoder(3, rotary=True), KvCache("dense", dtype=dtype), options)  # type: ignore[arg-type]
    first, *sites = cached_attention_sites(result.graph)
    assert first.selection.kind == "all"
    tables = constant_values(sites[0].node)[:2]
    angles = np.arange(3000)[:, None] / 40.0 ** np.linspace(0, 1, 16)
    for table, function in zip(tables, (np.cos, np.sin), strict=True):
        assert table.const_value is not None
        np.testing.assert_allclose(table.const_value.numpy()[0], function(angles), atol=1e-3)
    for layer, site in enumerate(sites, start=1):
        assert site.selection == LowRankSelection(budget=2048)
        assert [value.name for value in site.past] == [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        *of_layer, brought = constant_values(site.node)[:2], constant_values(site.node)[2:]
        assert of_layer == [tables]
        assert [value.name for value in brought] == [f"lowrank.{layer}.{name}" for name in AXES]
        for value, axes in zip(brought, AXES.values(), strict=True):
            assert value in result.graph.inputs
            assert [str(axis) for axis in value.shape or ()] == axes
            assert value.dtype == (ir.DataType.INT32 if value.name.endswith("outliers") else site.past[0].dtype)


def test_keys_that_do_not_rotate_have_no_angles() -> None:
    (site,) = cached_attention_sites(changed(decoder(), lowrank()).graph)
    assert len(constant_values(site.node)) == len(AXES)


def test_without_a_prefix_nothing_changes() -> None:
    """Sessions of a test have no inputs but those of the cache, so empty ones stand in their place."""
    program = decoder(rotary=True)
    result = changed(program, lowrank(longest=400))
    (site,) = cached_attention_sites(result.graph)
    for value in constant_values(site.node)[2:]:
        assert value.shape is not None
        empty = np.zeros([size if isinstance(size, int) else 0 for size in value.shape], value.dtype.numpy())
        constant = ir.Value(name=f"{value.name}.empty", const_value=ir.tensor(empty))
        result.graph.register_initializer(constant)
        value.replace_all_uses_with(constant)
        result.graph.inputs.remove(value)
    steps = [30, *[1] * 20, 7]
    np.testing.assert_array_equal(run_steps(result, steps), run_steps(program, steps))


def test_what_is_left_alone() -> None:
    assert reasons(decoder(windows=(150,), rotary=True), lowrank()) == ["its window of 150 tokens bounds what it reads"]
    assert (
        "the keys of a prefix of low rank lie before a dense one"
        in reasons(changed(decoder(rotary=True), KvCache("int8")), lowrank())[0]
    )
    assert "numbers added to the scores" in reasons(decoder(bias=True, rotary=True), lowrank())[0]
    program = decoder(rotary=True)
    program.graph.inputs[4].name = "places"
    assert "does not come from the input position_ids" in reasons(program, lowrank())[0]


def test_angles_that_depend_on_more_than_positions_are_refused() -> None:
    """Such as those that are scaled by the length of the text; a window can compute them in every step."""
    program = decoder(rotary=True)
    (site,) = cached_attention_sites(program.graph)
    table = site.node.inputs[5]
    assert table is not None and table.producer() is not None
    length = ir.Value(name="length", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    program.graph.inputs.append(length)
    scaled = ir.Node("", "Mul", [table, length])
    scaled.outputs[0].shape, scaled.outputs[0].type = table.shape, table.type
    program.graph.insert_before(site.node, scaled)
    site.node.replace_input_with(5, scaled.outputs[0])
    assert reasons(program, lowrank()) == [
        "its rotation depends on more than the input position_ids, so it is not known beforehand"
    ]
    assert reasons(program, SparseAttention("window")) == []


def test_there_is_no_body() -> None:
    with pytest.raises(InputError, match="selection=lowrank has no body"):
        inline_dialect(changed(decoder(rotary=True), lowrank()).model)


def test_rotation_moves_inside_although_another_pass_comes_first() -> None:
    """What the first pass requires is run as the second one wants it."""
    for scheme in ("lowrank", "window", "retain"):
        passes = expand((KvCache("dense"), SparseAttention(scheme)))  # type: ignore[arg-type]
        assert [one for one in passes if isinstance(one, CachedAttention)] == [CachedAttention(rotary="inside")]
    (plain,) = (one for one in expand((KvCache("dense"), SparseAttention())) if isinstance(one, CachedAttention))
    assert plain == CachedAttention()
    given = CachedAttention(ring="off")
    assert [one for one in expand((given, lowrank())) if isinstance(one, CachedAttention)] == [given]


def test_options() -> None:
    text = "sparse-attention{scheme=lowrank,share=0.25,block=4,longest=100}"
    (parsed,) = parse_pipeline(text)
    assert format_pipeline([parsed]) == "sparse-attention{scheme=lowrank,share=0.25,block=4,longest=100}"
    with pytest.raises(UsageError, match="block is 200, it must be from 1 to 128"):
        lowrank(block=200)
    with pytest.raises(UsageError, match="scheme=lowrank has no sinks"):
        lowrank(sinks=3)
    with pytest.raises(UsageError, match="longest is 0"):
        lowrank(longest=0)


def test_reads() -> None:
    selection = LowRankSelection(block=8, budget=64)
    assert [selection.read_at(tokens) for tokens in (0, 63, 64, 71, 72, 1000)] == [0, 63, 64, 71, 64, 64]
    assert LowRankSelection(block=8, share=0.25).read_at(803) == 203
