"""Prefixes of low rank, through the whole of `optimize`, `prefix` and `generate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import effc
from effc.errors import EffcError, EngineError, UsageError
from effc.kernels.read_log import logged_reads
from effc.runtime.prefix_folder import MANIFEST
from effc.runtime.session import Engine
from effc.verify.steps import token_feed

LENGTH, NEW = 203, 20
REDUCED = (LENGTH // 8 - 4) * 8
"""Tokens of the prefix that inputs stand for."""
ELEMENTS = 2 * 16
"""Of the keys of a token."""
PASSES = {
    "float32": "sparse-attention{scheme=lowrank,share=1}",
    "bfloat16": "kv-cache{scheme=dense},sparse-attention{scheme=lowrank,share=1}",
    "part": "stored-weights{min-bytes=0},sparse-attention{scheme=lowrank,share=1,first=1}",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def built(model: Path, place: Path, passes: str) -> Path:
    effc.optimize(model, place, passes=passes, check=False)
    return place


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine in float32 that reads four chunks in every layer."""
    return built(model, tmp_path_factory.mktemp("engines") / "plain", "sparse-attention{scheme=lowrank,budget=32}")


def random_ids(count: int, seed: int = 2) -> list[int]:
    return np.random.default_rng(seed).integers(3, 127, count).tolist()


PROMPTS = [random_ids(count, index) for index, count in enumerate((5, 1, 40, 5, 1))]


def tokens(engine: Engine, prompts: Sequence[Sequence[int]], **options: object) -> list[list[int]]:
    return [row.token_ids for row in engine.generate(prompts, max_new_tokens=NEW, **options)]


def step_logits(engine: Engine, prefix: Path | None, ids: Sequence[int]) -> np.ndarray:
    """Logits [tokens, vocabulary] of ids that are read one by one after a prefix."""
    state = engine.new_state(1)
    if prefix is not None:
        opened = engine.open_prefix(prefix)
        state.restore(opened.tensors, opened.length, opened.inputs)
    else:
        state.run(token_feed(engine, np.array([random_ids(LENGTH)]), 0), [])
    feeds = (token_feed(engine, np.array([[one]]), LENGTH + at) for at, one in enumerate(ids))
    return np.concatenate([state.run(feed, ["logits"])["logits"][0] for feed in feeds])


@pytest.mark.parametrize("name", PASSES)
def test_full_rank_changes_no_token(model: Path, tmp_path: Path, name: str) -> None:
    with effc.load(built(model, tmp_path / "engine", PASSES[name])) as engine:
        engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix", rank=ELEMENTS)
        found = tokens(engine, PROMPTS, prefix=tmp_path / "prefix")
        whole = [tokens(engine, [[*random_ids(LENGTH), *one]], prefill_chunk=LENGTH)[0] for one in PROMPTS]
        assert found == whole


def test_a_larger_rank_is_closer(model: Path, tmp_path: Path) -> None:
    ids, errors = random_ids(30, 5), []
    with effc.load(built(model, tmp_path / "engine", PASSES["float32"])) as engine:
        whole = step_logits(engine, None, ids)
        for rank in (8, 24, ELEMENTS):
            engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix", rank=rank, outliers=0)
            found = step_logits(engine, tmp_path / "prefix", ids)
            errors.append(float(np.sqrt(np.mean((found - whole) ** 2) / np.mean(whole**2))))
    assert errors[0] > 1.2 * errors[1] > 10 * errors[2]
    assert errors[2] < 1e-4


def test_outliers_of_all_chunks_keep_every_key(plain: Path, tmp_path: Path) -> None:
    ids = random_ids(20, 5)
    with effc.load(plain) as engine:
        engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix", rank=1, outliers=1000)
        found = step_logits(engine, tmp_path / "prefix", ids)
        np.testing.assert_allclose(found, step_logits(engine, None, ids), atol=1e-4)


def test_steps_read_the_budget_and_what_follows(plain: Path, tmp_path: Path) -> None:
    with effc.load(plain) as engine:
        engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix", outliers=2)
        with logged_reads() as found:
            step_logits(engine, tmp_path / "prefix", random_ids(12, 5))
    assert len(found) == 12 * 3 * 2
    for one in found:
        seen = np.zeros(one.tokens, bool)
        for begin, end in one.runs:
            seen[begin:end] = True
        assert seen[REDUCED:].all()
        assert seen[:REDUCED].sum() == 32 + 2 * 8


