"""Prefixes whose keys are clustered, through the whole of `optimize`, `prefix` and `generate`."""

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

LENGTH, OBSERVED, NEW = 180, 20, 24
CLUSTERS = f"sparse-attention{{scheme=clusters,recent={OBSERVED}}}"
PASSES = {
    "float32": CLUSTERS,
    "bfloat16": f"kv-cache{{scheme=dense}},{CLUSTERS}",
    "float16": f"kv-cache{{scheme=dense,dtype=float16}},{CLUSTERS}",
    "part": f"stored-weights{{min-bytes=0}},sparse-attention{{scheme=clusters,recent={OBSERVED},first=1}}",
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
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=PASSES)
def folder(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine that reads clusters."""
    place = tmp_path_factory.mktemp("engines") / "engine"
    effc.optimize(model, place, passes=PASSES[request.param])
    return place


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine in float32 that reads clusters in every layer."""
    place = tmp_path_factory.mktemp("engines") / "plain"
    effc.optimize(model, place, passes=CLUSTERS, check=False)
    return place


def random_ids(count: int, seed: int = 2) -> list[int]:
    return np.random.default_rng(seed).integers(3, 127, count).tolist()


PROMPTS = [random_ids(count, index) for index, count in enumerate((5, 1, 40, 5, 1))]


def tokens(engine: Engine, prompts: Sequence[Sequence[int]], **options: object) -> list[list[int]]:
    return [row.token_ids for row in engine.generate(prompts, max_new_tokens=NEW, **options)]


def step_logits(engine: Engine, prefix: Path | None, ids: Sequence[int], rows: int = 1) -> np.ndarray:
    """Logits [tokens, vocabulary] of ids that are read one by one after a prefix; the same in every row."""
    state = engine.new_state(rows)
    if prefix is not None:
        opened = engine.open_prefix(prefix)
        state.restore(opened.tensors, opened.length, opened.inputs)
    else:
        state.run(token_feed(engine, np.array([random_ids(LENGTH)] * rows), 0), [])
    found = []
    for one in ids:
        found.append(state.run(token_feed(engine, np.array([[one]] * rows), state.length), ["logits"])["logits"])
    joined = np.concatenate(found, axis=1)
    np.testing.assert_allclose(joined, np.broadcast_to(joined[:1], joined.shape), atol=1e-4)
    return joined[0]


def test_a_prefix_that_keeps_everything_changes_no_token(folder: Path, tmp_path: Path) -> None:
    with effc.load(folder) as engine:
        engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix", keep=1)
        found = tokens(engine, PROMPTS, prefix=tmp_path / "prefix")
        whole = [tokens(engine, [[*random_ids(LENGTH), *one]], prefill_chunk=LENGTH)[0] for one in PROMPTS]
        assert found == whole


def test_a_prefix_that_keeps_more_is_closer(folder: Path, tmp_path: Path) -> None:
    ids, errors = random_ids(30, 5), []
    with effc.load(folder) as engine:
        whole = step_logits(engine, None, ids)
        for keep in (0.1, 0.6, 1):
            engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix", keep=keep)
            found = step_logits(engine, tmp_path / "prefix", ids)
            assert np.isfinite(found).all()
            errors.append(float(np.sqrt(np.mean((found - whole) ** 2) / np.mean(whole**2))))
    assert errors[0] > 1.2 * errors[1] > 10 * errors[2]
    assert errors[2] < 1e-4


@pytest.mark.parametrize("keep", [0.1, 0.3, 1.0])
def test_steps_read_about_the_share_that_was_asked_for(plain: Path, tmp_path: Path, keep: float) -> None:
    """And all tokens from the observed ones on; on random weights a token is like the last ones of the prefix."""
    clustered = LENGTH - OBSERVED
    with effc.load(plain) as engine:
        engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix", keep=keep)
        with logged_reads() as found:
            step_logits(engine, tmp_path / "prefix", random_ids(40, 5))
    assert len(found) == 40 * 3 * 2
    shares = []
    for one in found:
        seen = np.zeros(one.tokens, bool)
        for begin, end in one.runs:
            seen[begin:end] = True
        assert seen[clustered:].all()
        shares.append(seen[:clustered].mean())
    assert 0.7 * keep < np.mean(shares) <= min(1, 1.4 * keep)
    assert (np.std(shares) > 0.01) == (keep < 1)


def test_smaller_clusters_are_closer(plain: Path, tmp_path: Path) -> None:
    ids, errors = random_ids(30, 5), []
    with effc.load(plain) as engine:
        whole = step_logits(engine, None, ids)
        for size in (40, 1):
            engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix", keep=0.5, cluster_tokens=size)
            errors.append(np.abs(step_logits(engine, tmp_path / "prefix", ids) - whole).mean())
    assert errors[1] < 0.8 * errors[0]


def test_rows_share_a_prefix(plain: Path, tmp_path: Path) -> None:
    with effc.load(plain) as engine:
        engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix")
        one, three = (step_logits(engine, tmp_path / "prefix", random_ids(20, 5), rows) for rows in (1, 3))
        np.testing.assert_allclose(three, one, atol=1e-4)
        together = tokens(engine, PROMPTS, prefix=tmp_path / "prefix")
        assert together == [tokens(engine, [prompt], prefix=tmp_path / "prefix")[0] for prompt in PROMPTS]


@pytest.mark.parametrize("length", [1, OBSERVED - 1, OBSERVED, OBSERVED + 1, OBSERVED + 7])
def test_short_prefixes(plain: Path, tmp_path: Path, length: int) -> None:
    """Nothing, or little, is clustered; one cluster is read or left as a whole."""
    with effc.load(plain) as engine:
        engine.write_prefix(random_ids(length), tmp_path / "prefix", keep=1 if length > OBSERVED else 0.1)
        found = tokens(engine, PROMPTS, prefix=tmp_path / "prefix")
        assert found == [tokens(engine, [[*random_ids(length), *one]])[0] for one in PROMPTS]


def test_prompts_are_shortened_after_a_prefix(model: Path, tmp_path: Path) -> None:
    found = []
    for name, selection in (("dense", ""), ("clusters", f",{CLUSTERS}")):
        effc.optimize(
            model, tmp_path / name, passes=f"prompt-filter{{layer=1,keep=16,forced=3}}{selection}", check=False
        )
        with effc.load(tmp_path / name) as engine:
            options = {"keep": 1.0} if selection else {}
            engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix", **options)
            (result,) = engine.generate([random_ids(60, 9)], max_new_tokens=NEW, prefix=tmp_path / "prefix")
            assert result.kept_tokens == 16
            found.append(result.token_ids)
    assert found[0] == found[1]


def test_a_prefix_is_the_same_each_time(plain: Path, tmp_path: Path) -> None:
    with effc.load(plain) as engine:
        for name in ("one", "two"):
            engine.write_prefix(random_ids(LENGTH), tmp_path / name)
    assert (tmp_path / "one" / "prefix.bin").read_bytes() == (tmp_path / "two" / "prefix.bin").read_bytes()


def test_what_the_folder_says(plain: Path, tmp_path: Path) -> None:
    with effc.load(plain) as engine:
        result = engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix")
        assert result["tokens"] == LENGTH
    found = json.loads((tmp_path / "prefix" / MANIFEST).read_text())["tensors"]
    shapes = {one["name"]: (one["dtype"], one["shape"]) for one in found if one["role"] == "inputs"}
    assert shapes["clusters.thresholds"] == ("float32", [2])
    assert shapes["clusters.2.centroids"] == ("float32", [1, 2, 16, 16])
    assert shapes["clusters.2.ends"] == ("int32", [1, 2, 16])
    assert shapes["clusters.2.radii"] == ("float32", [1, 2, 16])
    assert shapes["clusters.2.parents"] == ("float32", [1, 2, 3, 16])
    assert shapes["clusters.2.parent_ends"] == ("int32", [1, 2, 3])
    assert shapes["clusters.2.parent_radii"] == ("float32", [1, 2, 3])
    assert len(shapes) == 19


def test_a_damaged_folder_is_refused(plain: Path, tmp_path: Path) -> None:
    with effc.load(plain) as engine:
        engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix")
        path = tmp_path / "prefix" / MANIFEST
        content = json.loads(path.read_text())
        content["tensors"] = [one for one in content["tensors"] if one["name"] != "clusters.1.ends"]
        path.write_text(json.dumps(content))
        with pytest.raises(EngineError, match=r"not those of the engine: input 'clusters.1.ends' is missing"):
            engine.open_prefix(tmp_path / "prefix")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"keep": keep}, "keep is .*; give a share above 0") for keep in (0.0, -1.0, 1.5, float("nan"))),
        ({"cluster_tokens": 0}, "cluster_tokens is 0; give at least 1"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(plain: Path, tmp_path: Path, options: dict[str, float], message: str) -> None:
    with effc.load(plain) as engine, pytest.raises(UsageError, match=message):
        engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix", **options)


def test_an_engine_without_clusters_keeps_everything(model: Path, tmp_path: Path) -> None:
    effc.optimize(model, tmp_path / "engine", check=False)
    with effc.load(tmp_path / "engine") as engine:
        with pytest.raises(UsageError, match="reads no clusters of a prefix"):
            engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix", keep=0.5)
        with pytest.raises(UsageError, match="Leave keep and cluster_tokens out"):
            engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix", keep=0.5, cluster_tokens=9)
        engine.write_prefix(random_ids(LENGTH), tmp_path / "prefix")


def test_a_portable_engine_cannot_have_them(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EffcError, match=r"selection=clusters has no body in .* pass sparse-attention out"):
        effc.optimize(model, tmp_path / "engine", passes=CLUSTERS, portable=True)


def test_a_plain_run_feeds_no_clusters(plain: Path, model: Path, tmp_path: Path) -> None:
    effc.optimize(model, tmp_path / "engine", check=False)
    with effc.load(plain) as engine, effc.load(tmp_path / "engine") as dense:
        feeds = token_feed(engine, np.array([random_ids(50)]), 0)
        found, wanted = (one.run(feeds)["logits"] for one in (engine, dense))
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        fed = feeds | {"clusters.thresholds": np.zeros(2, np.float32)}
        with pytest.raises(UsageError, match=r"unknown input 'clusters.thresholds'"):
            engine.run(fed)
