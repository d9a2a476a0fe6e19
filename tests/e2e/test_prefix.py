"""A prefix computed once against the same tokens read again, for every form of the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import effc
from effc.runtime.kv_state import KvState
from effc.runtime.session import Engine
from effc.verify.steps import token_feed

LENGTH, NEW = 150, 24
"""Tokens of the prefix: more than two pages, a window and a block, and no multiple of any."""
PROMPTS = (5, 1, 40, 5, 1)
SMALL = "page=32,recent=16"


@dataclass(frozen=True)
class Form:
    """One form of the cache.

    Attributes:
        passes: Pipeline.
        model: `full` or `window`, where two layers of three see 64 tokens.
        portable: Standard ops, with a growing cache.
        calibrate: Whether a pass needs real inputs.
    """

    passes: str = ""
    model: str = "full"
    portable: bool = False
    calibrate: bool = False

    def __str__(self) -> str:
        return f"{self.model}{'-portable' if self.portable else ''}-{self.passes or 'plain'}"


EXACT = (Form(), Form(model="window"), Form(portable=True), Form(model="window", portable=True))
"""Whose cache holds float32: reading in two runs or one gives the same tokens."""
FORMS = (
    *EXACT,
    Form("kv-cache{scheme=dense}", "window"),
    Form("kv-cache{scheme=dense,dtype=float16}"),
    *(Form(f"kv-cache{{scheme={scheme},{SMALL}}}") for scheme in ("int8", "int4", "kivi", "zipcache", "mikv")),
    Form(f"kv-cache{{scheme=zipcache,{SMALL}}}", "window"),
    Form("kv-cache{scheme=int8,page=16,recent=0,window-layers=quantize}", "window"),
    Form("sparse-attention{budget=32,block=8,first=0}"),
    Form(f"kv-cache{{scheme=int4,{SMALL}}},sparse-attention{{budget=32,first=0}}"),
    Form("kv-cache{scheme=dense},sparse-attention{budget=32,first=0}", "window"),
    Form("kv-cache{scheme=dense},sparse-attention{scheme=evict,budget=32,recent=8}"),
    Form("kv-cache{scheme=int8,native=true}", calibrate=True),
    Form("kv-cache{scheme=int4,native=true}", calibrate=True),
    Form("kv-cache{scheme=int8,native=true}", portable=True, calibrate=True),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and calibration data."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    place = tmp_path_factory.mktemp("models")
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)).save_pretrained(place / "full")
    windows = {"head_dim": 16, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
    config = Gemma3TextConfig(num_hidden_layers=3, query_pre_attn_scalar=16, **sizes, **windows)
    Gemma3ForCausalLM(config).save_pretrained(place / "window")
    ids = np.random.default_rng(1).integers(3, 127, (3, 64)).tolist()
    (place / "data.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return place


@pytest.fixture(scope="module", params=FORMS, ids=str)
def built(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Form, Path]:
    """A form and its engine."""
    form = request.param
    return form, build(form, folder, tmp_path_factory.mktemp("engines") / "engine")


def build(form: Form, folder: Path, output: Path) -> Path:
    data = folder / "data.jsonl" if form.calibrate else None
    effc.optimize(folder / form.model, output, passes=form.passes, portable=form.portable, calibrate=data, check=False)
    return output


def random_ids(count: int, seed: int = 2) -> list[int]:
    return np.random.default_rng(seed).integers(3, 127, count).tolist()


def tokens(engine: Engine, prompts: Sequence[Sequence[int]], **options: object) -> list[list[int]]:
    return [row.token_ids for row in engine.generate(prompts, max_new_tokens=NEW, **options)]


def logits(engine: Engine, state: KvState, ids: Sequence[int]) -> np.ndarray:
    """Logits [rows, tokens, vocabulary] of the same tokens in every row, appended to a state."""
    rows = state.batch
    return state.run(token_feed(engine, np.array([ids] * rows), state.length), ["logits"])["logits"]


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_run_goes_on_from_a_prefix_as_from_the_tokens_themselves(built: tuple[Form, Path], tmp_path: Path) -> None:
    form, folder = built
    start = random_ids(LENGTH)
    prompts = [random_ids(count, index) for index, count in enumerate(PROMPTS)]
    with effc.load(folder) as engine:
        assert engine.cache_layout().mode == ("growing" if form.portable else "in-place")
        engine.write_prefix(start, tmp_path / "prefix")
        before = digest(tmp_path / "prefix")
        found = tokens(engine, prompts, prefix=tmp_path / "prefix")
        assert found == [tokens(engine, [[*start, *one]], prefill_chunk=LENGTH)[0] for one in prompts]
        opened = engine.open_prefix(tmp_path / "prefix")
        assert found == tokens(engine, prompts, prefix=opened) == tokens(engine, prompts, prefix=opened)
        assert digest(tmp_path / "prefix") == before
        if form in EXACT:
            assert found == tokens(engine, [[*start, *one] for one in prompts])


def test_a_restored_cache_gives_the_same_bits(built: tuple[Form, Path], tmp_path: Path) -> None:
    ids = random_ids(LENGTH + 60)
    with effc.load(built[1]) as engine:
        engine.write_prefix(ids[:LENGTH], tmp_path / "prefix")
        prefix = engine.open_prefix(tmp_path / "prefix")
        read, restored, both = (engine.new_state(rows) for rows in (1, 1, 2))
        logits(engine, read, ids[:LENGTH])
        for state in (restored, both):
            state.restore(prefix.tensors, LENGTH)
        for begin, end in [(LENGTH, LENGTH + 17), *((at, at + 1) for at in range(LENGTH + 17, LENGTH + 60))]:
            expected = logits(engine, read, ids[begin:end])
            assert np.array_equal(logits(engine, restored, ids[begin:end]), expected)
            twice = logits(engine, both, ids[begin:end])
            assert np.array_equal(twice[0], twice[1])
            np.testing.assert_allclose(twice[:1], expected, atol=1e-4)


@pytest.mark.parametrize("form", [Form(f"kv-cache{{scheme=zipcache,{SMALL}}}", "window"), Form(portable=True)], ids=str)
def test_short_prefixes_and_an_odd_capacity(form: Form, folder: Path, tmp_path: Path) -> None:
    ids = random_ids(100)
    with effc.load(build(form, folder, tmp_path / "engine")) as engine:
        for length in (1, 2, 63, 64, 65):
            engine.write_prefix(ids[:length], tmp_path / "prefix", prefill_chunk=64)
            prefix = engine.open_prefix(tmp_path / "prefix", check=False)
            read, restored = engine.new_state(1), engine.new_state(1, max_length=length + 9)
            for begin in range(0, length, 64):
                logits(engine, read, ids[begin : min(begin + 64, length)])
            restored.restore(prefix.tensors, length)
            new = ids[length : length + 9]
            assert np.array_equal(logits(engine, restored, new), logits(engine, read, new))
