"""Broken input of every kind: a clear message, the right exit code, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from effc.cli.main import run
from effc.runtime.bundle import MANIFEST

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to break."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def _refused(capsys: pytest.CaptureFixture[str], arguments: list[object], code: int, *words: str) -> None:
    assert run([str(argument) for argument in arguments]) == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err, said.err


def _truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _cut_inside_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5])


def _huge_header(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 10 << 30) + data[8:])


def _wrong_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 95}))


def _unknown_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, WEIGHTS),
        (_cut_inside_header, WEIGHTS),
        (_huge_header, "header"),
        (_wrong_shape, "does not fit"),
        (_unknown_type, "no-such-model"),
        (_no_config, "config.json"),
        (_broken_config, "config.json"),
        (_pickle_only, "safetensors"),
    ],
)
def test_broken_checkpoints(
    damage: Callable[[Path], None], words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(model)
    _refused(capsys, ["optimize", model, "-o", tmp_path / "out", "--passes", "lossless-weights"], 3, words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("content", [b"GGML" + bytes(100), b"GGUF", b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60)])
def test_broken_gguf(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    _refused(capsys, ["optimize", tmp_path / "m.gguf", "-o", tmp_path / "out"], 3, "m.gguf")
    assert not (tmp_path / "out").exists()


def _external_onnx(folder: Path, location: str) -> Path:
    """An ONNX file whose one weight lies in external data at `location`."""
    weight = onnx.TensorProto(name="w", data_type=1, dims=[64, 64], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", str(64 * 64 * 4))):
        weight.external_data.add(key=key, value=value)
    x, y = (onnx.helper.make_tensor_value_info(name, 1, ["n", 64]) for name in ("x", "y"))
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    path = folder / "m.onnx"
    path.write_bytes(
        onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=11
        ).SerializeToString()
    )
    return path


def test_external_data_that_is_missing_or_lies_outside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = tmp_path / "secret.bin"
    np.zeros((64, 64), np.float32).tofile(secret)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to(secret)
    for location in ("missing.bin", "../secret.bin", str(secret), "link.bin"):
        path = _external_onnx(folder, location)
        _refused(capsys, ["optimize", path, "-o", tmp_path / "out"], 3, Path(location).name)
    assert not (tmp_path / "out").exists()


def test_external_data_that_is_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _external_onnx(tmp_path, "w.bin")
    (tmp_path / "w.bin").write_bytes(b"\0" * 100)
    _refused(capsys, ["optimize", path, "-o", tmp_path / "out"], 3, "w.bin")
    assert not (tmp_path / "out").exists()


def test_wrong_usage(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["-o", tmp_path / "out"]
    _refused(capsys, ["optimize", tiny_llama, *output, "--passes", "losless-weights"], 2, "^", "Did you mean")
    _refused(capsys, ["optimize", tiny_llama, *output, "--passes", "lossless-weights{layuot=raw}"], 2, "Options:")
    _refused(capsys, ["optimize", tiny_llama, *output, "--passes", "lossless-weights{min-saving=2}"], 2, "from 0")
    _refused(capsys, ["optimize", tiny_llama, *output, "--target", "ort-gpu"], 2, "Targets:")
    _refused(capsys, ["optimize", tiny_llama, *output, "--preset", "losless"], 2, "lossless")
    _refused(capsys, ["optimize", tiny_llama, "--passes", "lossless-weights"], 2, "-o")
    _refused(capsys, ["optimize", tmp_path / "nothing-here", *output], 3, "nothing-here")
    assert not (tmp_path / "out").exists()


def test_a_pass_that_changes_nothing(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["optimize", tiny_llama, "-o", tmp_path / "out", "--passes", "lossless-weights{min-bytes=100000000}"]
    _refused(capsys, arguments, 1, "changed nothing", "below min-bytes", "--allow-noop")
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "inside", Path("/proc/effc-engine")):
        _refused(capsys, ["optimize", tiny_llama, "-o", place], 3, str(place))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(tiny_llama: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _refused(capsys, ["optimize", tiny_llama, "-o", small_disk / "engine"], 3, "space")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("name", ["weights.bin", "model.onnx", "tokenizer.json"])
def test_one_flipped_byte(name: str, tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    data = bytearray((engine / name).read_bytes())
    data[len(data) // 2] ^= 1
    (engine / name).write_bytes(data)
    _refused(capsys, ["generate", engine, "--prompt", "a"], 3, name)


def test_engines_that_are_not(tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    manifest = json.loads((engine / MANIFEST).read_text())
    (engine / MANIFEST).write_text(json.dumps({**manifest, "version": 99}))
    _refused(capsys, ["generate", engine, "--prompt", "a"], 3, "version 99")
    (engine / MANIFEST).write_text(json.dumps({**manifest, "files": {**manifest["files"], "../x": {}}}))
    _refused(capsys, ["generate", engine, "--prompt", "a"], 3, "../x")
    (engine / MANIFEST).write_text("{")
    _refused(capsys, ["generate", engine, "--prompt", "a"], 3, MANIFEST)
    (engine / MANIFEST).unlink()
    _refused(capsys, ["generate", engine, "--prompt", "a"], 3, "effc optimize")


def test_prefixes_that_are_not(tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, folder = tmp_path / "text", tmp_path / "prefix"
    text.write_text("Once upon a time there was")
    run_with = ["generate", tiny_engine, "--prompt", " a king", "--max-new-tokens", "3", "--prefix", folder]
    _refused(capsys, run_with, 3, "effc prefix")
    assert run(["prefix", str(tiny_engine), "--text", str(text), "-o", str(folder)]) == 0
    assert run([str(word) for word in run_with]) == 0
    _refused(capsys, [*run_with, "--chat"], 2, "plain text")
    data = (folder / "prefix.bin").read_bytes()
    (folder / "prefix.bin").write_bytes(data[:-1])
    _refused(capsys, run_with, 3, "prefix.bin", "effc prefix")
    (folder / "prefix.bin").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    _refused(capsys, run_with, 3, "prefix.bin", "effc prefix")
    text.write_text("Once upon a time " * 20)
    _refused(capsys, ["prefix", tiny_engine, "--text", text, "-o", folder], 2, "at most 256")
    text.write_text("Once")
    _refused(capsys, ["prefix", tiny_engine, "--text", text, "-o", tiny_engine], 3, "a prefix to replace")
    _refused(capsys, ["generate", tiny_engine, "--prompt", "a", "--prefix", tiny_engine], 3, "effc prefix")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prefix", "text"]


def test_a_full_disk_leaves_no_prefix(
    tiny_engine: Path, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("a" * 250)
    (small_disk / "filling").write_bytes(bytes(100_000))
    _refused(capsys, ["prefix", tiny_engine, "--text", tmp_path / "text", "-o", small_disk / "prefix"], 3, "space")
    assert [path.name for path in small_disk.iterdir()] == ["filling"]


def test_killed_in_the_middle_then_resumed(tiny_llama: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "EFFC_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "effc", "optimize", str(tiny_llama), "-o", str(tmp_path / "engine")]
    command += ["--passes", "lossless-weights{min-bytes=0}"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not any((tmp_path / "cache").glob("??/*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "engine").exists()
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "traced before" in finished.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "engine"]
