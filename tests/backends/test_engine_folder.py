"""An engine folder appears as a whole or not at all."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import onnx_ir as ir
import pytest

from effc.backends.engine_folder import COMPRESS_FROM, new_engine_folder, write_assets
from effc.errors import InputError, OutputError
from effc.ir.program import Program, Source, Task
from effc.runtime.bundle import MANIFEST


def test_it_appears_when_the_block_ends(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "engine"
    with new_engine_folder(output) as folder:
        (folder / MANIFEST).write_text("{}")
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == [MANIFEST]
    assert [path.name for path in output.parent.iterdir()] == ["engine"]


def _fail(output: Path) -> None:
    with new_engine_folder(output) as folder:
        (folder / MANIFEST).write_text("new")
        raise ValueError("stop")


def test_a_failure_leaves_the_old_engine(tmp_path: Path) -> None:
    output = tmp_path / "engine"
    with new_engine_folder(output) as folder:
        (folder / MANIFEST).write_text("old")
    with pytest.raises(ValueError, match="stop"):
        _fail(output)
    assert (output / MANIFEST).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_an_engine_is_replaced_whole(tmp_path: Path) -> None:
    output = tmp_path / "engine"
    for name in ("first", "second"):
        with new_engine_folder(output) as folder:
            (folder / MANIFEST).write_text(name)
            (folder / name).write_text(name)
    assert sorted(path.name for path in output.iterdir()) == [MANIFEST, "second"]


def test_other_folders_and_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(OutputError, match="Name"), new_engine_folder(tmp_path / name):
            pass
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_stale_partial_folder_is_removed(tmp_path: Path) -> None:
    stale = tmp_path / ".engine.partial-99999999-abc"
    stale.mkdir()
    with new_engine_folder(tmp_path / "engine") as folder:
        (folder / MANIFEST).write_text("{}")
    assert not stale.exists()


def test_large_assets_are_compressed_and_the_tokenizer_is_minified(tmp_path: Path) -> None:
    tokenizer = {"model": {"vocab": {f"token {i}": i for i in range(10)}}}
    big = b"x" * COMPRESS_FROM
    source = Source("memory", "m", assets={"tokenizer.json": json.dumps(tokenizer, indent=2).encode(), "big.txt": big})
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24})
    write_assets(Program(ir.Model(graph, ir_version=11), Task.GENERIC, source), tmp_path)
    assert b"\n" not in (tmp_path / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "tokenizer.json").read_bytes()) == tokenizer
    assert lzma.decompress((tmp_path / "big.txt.xz").read_bytes()) == big


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    source = Source("memory", "m", assets={"tokenizer.json": b'{"model": '})
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24})
    with pytest.raises(InputError, match=r"tokenizer\.json: is not JSON"):
        write_assets(Program(ir.Model(graph, ir_version=11), Task.GENERIC, source), tmp_path)
