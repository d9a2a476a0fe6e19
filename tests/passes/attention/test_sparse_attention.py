"""The pass `sparse-attention`: options, choice of layers, the new cache of the graph, its body in standard ops."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from decoders import SIZE, changed, decoder, run_steps

from effc.errors import InputError, UsageError
from effc.ir.analysis.cached_attention import cached_attention_sites
from effc.ir.dialect.cached_attention import constant_values
from effc.ir.dialect.inline import inline_dialect
from effc.ir.dialect.selections import (
    AllTokens,
    EvictSelection,
    PageSelection,
    RetainSelection,
    StrideSelection,
    TopKSelection,
    WindowSelection,
)
from effc.ir.program import Program
from effc.ir.rewrite.constants import constant_tensor
from effc.passes.attention.cached_attention import CachedAttention
from effc.passes.attention.kv_cache import KvCache
from effc.passes.attention.sparse_attention import SparseAttention
from effc.passes.pipeline_text import format_pipeline, parse_pipeline
from effc.passes.tokens.prompt_filter import PromptFilter

STEPS = [90, 30, *[1] * 40, 17, *[1] * 20]


def sparse(**options: object) -> SparseAttention:
    return SparseAttention(**{"first": 0, "budget": 32, **options})  # type: ignore[arg-type]


def reasons(program: Program, options: SparseAttention) -> list[str]:
    return [item.reason for item in options.match(program).left]


@pytest.mark.parametrize(("reach", "name", "width"), [(0.0, "means", SIZE), (None, "bounds", 2 * SIZE)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_dense_cache_gets_means_or_bounds(reach: float | None, name: str, width: int, dtype: str) -> None:
    """In at most 16 bits."""
    stored = decoder(2) if dtype == "float32" else changed(decoder(2), KvCache("dense", dtype="float16"))
    result = changed(stored, sparse(reach=reach))
    names = [value.name for value in result.graph.inputs][4:]
    assert names == [f"past_key_values.{layer}.{part}" for layer in (0, 1) for part in ("key", "value", name)]
    past, present = result.cache_pairs()[2]
    assert (str(past.shape[2]), str(present.shape[2])) == ("past // 8", "total // 8")
    assert past.shape[3] == width
    assert past.dtype == (ir.DataType.BFLOAT16 if dtype == "float32" else ir.DataType.FLOAT16)
    (site, _) = cached_attention_sites(result.graph)
    assert site.selection == PageSelection(block=8, budget=32, reach=float(np.float32(0.6 if reach is None else reach)))


def test_single_tokens_need_nothing() -> None:
    """All keys are there: the cache stays as it is, and a balanced one will do."""
    dense = decoder()
    result = changed(dense, sparse(scheme="topk"))
    assert [v.name for v in result.graph.inputs] == [v.name for v in dense.graph.inputs]
    (site,) = cached_attention_sites(result.graph)
    assert site.selection == TopKSelection(budget=32)
    coded = changed(decoder(), KvCache("mikv"))
    (site,) = cached_attention_sites(changed(coded, sparse(scheme="topk")).graph)
    assert site.selection == TopKSelection(site.storage.sinks, site.storage.recent, 32)  # type: ignore[attr-defined]
    assert "other sinks" in reasons(coded, sparse(scheme="topk", recent=64))[0]


def test_a_choice_that_serves_again() -> None:
    """The op sees queries before they are rotated, and carries what it chose."""
    options = sparse(scheme="topk", refresh=8)
    assert options.requires() == (CachedAttention(rotary="inside"),)
    result = changed(decoder(rotary=True), options)
    names = [value.name for value in result.graph.inputs][-3:]
    assert names == [f"past_key_values.0.{name}" for name in ("chosen", "voter", "age")]
    (site,) = cached_attention_sites(result.graph)
    assert site.selection == TopKSelection(budget=32, refresh=8, similarity=float(np.float32(0.9)))
    assert "read by whole pages" in reasons(changed(decoder(), KvCache("int8")), options)[0]
    with pytest.raises(InputError, match="selection=topk has no body"):
        inline_dialect(result.model)


@pytest.mark.parametrize("scheme", ["int8", "int4", "kivi", "zipcache"])
def test_a_coded_cache_brings_its_blocks(scheme: str) -> None:
    coded = changed(decoder(), KvCache(scheme))  # type: ignore[arg-type]
    result = changed(coded, sparse())
    assert [v.name for v in result.graph.inputs] == [v.name for v in coded.graph.inputs]
    (site,) = cached_attention_sites(result.graph)
    storage = site.storage
    assert site.selection == PageSelection(  # type: ignore[attr-defined]
        storage.sinks, storage.recent, storage.page, 32, reach=float(np.float32(0.6))
    )


def test_what_is_left_alone() -> None:
    options = sparse(first=1, last=1)
    program = decoder(4, windows=(0, 150, 0, 0))
    match = options.match(program)
    assert [site.payload[0].node.name for site in match.sites] == ["layers.2.attention"]
    assert sorted(item.reason for item in match.left) == [
        "its window of 150 tokens bounds what it reads",
        "skipped by the options `first` and `last`",
        "skipped by the options `first` and `last`",
    ]
    assert reasons(decoder(bias=True), sparse()) == [
        "its mask is only known as numbers added to the scores, so what it hides cannot be told"
    ]
    assert "balanced" in reasons(changed(decoder(), KvCache("mikv")), sparse())[0]
    assert reasons(changed(decoder(), sparse()), sparse()) == ["it has selection=pages already"]
    assert "put kv-cache before" in KvCache("int8").match(changed(decoder(), sparse())).left[0].reason
    assert "other sinks" in reasons(changed(decoder(), KvCache("int8")), sparse(recent=64))[0]
    assert reasons(decoder(), sparse(skip=("attention*",))) == ["skipped by the option `skip`"]


def test_figures_of_the_report() -> None:
    program = decoder(3)
    options = SparseAttention(share=0.25)
    report = options.apply(program, options.match(program).sites)
    first, _, last = report.details["selection"]
    assert (first["selection"], first["reads"]) == ("all", {"2048": 2048, "8192": 8192, "32768": 32768})
    blocks = (8192 - 36) // 8
    assert last["reads"]["8192"] == 8192 - (blocks - -(-blocks // 4)) * 8
    assert (last["selection"], last["select_budget"], last["select_share"]) == ("pages", 0, 0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": -1}, "budget is -1"),
        ({"share": 0.0}, "share is 0.0"),
        ({"share": float("nan")}, "share is nan"),
        ({"block": 257}, "block is 257"),
        ({"dense_below": -1}, "dense-below is -1"),
        ({"reach": 1.5}, "reach is 1.5"),
        ({"positions": "cap"}, "scheme=pages has no positions"),
        ({"scheme": "topk", "block": 5}, "scheme=topk has no block"),
        ({"scheme": "topk", "refresh": -1}, "refresh is -1"),
        ({"scheme": "topk", "similarity": 1.5}, "similarity is 1.5"),
        ({"scheme": "window", "budget": 5}, "scheme=window has no budget"),
        ({"scheme": "window", "recent": 0}, "recent is 0"),
        ({"scheme": "window", "sinks": 0}, "sinks is 0"),
        ({"scheme": "window", "sinks": 129}, "sinks is 129"),
        ({"pool": 5}, "scheme=pages has no pool"),
        ({"scheme": "stride", "recent": 100}, "recent is 100, it must be a multiple of block, which is 64"),
        ({"scheme": "stride", "budget": 100}, "scheme=stride has no budget"),
        ({"scheme": "evict", "share": 0.5}, "scheme=evict has no share"),
        ({"scheme": "retain", "pool": 5}, "scheme=retain has no pool"),
        ({"scheme": "retain", "budget": 9, "recent": 5}, r"budget is 9, it must be from sinks \+ recent \+ block = 10"),
        ({"scheme": "evict", "budget": 35}, "budget is 35, it must be from sinks \\+ recent = 36"),
        ({"scheme": "evict", "recent": 0}, "recent is 0"),
        ({"scheme": "evict", "pool": 4}, "pool is 4, it must be odd"),
        ({"scheme": "evict", "pyramid": True, "budget": 111}, "at least recent \\+ 20 \\* sinks = 112"),
    ],
    ids=str,
)
def test_options_outside_their_ranges(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SparseAttention(**options)


@pytest.mark.parametrize(
    "one",
    [
        SparseAttention(budget=512, block=32, skip=("*0", "*1")),
        SparseAttention("window", recent=9, positions="cap"),
        SparseAttention("evict", budget=300, pool=7, pyramid=True),
        SparseAttention("retain", budget=300, recent=7, block=1),
        SparseAttention("stride", recent=128, stride=8, middle=True),
    ],
)
def test_pipeline_text(one: SparseAttention) -> None:
    assert parse_pipeline(format_pipeline([one])) == (one,)


SELECTIONS = [
    sparse(),
    sparse(share=0.3, budget=0, block=5),
    sparse(dense_below=150),
    sparse(sinks=0, recent=0),
    sparse(scheme="topk"),
    sparse(scheme="topk", share=0.3, budget=0, sinks=0, recent=0),
    sparse(scheme="topk", dense_below=150),
]


@pytest.mark.parametrize("options", SELECTIONS, ids=str)
@pytest.mark.parametrize("storage", [KvCache("dense", dtype="float32"), KvCache("dense")], ids=["float32", "bfloat16"])
def test_the_kernel_computes_what_the_body_says(options: SparseAttention, storage: KvCache) -> None:
    program = changed(decoder(), storage, options)
    body = program.clone()
    inline_dialect(body.model)
    found, expected = run_steps(program, STEPS), run_steps(body, STEPS)
    seen = np.ones(found.shape[:2], bool)
    seen[1, :7] = False
    np.testing.assert_allclose(found[seen], expected[seen], atol=1e-5)
    dense = run_steps(changed(decoder(), storage), STEPS)
    assert np.abs(found - dense)[seen].max() > 1e-3


@pytest.mark.parametrize("selection", ["pages", "topk"])
@pytest.mark.parametrize("scheme", ["dense", "int8", "int4", "kivi", "zipcache"])
def test_a_full_budget_changes_nothing(scheme: str, selection: str) -> None:
    stored = changed(decoder(), KvCache(scheme))  # type: ignore[arg-type]
    found = run_steps(changed(stored, sparse(scheme=selection, share=1.0)), STEPS)
    assert np.array_equal(found, run_steps(stored, STEPS))


WINDOW_STEPS = [3, 90, *[1] * 40, 70, *[1] * 5]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("positions", ["keep", "compact", "cap"])
def test_a_window_in_the_kernel_and_in_its_body(positions: str, dtype: str) -> None:
    options: dict[str, Any] = {"scheme": "window", "recent": 40, "positions": positions}
    program = changed(decoder(2, rotary=True), KvCache("dense", dtype=dtype), SparseAttention(**options))  # type: ignore[arg-type]
    (site, _) = cached_attention_sites(program.graph)
    assert (site.form.window, site.storage.ring) == (40, 40)  # type: ignore[attr-defined]
    assert site.selection == WindowSelection(4, positions)
    assert {str(value.shape[2]) for value, _ in program.cache_pairs()} == {"40", "4"}
    constants = constant_values(site.node)
    assert [list(value.shape) for value in constants] == ([] if positions == "keep" else [[1, 1, 16]] * 2)
    assert all(value.const_value is not None for value in constants)
    body = program.clone()
    inline_dialect(body.model)
    found, expected = run_steps(program, WINDOW_STEPS), run_steps(body, WINDOW_STEPS)
    seen = np.ones(found.shape[:2], bool)
    seen[1, :7] = False
    np.testing.assert_allclose(found[seen], expected[seen], atol=1e-5)
    dense = run_steps(decoder(2, rotary=True), WINDOW_STEPS)
    np.testing.assert_allclose(found[:, :40], dense[:, :40], atol=0.02)
    assert np.abs(found - dense)[seen].max() > 0.05


def test_a_window_longer_than_the_text_is_dense() -> None:
    program = decoder(rotary=True)
    found = run_steps(changed(program, SparseAttention("window", recent=400)), WINDOW_STEPS)
    np.testing.assert_allclose(found, run_steps(program, WINDOW_STEPS), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_that_evicts(dtype: str) -> None:
    options = SparseAttention("evict", budget=40, recent=8, block=8)
    stored = changed(decoder(2, rotary=True), KvCache("dense", dtype=dtype))  # type: ignore[arg-type]
    program = changed(stored, options)
    (site, _) = cached_attention_sites(program.graph)
    assert site.selection == EvictSelection(40, sinks=4, recent=8, block=8, pool=15)
    shapes = {str(past.name): (past.dtype, [str(axis) for axis in past.shape]) for past, _ in program.cache_pairs()}
    tokens = site.storage.dtype  # type: ignore[attr-defined]
    assert {name: shapes[name] for name in shapes if ".0." in name} == {
        "past_key_values.0.key": (tokens, ["batch", "2", "48", "32"]),
        "past_key_values.0.value": (tokens, ["batch", "2", "48", "32"]),
        "past_key_values.0.token": (ir.DataType.INT32, ["batch", "2", "48"]),
        "past_key_values.0.query": (ir.DataType.FLOAT, ["batch", "2", "8", "64"]),
    }
    found, dense = run_steps(program, WINDOW_STEPS), run_steps(stored, WINDOW_STEPS)
    np.testing.assert_allclose(found[:, :93], dense[:, :93], atol=1e-6)
    assert np.abs(found - dense)[:, 93:].max() > 0.05
    roomy = changed(stored, SparseAttention("evict", budget=300))
    assert np.array_equal(run_steps(roomy, WINDOW_STEPS), dense)
    with pytest.raises(InputError, match="selection=evict has no body"):
        inline_dialect(program.model)


def test_a_pyramid_of_budgets() -> None:
    """The layers that PyramidKV has with 32 layers, 2048 tokens and a window of 32."""
    program = decoder(32)
    options = SparseAttention("evict", pyramid=True)
    report = options.apply(program, options.match(program).sites)
    budgets = [layer["select_budget"] for layer in report.details["selection"]]
    assert (budgets[0], budgets[-1]) == (3932 + 32, 119 + 32)
    assert {a - b for a, b in pairwise(budgets)} == {123}
    reads = report.details["selection"][31]["reads"]
    assert reads == dict.fromkeys(("2048", "8192", "32768"), 151 + 9)
    (single,) = cached_attention_sites(changed(decoder(), options).graph)
    assert single.selection == EvictSelection()


def test_caches_that_cannot_evict() -> None:
    evict = SparseAttention("evict")
    assert "which keeps every token" in reasons(changed(decoder(), KvCache("int8")), evict)[0]
    assert reasons(decoder(windows=(150,)), evict) == ["its window of 150 tokens bounds what it reads"]
    assert "numbers added to the scores" in reasons(decoder(bias=True), evict)[0]
    assert reasons(changed(decoder(), evict), evict) == ["it has selection=evict already"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"sinks": 0, "block": 1, "recent": 5}, {"stride": 2, "sinks": 40}], ids=str)
def test_a_pattern_in_the_kernel_and_in_its_body(options: dict[str, Any], dtype: str) -> None:
    stride = SparseAttention("stride", **{"block": 8, "recent": 24, "stride": 3, **options})
    stored = changed(decoder(2, rotary=True), KvCache("dense", dtype=dtype))  # type: ignore[arg-type]
    program = changed(stored, stride)
    assert [v.name for v in program.graph.inputs] == [v.name for v in stored.graph.inputs]
    body = program.clone()
    inline_dialect(body.model)
    found, expected = run_steps(program, WINDOW_STEPS), run_steps(body, WINDOW_STEPS)
    seen = np.ones(found.shape[:2], bool)
    seen[1, :7] = False
    np.testing.assert_allclose(found[seen], expected[seen], atol=1e-5)
    assert np.abs(found - run_steps(stored, WINDOW_STEPS))[seen].max() > 0.05


def test_the_middle_third_reads_everything() -> None:
    for layers, chosen in ((1, [0]), (2, [0, 1]), (3, [0, 2]), (7, [0, 1, 5, 6])):
        match = SparseAttention("stride").match(decoder(layers))
        assert [site.payload[0].node.name for site in match.sites] == [f"layers.{i}.attention" for i in chosen]
        assert {item.reason for item in match.left} <= {
            "it is in the middle third of the layers, which read everything"
        }
    assert len(SparseAttention("stride", middle=True).match(decoder(7)).sites) == 7


def test_reads_of_a_pattern() -> None:
    selection = StrideSelection(sinks=4, recent=512, block=64, stride=16)
    assert [selection.read_at(tokens) for tokens in (0, 100, 512, 513, 576)] == [0, 100, 512, 513, 512]
    assert selection.read_at(32768) == 32 * 64 + 7 * 64


def test_windows_that_there_cannot_be() -> None:
    window = SparseAttention("window")
    assert "put cached-attention{rotary=inside} before" in reasons(decoder(), window)[0]
    assert "which keeps every token" in reasons(changed(decoder(rotary=True), KvCache("int8")), window)[0]
    assert reasons(decoder(windows=(150,), rotary=True), window) == ["its window of 150 tokens bounds what it reads"]
    assert reasons(decoder(), SparseAttention("window", positions="keep")) == []
    program = decoder(rotary=True)
    program.graph.inputs[4].name = "places"
    assert "does not come from the input position_ids" in reasons(program, window)[0]
    (inside,) = window.requires()
    assert inside == CachedAttention(rotary="inside")


def test_coded_pages_that_are_selected_have_no_body() -> None:
    program = changed(decoder(), KvCache("int8"), sparse())
    with pytest.raises(InputError, match="storage=pages has no body"):
        inline_dialect(program.model)


def test_selections_of_the_op() -> None:
    assert AllTokens().read_at(77) == 77
    selection = PageSelection(sinks=4, recent=32, block=16, budget=64)
    assert [selection.read_at(tokens) for tokens in (0, 35, 100, 131, 132)] == [0, 35, 100, 115, 100]
    single = TopKSelection(sinks=4, recent=32, budget=64)
    assert [single.read_at(tokens) for tokens in (0, 35, 100, 101, 200)] == [0, 35, 100, 100, 100]


RETAIN_STEPS = [30, 20, *[1] * 40, 17, *[1] * 20]


def retained(program: Program, **options: object) -> Program:
    return changed(program, SparseAttention("retain", **{"budget": 48, "recent": 8, **options}))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_cache_that_retains(dtype: str) -> None:
    """One score input for all layers, constants for all places, no angles of the tokens' own positions."""
    program = decoder(2, rotary=True)
    stored = changed(program, KvCache("dense", dtype=dtype)) if dtype != "float32" else program  # type: ignore[arg-type]
    result = retained(stored)
    sites = cached_attention_sites(result.graph)
    assert [site.selection for site in sites] == [RetainSelection(48, 4, 8, 1)] * 2
    assert [value.name for value in result.graph.inputs].count("token_scores") == 1
    names = [value.name for value in sites[0].past]
    assert names == [f"past_key_values.0.{name}" for name in ("key", "value", "token")]
    assert all(table is None for table in sites[0].node.inputs[5:7])
    cos, sin, scores = constant_values(sites[0].node)
    assert scores.name == "token_scores"
    assert constant_values(sites[1].node)[:2] == [cos, sin]
    tables = [constant_tensor(table) for table in (cos, sin)]
    assert [table.shape for table in tables if table is not None] == [(1, 48, 16)] * 2
    angles = np.arange(48)[:, None] / 40.0 ** np.linspace(0, 1, 16)
    for table, function in zip(tables, (np.cos, np.sin), strict=True):
        assert table is not None
        np.testing.assert_allclose(table.numpy()[0], function(angles), atol=1e-5)
    assert run_steps(result, RETAIN_STEPS).shape[1] == sum(RETAIN_STEPS)
    roomy = run_steps(retained(stored, budget=300), RETAIN_STEPS)
    np.testing.assert_allclose(roomy, run_steps(stored, RETAIN_STEPS), atol=1e-5 if dtype == "float32" else 2e-2)
    with pytest.raises(InputError, match="selection=retain has no body"):
        inline_dialect(result.clone())


