"""Opening engine folders: what is refused, what is mapped, and how feeds are checked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from effc.errors import EngineError, MissingDependencyError, UsageError
from effc.runtime.bundle import MANIFEST, Port
from effc.runtime.session import load

MakeLm = Callable[..., Path]
MakeEngine = Callable[..., Path]


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_engine_says_what_it_is_and_closes(make_lm: MakeLm) -> None:
    with load(str(make_lm()), threads=1) as engine:
        assert engine.task == "causal-lm"
        assert engine.manifest.cache is not None
        assert engine.has_tokenizer
        assert engine.session.get_session_options().intra_op_num_threads == 1
    with pytest.raises(UsageError, match="was closed"):
        engine.run({})


def test_folders_that_are_no_engines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not an engine folder"):
        load(tmp_path)
    with pytest.raises(EngineError, match="not an engine folder"):
        load(tmp_path / "absent")
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(EngineError, match="is damaged"):
        load(tmp_path)


def test_another_format_version_is_refused(make_lm: MakeLm) -> None:
    folder = make_lm()
    edit_manifest(folder, version=2)
    with pytest.raises(EngineError, match="format version 2"):
        load(folder)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_changed_bytes_are_found_unless_unchecked(make_lm: MakeLm, name: str) -> None:
    folder = make_lm()
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(EngineError, match=f"{name}: its bytes are not those"):
        load(folder)
    if name != "model.onnx":
        load(folder, check=False).close()


def test_a_missing_file_is_named(make_lm: MakeLm) -> None:
    folder = make_lm()
    (folder / "model.onnx").unlink()
    for check in (True, False):
        with pytest.raises(EngineError, match=r"model\.onnx: is missing"):
            load(folder, check=check)


def test_a_graph_onnxruntime_cannot_read_is_an_engine_error(make_lm: MakeLm) -> None:
    folder = make_lm()
    (folder / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"model\.onnx: onnxruntime .* refuses it"):
        load(folder, check=False)


def test_a_graph_that_differs_from_the_manifest_is_refused(make_lm: MakeLm) -> None:
    folder = make_lm()
    manifest = json.loads((folder / MANIFEST).read_text())
    edit_manifest(folder, inputs=manifest["inputs"][:2])
    with pytest.raises(EngineError, match=r"inputs differ from the manifest \(position_ids\)"):
        load(folder)


def test_targets_and_providers_that_are_not_here(make_lm: MakeLm) -> None:
    folder = make_lm(target="tensorrt")
    with pytest.raises(EngineError, match="was built for 'tensorrt'"):
        load(folder)
    with pytest.raises(MissingDependencyError, match="NoSuchProvider"):
        load(folder, providers=["NoSuchProvider"])
    load(folder, providers=["CPUExecutionProvider"]).close()


def test_missing_kernels_are_named_with_the_way_out(make_lm: MakeLm, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_lm(needs_kernels=True)
    monkeypatch.setattr("effc.kernels.library_path", lambda: folder / "absent.so")
    with pytest.raises(MissingDependencyError, match="--portable"):
        load(folder)

    def missing() -> Path:
        raise MissingDependencyError("no library was built")

    monkeypatch.setattr("effc.kernels.library_path", missing)
    with pytest.raises(MissingDependencyError, match=r"no library was built.*--portable"):
        load(folder)


@pytest.mark.parametrize("threads", [0, -1, 1_000_000])
def test_thread_counts_out_of_range_are_refused(make_lm: MakeLm, threads: int) -> None:
    with pytest.raises(UsageError, match="threads is"):
        load(make_lm(), threads=threads)


def test_refusals_print_nothing(make_lm: MakeLm) -> None:
    code = (
        "import sys, numpy\n"
        "from effc.errors import EffcError\n"
        "from effc.runtime.session import load\n"
        "engine = load(sys.argv[1])\n"
        "ids = numpy.full((1, 1), 10**6)\n"
        "try: engine.run({'input_ids': ids, 'attention_mask': ids * 0 + 1, 'position_ids': ids * 0})\n"
        "except EffcError as error: assert 'failed while running' in str(error)\n"
        "else: raise SystemExit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, make_lm()], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("mode", ["in-place", "growing"])
def test_run_starts_empty_or_takes_a_cache(make_lm: MakeLm, lm_oracle: Any, mode: str) -> None:
    ids = [5, 200, 17, 44, 0, 259, 3]
    whole = lm_oracle.logits(ids)
    with load(make_lm(mode)) as engine:
        first = engine.run(lm_feeds(ids[:4], 0))
        assert list(first) == ["logits"]
        np.testing.assert_allclose(first["logits"][0], whole[:4], rtol=2e-5, atol=2e-5)
        empty = {port.input: np.zeros((1, 2, 0, 8), np.float32) for port in engine.manifest.cache.ports}
        results = engine.run({**lm_feeds(ids[:4], 0), **empty})
        past = {port.input: results[port.output] for port in engine.manifest.cache.ports}
        assert {value.shape for value in past.values()} == {(1, 2, 4, 8)}
        rest = engine.run({**lm_feeds(ids[4:], 4), **past})
        np.testing.assert_allclose(rest["logits"][0], whole[4:], rtol=2e-5, atol=2e-5)


def lm_feeds(ids: list[int], start: int) -> dict[str, np.ndarray]:
    total = start + len(ids)
    return {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(start, total)[None],
    }


def test_a_session_remembers_no_plan_for_each_length(make_lm: MakeLm) -> None:
    """It would grow by a kilobyte with every token."""
    with load(make_lm()) as engine:
        assert not engine.session.get_session_options().enable_mem_pattern


def test_feeds_are_checked_before_anything_runs(make_lm: MakeLm) -> None:
    good = lm_feeds([1, 2, 3], 0)
    past = {f"past_key_values.{layer}.{kind}": np.zeros((1, 2, 0, 8), np.float32) for layer in (0, 1)
            for kind in ("key", "value")}  # fmt: skip
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "'input_ids', 'attention_mask', 'position_ids' is missing"),
        ({**good, "pixels": good["input_ids"]}, "unknown input 'pixels'"),
        ({**good, "input_ids": good["input_ids"].astype(np.int32)}, "has dtype int32, the engine takes int64"),
        ({**good, "input_ids": good["input_ids"][0]}, r"has 1 axes, the engine takes \[batch, seq\]"),
        ({**good, "input_ids": [[1, 2, 3]]}, "is a list, not a numpy array"),
        ({**good, "position_ids": good["position_ids"][:, :2]}, r"axis 1 \(seq\) is 2, but seq is 3 in 'input_ids'"),
        ({**good, "position_ids": np.zeros((2, 3), np.int64)}, r"axis 0 \(batch\) is 2"),
        ({**good, "attention_mask": np.ones((1, 4), np.int64)}, "the attention mask covers 4 tokens"),
        ({**good, "attention_mask": np.ones((1, 2), np.int64)}, "the attention mask covers 2 tokens"),
        ({**good, **dict([*past.items()][:3])}, r"'past_key_values\.1\.value' is missing"),
        (
            {**good, **past, "past_key_values.0.key": np.zeros((1, 2, 1, 8), np.float32)},
            r"\(past\) is 0, but past is 1",
        ),
        (
            {**good, **past, "past_key_values.0.key": np.zeros((1, 3, 0, 8), np.float32)},
            "axis 1 is 3, the engine takes 2",
        ),
    ]
    with load(make_lm("growing")) as engine:
        engine.run({**good, **past})
        for feeds, message in wrong:
            with pytest.raises(UsageError, match=message):
                engine.run(feeds)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint8", "int32", "bool"])
@pytest.mark.parametrize("shape", [(0,), (1,), (5,)])
def test_element_types_go_through_unchanged(make_engine: MakeEngine, dtype: str, shape: tuple[int]) -> None:
    ports = [Port("x", dtype, ["n"])], [Port("y", dtype, ["n"])]
    value = np.arange(shape[0]).astype(dtype)
    with load(make_engine([helper.make_node("Identity", ["x"], ["y"])], *ports, {})) as engine:
        result = engine.run({"x": value})["y"]
    assert result.dtype == value.dtype
    np.testing.assert_array_equal(result, value)


def test_views_that_are_not_contiguous_are_fed_right(make_engine: MakeEngine) -> None:
    ports = [Port("x", "float32", ["n", "m"])], [Port("y", "float32", ["n", "m"])]
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    with load(make_engine([helper.make_node("Neg", ["x"], ["y"])], *ports, {})) as engine:
        for view in (base.T, base[::2, ::-1]):
            np.testing.assert_array_equal(engine.run({"x": view})["y"], -view)


def test_the_runtime_loads_no_compiler_and_no_framework() -> None:
    code = "import sys, effc.runtime.session; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"numpy", "onnxruntime", "tokenizers", "jinja2"} <= set(modules)
    assert not {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "effc.ir", "effc.passes"} & set(modules)


WEIGHT_ROWS, WEIGHT_SIDE = 16, 1024


@pytest.fixture(params=["as products want them", "transposed"])
def heavy_engine(request: pytest.FixtureRequest, make_engine: MakeEngine) -> Path:
    """64 MB of external fp32 matrices."""
    nodes, value = [], "x"
    for index in range(WEIGHT_ROWS):
        matrix = f"w{index}"
        if request.param == "transposed":
            nodes.append(helper.make_node("Transpose", [matrix], [f"t{index}"], perm=[1, 0]))
            matrix = f"t{index}"
        nodes.append(helper.make_node("MatMul", [value, matrix], [f"x{index}"]))
        value = f"x{index}"
    ports = [Port("x", "float32", ["n", WEIGHT_SIDE])], [Port(value, "float32", ["n", WEIGHT_SIDE])]
    folder = make_engine(nodes, *ports, {}, task="causal-lm")
    model = onnx.load(folder / "model.onnx")
    nbytes = 4 * WEIGHT_SIDE**2
    for index in range(WEIGHT_ROWS):
        tensor = TensorProto(name=f"w{index}", data_type=1, dims=[WEIGHT_SIDE] * 2, data_location=TensorProto.EXTERNAL)
        for key, item in {"location": "weights.bin", "offset": index * nbytes, "length": nbytes}.items():
            tensor.external_data.add(key=key, value=str(item))
        model.graph.initializer.append(tensor)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    rng = np.random.default_rng(0)
    (folder / "weights.bin").write_bytes(rng.standard_normal(WEIGHT_ROWS * WEIGHT_SIDE**2, dtype=np.float32).tobytes())
    return folder


def test_weights_outside_the_folder_are_not_read(heavy_engine: Path) -> None:
    outside = heavy_engine.parent / "outside.bin"
    (heavy_engine / "weights.bin").rename(outside)
    for location in ("../outside.bin", str(outside)):
        model = onnx.load(heavy_engine / "model.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = location if entry.key == "location" else entry.value
        (heavy_engine / "model.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(EngineError, match="refuses it"):
            load(heavy_engine, check=False)


MEMORY = """
import sys, time
import numpy
from effc.runtime.session import load

def memory():
    lines = [line.split() for line in open("/proc/self/status")]
    values = {line[0]: int(line[1]) / 1024 for line in lines if line[0] in ("RssAnon:", "RssFile:")}
    return values["RssAnon:"], values["RssFile:"]

prepack = {"no": False, "yes": True, "default": None}[sys.argv[2]]
before = memory()
engine = load(sys.argv[1], check=False, threads=1, prepack=prepack)
loaded = memory()
engine.run({"x": numpy.ones((1, 1024), numpy.float32)})
after = memory()
print(*(loaded[i] - before[i] for i in (0, 1)), *(after[i] - before[i] for i in (0, 1)))
"""


@pytest.mark.parametrize(("prepack", "mapped"), [("no", True), ("default", True), ("yes", False)])
def test_weights_are_mapped_not_copied(heavy_engine: Path, prepack: str, mapped: bool) -> None:
    """Resident MiB, private and file-backed: 64 MB of weights appear when used, and as pages of the file."""
    command = [sys.executable, "-c", MEMORY, str(heavy_engine), prepack]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    private, shared, private_after, shared_after = map(float, done.stdout.split())
    if mapped:
        assert private + shared < 32
        assert private_after < 32
        assert shared_after > 60
    else:
        assert private > 60
