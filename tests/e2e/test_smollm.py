"""SmolLM2 135M, a real language model whose 30 layers all see everything: it finds what a long text hides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import effc
from effc.runtime.session import Engine
from effc.verify.passkey import answer
from effc.verify.passkey_prompt import PasskeyTask, Prompt, make_prompt
from effc.verify.steps import token_feed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dense(smollm_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("dense") / "engine"
    effc.optimize(smollm_gguf, folder, passes="cached-attention", check=False)
    with effc.load(folder) as engine:
        yield engine


def _prompt(engine: Engine, length: int, depth: int) -> Prompt:
    def encode(text: str) -> list[int]:
        return engine.tokenizer.encode(text, add_special_tokens=False)

    return make_prompt(encode, None, PasskeyTask([length]), length, depth, 0)


@pytest.mark.parametrize("depth", [0, 50, 100])
def test_finds_a_pass_key(depth: int, dense: Engine) -> None:
    found = answer(dense, _prompt(dense, 2048, depth))
    assert found.exact
    assert found.log_probability > -0.5


def test_logits_are_those_of_torch(dense: Engine, smollm_gguf: Path) -> None:
    """Within what rounding adds up to in 30 layers; torch reads the prompt at once, the engine in pieces."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        smollm_gguf.parent, gguf_file=smollm_gguf.name, quantization_config=GgufConfig(dequantize=True)
    )
    for weight in model.parameters():
        if weight.ndim == 2:  # The frontend stores blocks of quantised weights as bfloat16, and norms as they are.
            weight.data = weight.data.to(torch.bfloat16).float()
    ids = np.array([_prompt(dense, 700, 25).ids], np.int64)
    with torch.no_grad():
        expected = model.float()(torch.from_numpy(ids)).logits[0].numpy()
    state = dense.new_state(1, max_length=ids.shape[1])
    found = np.concatenate(
        [
            state.run(token_feed(dense, ids[:, start : start + 97], start), ["logits"])["logits"][0]
            for start in range(0, ids.shape[1], 97)
        ]
    )
    assert np.abs(found - expected).max() < 1e-4 * np.sqrt(np.mean(np.square(expected)))
