"""Scheme `clusters` of `sparse-attention`: the inputs that bring clusters, the cache of queries, what is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from decoders import HEADS, KV_HEADS, SIZE, changed, decoder

from effc import kernels
from effc.backends.onnxruntime.interface import cache_layout, ports
from effc.errors import InputError, UsageError
from effc.ir.analysis.cached_attention import cached_attention_sites
from effc.ir.dialect.cached_attention import constant_values
from effc.ir.dialect.inline import inline_dialect
from effc.ir.dialect.selections import ClusterSelection
from effc.passes.attention.kv_cache import KvCache
from effc.passes.attention.sparse_attention import SparseAttention
from effc.passes.pipeline_text import format_pipeline, parse_pipeline
from effc.runtime.bundle import Port

NAMES = ("centroids", "ends", "radii", "parents", "parent_ends", "parent_radii")


def clusters(**options: Any) -> SparseAttention:
    return SparseAttention("clusters", **options)


def reasons(program: Any, options: SparseAttention) -> list[str]:
    return [item.reason for item in options.match(program).left]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inputs_and_the_cache_of_queries(dtype: str) -> None:
    result = changed(decoder(3), KvCache("dense", dtype=dtype), clusters(recent=7, first=1))  # type: ignore[arg-type]
    names = [str(value.name) for value in result.graph.inputs][4:]
    own = [f"past_key_values.{layer}.{part}" for layer in (1, 2) for part in ("key", "value", "queries")]
    behind = [[f"clusters.{layer}.{name}" for name in NAMES] for layer in (1, 2)]
    assert names[2:8] == own
    assert names[8:] == [*behind[0], "clusters.thresholds", *behind[1]]
    first, *sites = cached_attention_sites(result.graph)
    assert first.selection.kind == "all"
    for site in sites:
        assert site.selection == ClusterSelection(7)
        centroids, ends, radii, parents, parent_ends, parent_radii, thresholds = constant_values(site.node)
        assert centroids.dtype == parents.dtype == site.past[0].dtype
        assert ends.dtype == parent_ends.dtype == ir.DataType.INT32
        assert radii.dtype == parent_radii.dtype == ir.DataType.FLOAT
        assert [str(axis) for axis in centroids.shape or ()] == ["1", str(KV_HEADS), "clusters", str(SIZE)]
        assert thresholds.name == "clusters.thresholds"
        queries = site.past[2]
        assert queries.dtype == ir.DataType.FLOAT
        assert [str(axis) for axis in queries.shape or ()] == ["batch", str(HEADS), "7", str(SIZE)]


def test_what_the_manifest_says() -> None:
    result = changed(decoder(2), KvCache("dense"), clusters())
    assert [port.name for port in ports(result, result.graph.inputs)] == ["q", "k", "v", "valid"]
    layout = cache_layout(result)
    assert layout is not None
    assert layout.mode == "in-place"
    assert [port.input.rpartition(".")[2] for port in layout.ports] == ["key", "value", "queries"] * 2
    found = layout.clusters[1]
    assert (found.key, found.value) == ("past_key_values.1.key", "past_key_values.1.value")
    assert (found.queries, found.dtype, found.softcap) == ("past_key_values.1.queries", "bfloat16", 0)
    assert found.scale == pytest.approx(SIZE**-0.5)
    assert found.inputs == [
        Port("clusters.1.centroids", "bfloat16", [1, KV_HEADS, "clusters", SIZE]),
        Port("clusters.1.ends", "int32", [1, KV_HEADS, "clusters"]),
        Port("clusters.1.radii", "float32", [1, KV_HEADS, "clusters"]),
        Port("clusters.1.parents", "bfloat16", [1, KV_HEADS, "parents", SIZE]),
        Port("clusters.1.parent_ends", "int32", [1, KV_HEADS, "parents"]),
        Port("clusters.1.parent_radii", "float32", [1, KV_HEADS, "parents"]),
        Port("clusters.thresholds", "float32", [2]),
    ]
    plain = cache_layout(decoder())
    assert plain is not None
    assert plain.clusters == []


def test_without_clusters_everything_is_read() -> None:
    """The bits of a cache that reads everything."""
    draw = np.random.default_rng(3)
    results = []
    feeds = {
        name: draw.standard_normal((2, 40, heads * SIZE)).astype(np.float32)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    }
    feeds["valid"] = np.ones((2, 40), bool)
    feeds["valid"][1, :7] = False
    for program in (decoder(), changed(decoder(), clusters())):
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(kernels.library_path()))
        session = ort.InferenceSession(ir.to_proto(program.model).SerializeToString(), options)
        sizes = {"batch": 2, "past": 0, "clusters": 0, "parents": 0}
        for value in list(program.graph.inputs)[4:]:
            assert value.dtype is not None
            shape = [axis if isinstance(axis, int) else sizes[str(axis)] for axis in value.shape or ()]
            feeds[str(value.name)] = np.zeros(shape, value.dtype.numpy())
        names = {one.name for one in session.get_inputs()}
        results.append(session.run(["y0"], {name: array for name, array in feeds.items() if name in names})[0])
    assert np.array_equal(*results)


def test_what_is_left_alone() -> None:
    windows = decoder(2, windows=(150, 0))
    assert reasons(windows, clusters()) == ["its window of 150 tokens bounds what it reads"]
    assert reasons(decoder(bias=True), clusters()) == [
        "its mask is only known as numbers added to the scores, so what it hides cannot be told"
    ]
    for scheme in ("int8", "kivi"):
        coded = changed(decoder(), KvCache(scheme))  # type: ignore[arg-type]
        assert reasons(coded, clusters()) == ["its cache has storage=pages; clusters reorder the tokens of a dense one"]
    assert reasons(changed(decoder(), clusters()), clusters()) == ["it has selection=clusters already"]
    assert "put kv-cache before" in KvCache("int8").match(changed(decoder(), clusters())).left[0].reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recent": 0}, "recent is 0, it must be from 1 to 1048576"),
        ({"budget": 5}, "scheme=clusters has no budget"),
        ({"share": 0.5}, "scheme=clusters has no share"),
        ({"sinks": 4}, "scheme=clusters has no sinks"),
        ({"positions": "keep"}, "scheme=clusters has no positions"),
    ],
    ids=str,
)
def test_options_that_there_are_not(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        clusters(**options)


def test_pipeline_text() -> None:
    one = clusters(recent=64, last=1)
    assert parse_pipeline(format_pipeline([one])) == (one,)


def test_figures_of_the_report() -> None:
    program = decoder(2)
    options = clusters()
    report = options.apply(program, options.match(program).sites)
    (first, _) = report.details["selection"]
    assert (first["selection"], first["select_recent"]) == ("clusters", 100)
    assert first["reads"] == {"2048": 2048, "8192": 8192, "32768": 32768}


def test_there_is_no_body() -> None:
    program = changed(decoder(), clusters())
    with pytest.raises(InputError, match="selection=clusters has no body in standard ops"):
        inline_dialect(program.model)


def test_a_node_without_its_inputs_is_refused() -> None:
    from effc.ir.dialect.cached_attention import OP

    program = changed(decoder(), clusters())
    (site,) = cached_attention_sites(program.graph)
    inputs = list(site.node.inputs)[:-1]
    node = ir.Node("effc", site.node.op_type, inputs, list(site.node.attributes.values()), num_outputs=4)
    with pytest.raises(InputError, match="has 7 inputs behind its cache, there are 6"):
        OP.check(node)
