"""Engines that read a part of their cache, through the whole of `optimize` and `generate`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import effc
from effc.errors import ContractError, UsageError
from effc.runtime.cache_ports import cache_bytes
from effc.runtime.limits import token_limit
from effc.runtime.session import Engine
from effc.verify.steps import token_feed
from effc.verify.token_reads import measure_reads

VOCABULARY, LIMIT = 96, 160


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LIMIT, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def build(model: Path, folder: Path, passes: str, **options: object) -> Engine:
    effc.optimize(model, folder, passes=passes, **options)
    return effc.load(folder)


def logits(engine: Engine, ids: np.ndarray, prompt: int) -> np.ndarray:
    """Of a prompt and then token by token."""
    state, results = engine.new_state(len(ids), max_length=ids.shape[1]), []
    for start, stop in [(0, prompt), *((at, at + 1) for at in range(prompt, ids.shape[1]))]:
        results.append(state.run(token_feed(engine, ids[:, start:stop], start), ["logits"])["logits"])
    return np.concatenate(results, axis=1)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(8).integers(0, VOCABULARY, (2, 150))


@pytest.fixture(scope="module")
def dense(model: Path, tmp_path_factory: pytest.TempPathFactory, ids: np.ndarray) -> np.ndarray:
    return logits(build(model, tmp_path_factory.mktemp("dense") / "engine", ""), ids, 100)


@pytest.mark.parametrize(
    ("passes", "tolerance"),
    [
        ("sparse-attention{first=0,share=1.0}", 1e-5),
        ("sparse-attention{first=0,share=0.5}", 0.3),
        ("kv-cache{scheme=dense},sparse-attention{first=1,budget=32,recent=8}", 0.3),
        (
            "stored-weights{min-bytes=0},kv-cache{scheme=int8,page=16,recent=16},sparse-attention{first=0,share=0.5}",
            0.3,
        ),
        ("kv-cache{scheme=int4,page=16,recent=16},sparse-attention{first=0,share=0.5}", 0.5),
        ("sparse-attention{scheme=topk,first=0,share=0.5}", 0.3),
        ("kv-cache{scheme=int4,page=16,recent=16},sparse-attention{scheme=topk,first=0,share=0.5}", 0.5),
        ("sparse-attention{scheme=window,recent=200}", 1e-5),
        ("sparse-attention{scheme=window,recent=64}", 0.5),
        ("stored-weights{min-bytes=0},sparse-attention{scheme=window,recent=64,positions=cap}", 0.5),
        ("sparse-attention{scheme=evict,budget=150}", 1e-5),
        ("kv-cache{scheme=dense},sparse-attention{scheme=evict,budget=64,recent=16}", 0.3),
        ("sparse-attention{scheme=retain,budget=160}", 1e-5),
        (
            "stored-weights{min-bytes=0},cached-attention{rotary=inside},kv-cache{scheme=dense},"
            "sparse-attention{scheme=retain,budget=64}",
            0.5,
        ),
        ("sparse-attention{scheme=stride,recent=192}", 1e-5),
        ("sparse-attention{scheme=stride,recent=32,block=16,stride=3}", 0.3),
    ],
)
def test_close_to_dense(
    model: Path, dense: np.ndarray, ids: np.ndarray, tmp_path: Path, passes: str, tolerance: float
) -> None:
    found = logits(build(model, tmp_path / "engine", passes), ids, 100)
    error = np.sqrt(np.mean((found - dense) ** 2)) / np.sqrt(np.mean(dense**2))
    assert error < tolerance
    assert (error > 1e-6) == (tolerance > 1e-5)


@pytest.mark.parametrize(
    "passes",
    [
        "sparse-attention{scheme=stride,recent=32,block=16}",
        "sparse-attention{first=0,share=0.5}",
        "sparse-attention{scheme=window,recent=40}",
    ],
)
def test_portable_engines_compute_the_same(model: Path, ids: np.ndarray, tmp_path: Path, passes: str) -> None:
    native, portable = (build(model, tmp_path / str(one), passes, portable=one) for one in (False, True))
    np.testing.assert_allclose(logits(portable, ids, 100), logits(native, ids, 100), atol=2e-4)


@pytest.mark.parametrize("positions", ["compact", "cap"])
def test_an_endless_engine(model: Path, tmp_path: Path, positions: str) -> None:
    """Past the positions of the model in constant memory, and the same answers however far on the text is."""
    engine = build(model, tmp_path / "engine", f"sparse-attention{{scheme=window,recent=32,positions={positions}}}")
    assert engine.manifest.cache is not None
    assert engine.manifest.cache.endless
    assert token_limit(engine.manifest) is None
    sizes = [sum(cache_bytes(engine.manifest.cache, length).values()) for length in (1, 100, 100_000)]
    assert sizes[0] == sizes[1] == sizes[2] == 3 * 2 * 2 * (32 + 4) * 16 * 4
    out = engine.generate([[5, 6, 7]], max_new_tokens=3 * LIMIT)[0]
    assert len(out.token_ids) == 3 * LIMIT
    period = np.tile(np.random.default_rng(1).integers(0, VOCABULARY, 50), 20)[None]
    late = logits(engine, period, 1)[0]
    np.testing.assert_allclose(late[600:650], late[900:950], atol=2e-3)


def test_a_cache_of_constant_size(model: Path, tmp_path: Path) -> None:
    """Rows of different lengths, with padding, get what they get alone; the limit of the model stays."""
    engine = build(model, tmp_path / "engine", "sparse-attention{scheme=evict,budget=40,recent=8,block=8}")
    layout = engine.manifest.cache
    assert layout is not None
    assert token_limit(engine.manifest) == LIMIT
    sizes = {sum(cache_bytes(layout, length).values()) for length in (1, 100, 100_000)}
    assert sizes == {3 * 2 * (48 * (2 * 16 * 4 + 4) + 8 * 2 * 16 * 4)} == {3 * layout.layers[0]["bytes"]}
    prompts = [list(range(1, 90)), [5, 6, 7], list(range(20, 60))]
    together = engine.generate(prompts, max_new_tokens=60)
    assert [len(one.token_ids) for one in together] == [60] * 3
    for prompt, one in zip(prompts, together, strict=True):
        assert engine.generate([prompt], max_new_tokens=60)[0].token_ids == one.token_ids


def test_a_window_at_its_own_positions_is_not_endless(model: Path, tmp_path: Path) -> None:
    engine = build(model, tmp_path / "engine", "sparse-attention{scheme=window,recent=32,positions=keep}")
    assert token_limit(engine.manifest) == LIMIT
    assert len(engine.generate([[5, 6, 7]], max_new_tokens=LIMIT)[0].token_ids) == LIMIT - 2


def test_a_budget_that_is_broken(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="sparse-attention"):
        build(model, tmp_path / "engine", "sparse-attention{scheme=window,recent=4,sinks=1}", budget="max-rel=0.001")
    assert not (tmp_path / "engine").exists()


READING = {
    "pages": "share=0.25,recent=8",
    "topk": "share=0.25,recent=8",
    "window": "recent=48",
    "evict": "budget=40,recent=8",
    "retain": "budget=40,recent=8",
    "stride": "recent=16,block=8,stride=4,middle=true",
}


ENDLESS = ("window", "retain")
"""Of all layers; nothing in the middle is read, as `retain` is told nothing of what tokens are worth."""


@pytest.mark.parametrize("scheme", READING)
def test_what_decoding_reads_is_told(model: Path, tmp_path: Path, scheme: str) -> None:
    options = READING[scheme]
    first = 0 if scheme in ENDLESS else 1
    engine = build(model, tmp_path / "engine", f"sparse-attention{{scheme={scheme},first={first},{options}}}")
    found = measure_reads(engine, list(range(5, 45)) * 3, steps=20)
    assert (found["tokens"], found["steps"], len(found["layers"])) == (120, 20, 3)
    for index, layer in enumerate(found["layers"]):
        assert len(layer["heads"]) == 2
        assert len(layer["map"]) == 120
        if index < first:
            assert layer["heads"] == layer["map"][:1] * 2 == [1.0, 1.0]
            continue
        assert 0.2 < layer["least"] <= min(layer["heads"]) <= max(layer["heads"]) <= layer["most"] < 0.6
        assert layer["map"][:4] == [1.0] * 4
        assert layer["map"][-1] == 1.0
    middle = np.array(found["layers"][-1]["map"][4:50])
    assert (middle.max() == 0) == (scheme in ENDLESS)


def test_reads_are_known_of_our_kernels_only(model: Path, tmp_path: Path) -> None:
    plain = build(model, tmp_path / "engine", "", portable=True)
    with pytest.raises(UsageError, match="onnxruntime's own operators"):
        measure_reads(plain, list(range(90)))
    with pytest.raises(UsageError, match="has 20 tokens, more than 32"):
        measure_reads(plain, list(range(20)))