def test_all_layers_retain_or_none() -> None:
    retain = SparseAttention("retain")
    assert "put cached-attention{rotary=inside} before" in reasons(decoder(), retain)[0]
    (inside,) = retain.requires()
    assert isinstance(inside, CachedAttention)
    assert inside.rotary == "inside"
    assert "numbers added to the scores" in reasons(decoder(bias=True, rotary=True), retain)[0]
    assert "which keeps every token" in reasons(changed(decoder(rotary=True), KvCache("int8")), retain)[0]
    filtered = changed(decoder(rotary=True), PromptFilter())
    assert "which is told no scores of tokens" in reasons(filtered, retain)[0]
    left = PromptFilter().match(retained(decoder(rotary=True))).left
    assert left[0].reason == "its cache has selection=retain, which knows places and no positions"
    windows = decoder(3, windows=(150, 0, 0), rotary=True)
    assert reasons(windows, retain) == ["its window of 150 tokens bounds what it reads"]
    assert len(retain.match(windows).sites) == 2
    match = SparseAttention("retain", last=1).match(windows)
    assert not match.sites
    assert [item.site for item in match.left] == ["attention layers.0", "attention layers.2", "attention layers.1"]
    assert match.left[2].reason == (
        "attention layers.2 cannot have it (skipped by the options `first` and `last`), and the layers must share one "
        "place for every token"
    )
