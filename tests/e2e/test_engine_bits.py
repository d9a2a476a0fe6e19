"""Coded and raw engines give the same bits on every instruction set; a portable one gives the same values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import effc
from effc import kernels

RUN = """
import sys, effc, numpy as np
ids = np.arange(1, 21, dtype=np.int64)[None]
feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(20, dtype=np.int64)[None]}
with effc.load(sys.argv[1], threads=int(sys.argv[2])) as engine:
    np.save(sys.argv[3], engine.run(feeds)["logits"])
"""


def _logits(engine: Path, out: Path, threads: int = 1, **environment: str) -> np.ndarray:
    command = [sys.executable, "-c", RUN, str(engine), str(threads), str(out)]
    subprocess.run(command, check=True, env={**os.environ, **environment})
    return np.load(out)


@pytest.fixture(scope="module")
def raw_engine(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "raw"
    effc.optimize(tiny_llama, folder, passes="stored-weights{min-bytes=0}", check=False)
    return folder


@pytest.mark.parametrize("isa", kernels.available_isas())
def test_bits_on_every_instruction_set(isa: str, tiny_engine: Path, raw_engine: Path, tmp_path: Path) -> None:
    expected = _logits(raw_engine, tmp_path / "raw.npy", EFFC_ISA=isa)
    for threads in (1, 2):
        for layout in ("rank4", "rank3", "raw"):
            found = _logits(tiny_engine, tmp_path / "y.npy", threads, EFFC_ISA=isa, EFFC_RUNTIME_LAYOUT=layout)
            np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("passes", ["", "lossless-weights{min-bytes=0}", "lossless-weights{min-bytes=0,layout=rank4}"])
def test_a_portable_engine_needs_no_kernels(passes: str, tiny_llama: Path, tiny_engine: Path, tmp_path: Path) -> None:
    result = effc.optimize(tiny_llama, tmp_path / "portable", passes=passes, portable=True)
    assert result.manifest is not None
    assert not result.manifest.needs_kernels
    assert {node.domain for node in result.program.graph} <= {"", "effc"}
    expected = _logits(tiny_engine, tmp_path / "native.npy")
    np.testing.assert_allclose(_logits(tmp_path / "portable", tmp_path / "y.npy"), expected, rtol=1e-4, atol=1e-5)


def test_generation_is_the_same_alone_and_in_a_left_padded_batch(tiny_engine: Path) -> None:
    prompts = ["a", "hello world", "The quick brown fox"]
    with effc.load(tiny_engine) as engine:
        together = engine.generate(prompts, max_new_tokens=12)
        alone = [engine.generate(prompt, max_new_tokens=12)[0] for prompt in prompts]
    assert [item.token_ids for item in together] == [item.token_ids for item in alone]


def test_the_cache_is_in_place(tiny_engine: Path) -> None:
    with effc.load(tiny_engine) as engine:
        assert engine.manifest.cache is not None
        assert engine.manifest.cache.mode == "in-place"


def test_only_the_logits_that_are_asked_for_are_computed(tiny_engine: Path) -> None:
    ids = np.arange(1, 15, dtype=np.int64).reshape(2, 7)
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(7, dtype=np.int64), (2, 1)),
    }
    with effc.load(tiny_engine) as engine:
        assert engine.chooses_logits
        everything = engine.run(feeds)["logits"]
        assert everything.shape == (2, 7, 260)
        for count in (1, 3, 7, 9):
            found = engine.new_state(2).run(feeds, ["logits"], num_logits=count)["logits"]
            np.testing.assert_allclose(found, everything[:, -count:], rtol=1e-5, atol=1e-6)
        state = engine.new_state(2)
        state.run(feeds, ["logits"], num_logits=1)
        step = {name: array[:, :2] for name, array in feeds.items()}
        step["attention_mask"] = np.ones((2, 9), np.int64)
        assert state.run(step, ["logits"])["logits"].shape == (2, 2, 260)