@pytest.mark.parametrize("length", [1, 8, 39, 40, 41, 47])
def test_short_prefixes(plain: Path, tmp_path: Path, length: int) -> None:
    """Nothing is replaced, or one chunk, which is an outlier."""
    with effc.load(plain) as engine:
        engine.write_prefix(random_ids(length), tmp_path / "prefix", outliers=1)
        found = tokens(engine, PROMPTS, prefix=tmp_path / "prefix")
        assert found == [tokens(engine, [[*random_ids(length), *one]])[0] for one in PROMPTS]


def test_batches(plain: Path, tmp_path: Path) -> None:
    with effc.load(plain) as engine:
        engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix")
        together = tokens(engine, PROMPTS, prefix=tmp_path / "prefix")
        assert together == [tokens(engine, [prompt], prefix=tmp_path / "prefix")[0] for prompt in PROMPTS]


def test_what_the_folder_says(plain: Path, tmp_path: Path) -> None:
    with effc.load(plain) as engine:
        engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix", rank=12, outliers=3)
        again = tmp_path / "again"
        engine.write_prefix(random_ids(LENGTH), again, rank=12, outliers=3)
    found = json.loads((tmp_path / "prefix" / MANIFEST).read_text())["tensors"]
    shapes = {one["name"]: one["shape"] for one in found}
    assert shapes["lowrank.2.tokens"] == [1, REDUCED, 12]
    assert shapes["lowrank.2.basis"] == [1, 2, 16, 12]
    assert shapes["lowrank.2.values"] == [1, 2, REDUCED, 16]
    assert shapes["lowrank.2.landmarks"] == [1, 2, REDUCED // 8, 16]
    assert shapes["lowrank.2.outliers"] == [1, 2, 3]
    assert shapes["lowrank.2.outlier_keys"] == [1, 2, 3, 8, 16]
    assert shapes["past_key_values.2.key"] == [1, 2, LENGTH - REDUCED, 16]
    assert (tmp_path / "prefix" / "prefix.bin").read_bytes() == (again / "prefix.bin").read_bytes()


def test_a_folder_that_does_not_fit_is_refused(plain: Path, tmp_path: Path) -> None:
    with effc.load(plain) as engine:
        engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix")
        path = tmp_path / "prefix" / MANIFEST
        content = json.loads(path.read_text())
        for tensor in content["tensors"]:
            if tensor["name"] == "past_key_values.1.key":
                tensor["shape"][2], tensor["shape"][3] = tensor["shape"][3], tensor["shape"][2]
        path.write_text(json.dumps(content))
        with pytest.raises(EngineError, match=r"'past_key_values.1.key' is .* the engine has"):
            engine.open_prefix(tmp_path / "prefix")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "rank is 0; give at least 1"), ({"outliers": -1}, "outliers is -1; give at least 0")],
    ids=str,
)
def test_options_out_of_range_are_refused(plain: Path, tmp_path: Path, options: dict[str, int], message: str) -> None:
    with effc.load(plain) as engine, pytest.raises(UsageError, match=message):
        engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix", **options)


def test_an_engine_without_it_takes_no_rank(model: Path, tmp_path: Path) -> None:
    built(model, tmp_path / "engine", "")
    message = "Leave rank and outliers out, or build the engine with"
    with effc.load(tmp_path / "engine") as engine, pytest.raises(UsageError, match=message):
        engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix", rank=3, outliers=9)


def test_a_prefix_longer_than_its_angles_is_refused(model: Path, tmp_path: Path) -> None:
    passes = "sparse-attention{scheme=lowrank,longest=100}"
    with effc.load(built(model, tmp_path / "engine", passes)) as engine:
        with pytest.raises(UsageError, match=r"takes 100 tokens of a prefix of low rank, 168 were given"):
            engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix")
        engine.write_prefix(random_ids(135), tmp_path / "prefix")


def test_a_portable_engine_cannot_have_it(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EffcError, match=r"selection=lowrank has no body in .* pass sparse-attention out"):
        effc.optimize(model, tmp_path / "engine", passes=PASSES["float32"], portable=True)


def test_a_plain_run_has_no_prefix(plain: Path, model: Path, tmp_path: Path) -> None:
    with effc.load(plain) as engine, effc.load(built(model, tmp_path / "engine", "")) as dense:
        feeds = token_feed(engine, np.array([random_ids(50)]), 0)
        found, wanted = (one.run(feeds)["logits"] for one in (engine, dense))
        np.testing.assert_allclose(found, wanted, atol=1e-4)
