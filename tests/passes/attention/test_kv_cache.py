"""The pass `kv-cache`: options, choice of layers, the new cache of the graph, numbers through the kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import pytest
from decoders import KV_HEADS, SIZE, changed, decoder, run_steps

from effc.backends.onnxruntime.static_cache import lower_static_caches
from effc.errors import UsageError
from effc.ir.analysis.cached_attention import cached_attention_sites
from effc.ir.dialect.cache_storage import DenseStorage, PageStorage, StaticStorage
from effc.ir.dialect.cached_attention import constant_values
from effc.ir.dialect.inline import inline_dialect
from effc.ir.program import Program, Source, Task
from effc.passes.attention.kv_cache import KvCache
from effc.passes.pipeline_text import format_pipeline, parse_pipeline


def storages(program: Program) -> list[object]:
    return [site.storage for site in cached_attention_sites(program.graph)]


def test_the_cache_of_the_graph_takes_its_new_form() -> None:
    result = changed(decoder(2), KvCache("int4"))
    tensors = ("exact_key", "exact_value", "pages")
    assert [value.name for value in result.graph.inputs][4:] == [
        f"past_key_values.{layer}.{name}" for layer in (0, 1) for name in tensors
    ]
    assert [value.name for value in result.graph.outputs] == [
        *(f"{name}" for name in ("y0", *(f"present.0.{tensor}" for tensor in tensors))),
        *(f"{name}" for name in ("y1", *(f"present.1.{tensor}" for tensor in tensors))),
    ]
    pages, present = result.cache_pairs()[2]
    assert pages.dtype == present.dtype == ir.DataType.UINT8
    assert (str(pages.shape[2]), str(present.shape[2])) == ("past // 128", "total // 128")


@pytest.mark.parametrize("scheme", ["int8", "int4", "kivi", "zipcache", "mikv"])
def test_every_scheme_is_a_storage_of_the_op(scheme: str) -> None:
    (storage,) = storages(changed(decoder(), KvCache(scheme)))  # type: ignore[arg-type]
    assert isinstance(storage, PageStorage)
    assert storage.has_statistics == (scheme in ("zipcache", "mikv"))
    assert parse_pipeline(format_pipeline([KvCache(scheme)])) == (KvCache(scheme),)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        KvCache("zipcache", bits=16, low_bits=16),
        KvCache("zipcache", bits=16, ratio=1.0),
        KvCache("mikv", bits=16, low_bits=16),
        KvCache("dense"),
    ],
    ids=str,
)
def test_sixteen_bits_for_every_token_are_the_dense_cache(options: KvCache) -> None:
    assert storages(changed(decoder(), options)) == [DenseStorage(ir.DataType.BFLOAT16)]


def test_layers_are_chosen() -> None:
    options = KvCache("int8", first=1, last=1, skip=("*.2",))
    match = options.match(decoder(5, windows=(0, 0, 0, 0, 0)))
    assert [site.name for site in match.sites] == ["attention layers.1", "attention layers.3"]
    assert {item.site: item.reason for item in match.left} == {
        "attention layers.0": "skipped by the options `first` and `last`",
        "attention layers.2": "skipped by the option `skip`",
        "attention layers.4": "skipped by the options `first` and `last`",
    }


def test_layers_with_a_window() -> None:
    program = decoder(2, windows=(24, 0))
    ring, pages = storages(changed(program, KvCache("int4")))
    assert ring == DenseStorage(ir.DataType.BFLOAT16, 24)
    assert isinstance(pages, PageStorage)
    both = storages(changed(program, KvCache("int4", window_layers="quantize")))
    assert [getattr(storage, "window", None) for storage in both] == [24, 0]
    kept = KvCache("int4", dtype="float32").match(program)
    assert [item.reason for item in kept.left] == ["its cache is float32 already; its window of 24 tokens bounds it"]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (decoder(size=20), "its heads have 20 and 20 elements, pages take multiples of 16"),
        (
            decoder(bias=True),
            "its mask is only known as numbers added to the scores, so padding cannot be told from tokens",
        ),
        (changed(decoder(), KvCache("int4")), "its cache has storage=pages already"),
    ],
)
def test_reasons(program: Program, reason: str) -> None:
    match = KvCache("int8").match(program)
    assert not match.sites
    assert [item.reason for item in match.left] == [reason]


def test_a_model_without_a_cache() -> None:
    query = ir.Value(name="q", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 4]))
    other = ir.node("Relu", [query])
    graph = ir.Graph([query], other.outputs, nodes=[other], opset_imports={"": 24}, name="plain")
    match = KvCache().match(Program(ir.Model(graph, ir_version=11), Task.GENERIC, Source("memory", "plain")))
    assert not match.sites
    assert [item.reason for item in match.left] == ["it has no attention with a cache"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kv-cache{scheme=int5}", "takes one of"),
        ("kv-cache{scheme=int8,ratio=0.5}", "scheme=int8 has no ratio"),
        ("kv-cache{scheme=int8,bits=4}", "scheme=int8 has no bits"),
        ("kv-cache{scheme=kivi,bits=8}", "scheme=kivi has 2 or 4"),
        ("kv-cache{scheme=zipcache,ratio=0.0}", "above 0"),
        ("kv-cache{scheme=zipcache,low-bits=3}", "2, 4, 8 or 16"),
        ("kv-cache{page=100}", "multiple of 16"),
        ("kv-cache{page=512}", "from 16 to 256"),
        ("kv-cache{sinks=-1}", "from 0 to 1024"),
        ("kv-cache{scheme=dense,page=64}", "scheme=dense has no page"),
    ],
)
def test_wrong_options(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_pipeline(text)


SMALLER = {"int8": 1.85, "int4": 3.3, "zipcache": 4.1, "kivi": 4.8}


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize(("scheme", "least"), SMALLER.items())
def test_bytes_of_a_cache_of_8192_tokens(scheme: str, least: float, size: int) -> None:
    """Parameters, the exact buffer and statistics are counted."""
    options = KvCache(scheme, bits=2 if scheme == "kivi" else None)  # type: ignore[arg-type]
    report = options.apply(program := decoder(size=size), options.match(program).sites)
    (figures,) = report.details["cache"]
    assert figures["dense_bytes"] / figures["bytes"] >= least
    assert figures["bytes_of_codes"] < figures["bytes"]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (KvCache("dense"), 0.004),
        (KvCache("int8"), 0.02),
        (KvCache("int8", window_layers="quantize"), 0.02),
        (KvCache("int4"), 0.2),
        (KvCache("kivi"), 0.2),
        (KvCache("zipcache"), 0.5),
        (KvCache("mikv"), 0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [0, 150])
def test_close_to_the_dense_cache(options: KvCache, tolerance: float, window: int) -> None:
    """Relative to the root mean square of the outputs; random keys see every error, trained ones few."""
    program = decoder(windows=(window,))
    steps = [64] * 5 + [1] * 30
    expected, found = run_steps(program, steps), run_steps(changed(program, options), steps)
    error = np.sqrt(np.mean((expected - found) ** 2)) / np.sqrt(np.mean(expected**2))
    assert 0 < error < tolerance


class Observed:
    """Calibration data that are one window of given values."""

    digest = "0"

    def __init__(self, values: dict[str, np.ndarray]) -> None:
        self.values = values

    def observe(self, program: Program, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        for _ in range(2):
            yield {name: self.values[name] for name in names}


def native(scheme: Literal["int8", "int4"]) -> tuple[Program, dict[str, np.ndarray]]:
    """A decoder with static scales measured on normal numbers, and those numbers."""
    program = decoder(2, windows=(0, 150), ring=False)
    draw = np.random.default_rng(3)
    values = {name: draw.standard_normal((1, 400, KV_HEADS * SIZE)).astype(np.float32) for name in ("k", "v")}
    program.calibration = Observed(values)
    return changed(program, KvCache(scheme, native=True)), values


@pytest.mark.parametrize(("scheme", "top"), [("int8", 127), ("int4", 7)])
def test_static_scales_are_measured(scheme: Literal["int8", "int4"], top: int) -> None:
    program, values = native(scheme)
    for site in cached_attention_sites(program.graph):
        for value, name in zip(constant_values(site.node), ("k", "v"), strict=True):
            assert value.const_value is not None
            most = np.abs(values[name].reshape(-1, KV_HEADS, SIZE)).max(axis=0)
            np.testing.assert_allclose(value.const_value.numpy()[0, :, 0], most / top, rtol=1e-6)


@pytest.mark.parametrize(("scheme", "tolerance"), [("int8", 0.04), ("int4", 0.3)])
def test_static_caches_run_in_onnxruntime_as_in_their_body(scheme: Literal["int8", "int4"], tolerance: float) -> None:
    program, _ = native(scheme)
    lowered, body = program.clone(), program.clone()
    assert lower_static_caches(lowered) == 2
    inline_dialect(body.model)
    steps = [5, 64, 1, 1, 120, 1]
    exact = run_steps(decoder(2, windows=(0, 150), ring=False), steps)
    found, expected = (run_steps(one, steps) for one in (lowered, body))
    seen = np.ones(exact.shape[:2], bool)
    seen[1, :7] = False
    np.testing.assert_allclose(found[seen], expected[seen], atol=2e-5)
    error = np.sqrt(np.mean((exact - found)[seen] ** 2)) / np.sqrt(np.mean(exact[seen] ** 2))
    assert 0 < error < tolerance


def test_static_scales_of_rotated_keys_bound_every_position() -> None:
    """Both channels of a pair take the length of the pair."""
    program = decoder()
    (node,) = program.graph
    key = node.inputs[1]
    assert key is not None
    tables = [ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in ("cos", "sin")]
    attributes = {"interleaved": 0, "num_heads": KV_HEADS}
    rotation = ir.node("RotaryEmbedding", [key, *tables], attributes, name="rotation")
    rotation.outputs[0].name, rotation.outputs[0].shape, rotation.outputs[0].type = "rotated", key.shape, key.type
    program.graph.inputs.extend(tables)
    program.graph.insert_before(node, rotation)
    node.replace_input_with(1, rotation.outputs[0])
    keys = np.zeros((1, 2, KV_HEADS * SIZE), np.float32)
    keys[0, 0, 0], keys[0, 0, SIZE // 2] = 3, 4
    program.calibration = Observed({"rotated": keys, "v": np.ones_like(keys)})
    (site,) = cached_attention_sites(changed(program, KvCache("int8", native=True)).graph)
    scale = constant_values(site.node)[0].const_value
    assert scale is not None
    assert [scale.numpy()[0, 0, 0, place] * 127 for place in (0, SIZE // 2)] == pytest.approx([5, 5])


def test_native_needs_data() -> None:
    options = KvCache("int8", native=True)
    assert options.uses_calibration
    assert not KvCache("int8").uses_calibration
    with pytest.raises(UsageError, match="--calibrate"):
        changed(decoder(ring=False), options)
    with pytest.raises(UsageError, match="never native"):
        KvCache("kivi", native=True)


def test_scales_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "scales.npz"
    options = KvCache("int4", native=True, scales=str(path))
    program = decoder(ring=False)
    shape = (KV_HEADS, SIZE)
    for arrays, words in (
        ({}, "no array 'key.0'"),
        ({"key.0": np.ones(shape, np.float32), "value.0": np.ones(shape, np.float32)}, "every scale is 1.0"),
        ({"key.0": np.ones((2, 3), np.float32), "value.0": np.ones(shape, np.float32)}, "it must be float32"),
        ({"key.0": np.full(shape, np.nan, np.float32), "value.0": np.ones(shape, np.float32)}, "not positive"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(UsageError, match=words):
            changed(program, options)
    path.write_bytes(b"no zip")
    with pytest.raises(UsageError, match="cannot be read as scales"):
        changed(program, options)
    np.savez(path, **{"key.0": np.full(shape, 0.5, np.float32), "value.0": np.full(shape, 0.25, np.float32)})
    (storage,) = storages(changed(program, options))
    assert storage == StaticStorage(4)
