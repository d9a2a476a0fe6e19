"""Engines that leave an int8 or int4 cache to onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import effc
from effc.verify.steps import token_feed

VOCABULARY = 96


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("model")
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    draw = np.random.default_rng(1)
    path.write_text("".join(json.dumps({"input_ids": draw.integers(0, VOCABULARY, 64).tolist()}) + "\n" for _ in "abc"))
    return path


def steps(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits of a prompt of 40 tokens and of every token after it."""
    engine = effc.load(folder)
    state, results = engine.new_state(len(ids), max_length=ids.shape[1]), []
    for start, stop in [(0, 40), *((at, at + 1) for at in range(40, ids.shape[1]))]:
        results.append(state.run(token_feed(engine, ids[:, start:stop], start), ["logits"])["logits"])
    return np.concatenate(results, axis=1)


@pytest.mark.parametrize(("scheme", "tolerance"), [("int8", 0.03), ("int4", 0.4)])
def test_a_calibrated_cache(model: Path, prompts: Path, tmp_path: Path, scheme: str, tolerance: float) -> None:
    effc.optimize(model, tmp_path / "dense")
    native = f"kv-cache{{scheme={scheme},native=true}}"
    result = effc.optimize(model, tmp_path / "native", passes=native, calibrate=prompts)
    record = {one["name"]: one for one in result.summary["passes"]}
    assert record["lower-static-caches"]["contract"] == "approximate"
    assert len(record["lower-static-caches"]["rewritten"]) == 4
    assert record["lower"]["measured"]["max_rel"] < 1e-5
    assert "lower" not in result.summary["pipeline"]
    ids = np.random.default_rng(5).integers(0, VOCABULARY, (2, 70))
    expected, found = steps(tmp_path / "dense", ids), steps(tmp_path / "native", ids)
    error = np.sqrt(np.mean((found - expected) ** 2)) / np.sqrt(np.mean(expected**2))
    assert 0 < error < tolerance


def test_it_has_a_portable_form(model: Path, prompts: Path, tmp_path: Path) -> None:
    native = "kv-cache{scheme=int8,native=true}"
    result = effc.optimize(model, tmp_path / "portable", passes=native, calibrate=prompts, portable=True)
    assert "lower-static-caches" not in [one["name"] for one in result.summary["passes"]]
    effc.optimize(model, tmp_path / "native", passes=native, calibrate=prompts)
    ids = np.random.default_rng(5).integers(0, VOCABULARY, (2, 50))
    np.testing.assert_allclose(steps(tmp_path / "portable", ids), steps(tmp_path / "native", ids), atol=5e-3)
