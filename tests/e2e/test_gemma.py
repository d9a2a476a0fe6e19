"""Gemma 3 270M, a real language model, the whole way: size, bits, perplexity, text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import effc
from effc import kernels
from effc.compiler import OptimizeResult, reference_engine
from effc.verify.evaluation import verify_engine
from effc.verify.steps import token_feed

pytestmark = pytest.mark.slow

RUN = """
import sys, effc, numpy as np
generator, rows = np.random.default_rng(0), []
with effc.load(sys.argv[1], threads=int(sys.argv[2]), check=False) as engine:
    for batch, seq in ((1, 1), (1, 20), (2, 64)):
        ids = generator.integers(0, 262144, (batch, seq))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids),
                 "position_ids": np.tile(np.arange(seq), (batch, 1))}
        rows.append(engine.run(feeds)["logits"].ravel())
np.save(sys.argv[3], np.concatenate(rows))
"""


@pytest.fixture(scope="module")
def coded(gemma_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> OptimizeResult:
    return effc.optimize(gemma_gguf, tmp_path_factory.mktemp("coded") / "engine", passes="lossless-weights")


@pytest.fixture(scope="module")
def raw(gemma_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "engine"
    effc.optimize(gemma_gguf, folder, passes="stored-weights", check=False)
    return folder


def _folder(result: OptimizeResult) -> Path:
    assert result.folder is not None
    return result.folder


def _record(result: OptimizeResult, name: str) -> dict[str, Any]:
    return next(record for record in result.summary["passes"] if record["name"] == name)


def test_sizes_and_digests(coded: OptimizeResult) -> None:
    tensors = _record(coded, "lossless-weights")["details"]["tensors"]
    stored = 2 * sum(tensor["shape"][0] * tensor["shape"][1] for tensor in tensors)
    assert coded.summary["bytes"]["engine"] <= 0.675 * stored
    assert coded.summary["bytes"]["weights_memory"] <= 0.76 * stored
    assert _record(coded, "lossless-weights")["measured"]["weights_identical"] == 127
    assert _record(coded, "lossless-weights")["measured"]["bitwise"] is True


@pytest.mark.parametrize("isa", kernels.available_isas())
def test_logits_are_those_of_raw_weights_bit_for_bit(
    isa: str, coded: OptimizeResult, raw: Path, tmp_path: Path
) -> None:
    def logits(engine: Path, threads: int, layout: str) -> np.ndarray:
        command = [sys.executable, "-c", RUN, str(engine), str(threads), str(tmp_path / "y.npy")]
        subprocess.run(command, check=True, env={**os.environ, "EFFC_ISA": isa, "EFFC_RUNTIME_LAYOUT": layout})
        return np.load(tmp_path / "y.npy").view(np.uint32)

    expected = logits(raw, 1, "raw")
    for threads, layout in ((1, "rank4"), (2, "rank4"), (1, "rank3"), (2, "rank3")):
        assert np.array_equal(logits(_folder(coded), threads, layout), expected), (threads, layout)


def test_perplexity_is_that_of_the_source(coded: OptimizeResult, gemma_gguf: Path) -> None:
    with effc.load(_folder(coded)) as engine, effc.load(reference_engine(gemma_gguf)) as reference:
        figures = verify_engine(engine, reference, tokens=8192)
    assert abs(figures["perplexity"]["ratio"] - 1) < 1e-3
    assert figures["top1"] > 0.999


def test_it_writes_text(coded: OptimizeResult) -> None:
    with effc.load(_folder(coded)) as engine:
        text = engine.generate("The capital of France is", max_new_tokens=20)[0].text
    assert "France" in text


def test_a_long_generation_is_that_of_the_source_without_a_cache(coded: OptimizeResult, gemma_gguf: Path) -> None:
    """1,200 tokens, past the windows of 512: the logits of one pass over all of them, from an empty cache."""
    with effc.load(_folder(coded)) as engine, effc.load(reference_engine(gemma_gguf)) as plain:
        prompt = engine.tokenizer.encode("The history of the lighthouse begins with")
        (row,) = engine.generate([prompt], max_new_tokens=1200)
        ids = np.array([[*prompt, *row.token_ids]])
        logits = plain.run(token_feed(plain, ids, 0))["logits"][0, len(prompt) - 1 : -1]
    chosen = logits[np.arange(len(row.token_ids)), row.token_ids]
    assert (chosen >= logits.max(axis=1) - 1e-3).all()


def test_a_prompt_of_4096_tokens_in_chunks_is_the_whole(coded: OptimizeResult) -> None:
    ids = np.random.default_rng(3).integers(0, 262144, (1, 4096))
    with effc.load(_folder(coded)) as engine:
        last = []
        for chunk in (4096, 512, 64):
            state = engine.new_state(1, max_length=4096)
            for start in range(0, 4096, chunk):
                feed = token_feed(engine, ids[:, start : start + chunk], start)
                logits = state.run(feed, ["logits"], num_logits=1)["logits"][0, -1]
            last.append(logits)
    scale = np.sqrt(np.mean(np.square(last[0])))
    for found in last[1:]:
        assert np.abs(found - last[0]).max() < 1e-4 * scale


@pytest.mark.parametrize(("scheme", "ratio"), [("int8", 1.002), ("int4", 1.02), ("zipcache", 1.05)])
def test_perplexity_with_a_quantized_cache(
    scheme: str, ratio: float, coded: OptimizeResult, gemma_gguf: Path, tmp_path: Path
) -> None:
    passes = f"lossless-weights,kv-cache{{scheme={scheme}}}"
    effc.optimize(gemma_gguf, tmp_path / "engine", passes=passes, check=False)
    with effc.load(tmp_path / "engine") as engine, effc.load(_folder(coded)) as dense:
        figures = verify_engine(engine, dense, tokens=4096, context=4096)
    assert figures["perplexity"]["ratio"] <= ratio
