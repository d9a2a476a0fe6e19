"""Long runs of engines with a cache against computations without one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import effc
from effc.compiler import reference_engine
from effc.runtime.session import Engine
from effc.verify.steps import token_feed

LONGEST = 4096
NEW = 1200


@pytest.fixture(scope="module", params=["full", "window"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose layers see everything, or a Gemma 3 with windows of 64 tokens in all layers but one."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LONGEST,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "full":
        LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)).save_pretrained(folder)
    else:
        windows = {"head_dim": 16, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
        config = Gemma3TextConfig(num_hidden_layers=3, query_pre_attn_scalar=16, **sizes, **windows)
        Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "engine"
    effc.optimize(model, folder, check=False)
    return folder


def in_chunks(engine: Engine, ids: np.ndarray, chunk: int) -> np.ndarray:
    """Logits [tokens, vocabulary], the tokens fed `chunk` at a time."""
    state, results = engine.new_state(1, max_length=ids.shape[1]), []
    for start in range(0, ids.shape[1], chunk):
        results.append(state.run(token_feed(engine, ids[:, start : start + chunk], start), ["logits"])["logits"][0])
    return np.concatenate(results)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.sqrt(np.mean(np.square(expected))))


def random_ids(count: int) -> np.ndarray:
    return np.random.default_rng(2).integers(3, 127, (1, count))


def uncached(reference: Engine, ids: Sequence[int]) -> np.ndarray:
    """Logits of the plainly exported source, all tokens at once from an empty cache."""
    return reference.run(token_feed(reference, np.array([ids]), 0))["logits"][0]


def test_chunks_of_a_long_prompt_equal_the_whole(engine: Path) -> None:
    ids = random_ids(LONGEST)
    with effc.load(engine) as opened:
        whole = in_chunks(opened, ids, LONGEST)
        for chunk in (1000, 256, 37):
            assert relative(in_chunks(opened, ids, chunk), whole) < 1e-5, chunk


def test_a_long_generation_equals_the_computation_without_a_cache(engine: Path, model: Path) -> None:
    prompt = random_ids(50)[0].tolist()
    with effc.load(engine) as opened, effc.load(reference_engine(model)) as plain:
        (row,) = opened.generate([prompt], max_new_tokens=NEW)
        assert len(row.token_ids) == NEW
        ids = [*prompt, *row.token_ids]
        logits = uncached(plain, ids)
        assert relative(in_chunks(opened, np.array([ids]), 1), logits) < 1e-4
    before = logits[len(prompt) - 1 : -1]
    chosen = before[np.arange(NEW), row.token_ids]
    margin = 1e-4 * np.sqrt(np.mean(np.square(before)))
    assert (chosen >= before.max(axis=1) - margin).all()


def test_more_tokens_than_the_model_has_positions_for_are_refused(engine: Path) -> None:
    with effc.load(engine) as opened:
        with pytest.raises(effc.errors.UsageError, match="4097 tokens, the model takes at most 4096"):
            opened.generate([random_ids(LONGEST + 1)[0].tolist()])
        state = opened.new_state(1, max_length=8)
        with pytest.raises(effc.errors.UsageError, match="the cache holds at most 8 tokens, 9 were fed"):
            state.run(token_feed(opened, random_ids(9), 0), ["logits"])
