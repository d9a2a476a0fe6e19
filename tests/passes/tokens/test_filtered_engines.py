"""Engines that shorten prompts: scores against torch's hidden states, generation, shared weights, combinations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import effc
from effc import kernels
from effc.errors import ContractError, EngineError, UsageError
from effc.runtime.kv_state import KvState
from effc.runtime.prefix import Prefix
from effc.runtime.prompt_filter import choose_tokens, fixed_places
from effc.runtime.session import Engine
from effc.verify.bench_worker import Worker
from effc.verify.passkey import answer
from effc.verify.passkey_prompt import Prompt

LAYER, KEEP, FORCED, HEADS, KV_HEADS, SIZE, VOCAB = 2, 16, 3, 4, 2, 32, 64
FILTER = f"prompt-filter{{layer={LAYER},keep={KEEP},forced={FORCED}}}"
LOSSLESS = "lossless-weights{min-bytes=0}"
PIPELINES = {
    "plain": FILTER,
    "rotating": "cached-attention{rotary=inside}," + FILTER,
    "zero": FILTER.replace("}", ",padding=zero}"),
    "lossless": f"{LOSSLESS},{FILTER}",
    "int8 before": "kv-cache{scheme=int8,sinks=0,recent=0,page=16}," + FILTER,
    "int8 after": FILTER + ",kv-cache{scheme=int8,sinks=0,recent=0,page=16}",
    "native int8": FILTER + ",kv-cache{scheme=int8,native=true}",
    "zipcache": FILTER + ",kv-cache{scheme=zipcache,sinks=0,recent=4,page=16}",
    "pages": FILTER + ",sparse-attention{budget=16,sinks=1,recent=1,block=4}",
    "clusters": FILTER + ",sparse-attention{scheme=clusters,recent=32}",
    "fused": f"fuse,{FILTER}",
}
ENDLESS = "cached-attention{rotary=inside}," + FILTER + ",sparse-attention{scheme=window,sinks=2,recent=24}"
IDS = np.random.default_rng(1).integers(0, VOCAB, 31).tolist()

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four layers in bfloat16, its weights so large that tokens differ, and inputs beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=SIZE, max_position_embeddings=64, initializer_range=0.2,
        eos_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama") / "model"
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    (folder.parent / "data.jsonl").write_text(json.dumps({"input_ids": IDS}) + "\n")
    return folder


@pytest.fixture(scope="module")
def build(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Engine folder of a pipeline, made once."""
    made: dict[tuple[str, bool], Path] = {}

    def engine(passes: str, *, portable: bool = False) -> Path:
        if (passes, portable) not in made:
            folder = tmp_path_factory.mktemp("engine") / "e"
            calibrate = model.parent / "data.jsonl" if "native" in passes else None
            effc.optimize(model, folder, passes=passes, portable=portable, calibrate=calibrate)
            made[passes, portable] = folder
        return made[passes, portable]

    return engine


@pytest.fixture(scope="module")
def raw_scores(model: Path) -> Callable[[list[int]], np.ndarray]:
    """Dots of the last query with every key at the filter layer, from torch's hidden states, one head at a time."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch_model = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.no_grad()
    def scores(ids: list[int]) -> np.ndarray:
        inner = torch_model.model
        hidden = inner(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER]
        layer = inner.layers[LAYER]
        x, attention = layer.input_layernorm(hidden), layer.self_attn
        q = attention.q_proj(x).view(1, len(ids), HEADS, SIZE).transpose(1, 2)
        k = attention.k_proj(x).view(1, len(ids), KV_HEADS, SIZE).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *inner.rotary_emb(x, torch.arange(len(ids))[None]))
        return sum((k[0, head * KV_HEADS // HEADS] @ q[0, head, -1]).numpy() for head in range(HEADS))

    return scores


def mean_of_five(raw: np.ndarray, zero: bool) -> np.ndarray:
    parts = [raw[max(0, place - 2) : place + 3] for place in range(len(raw))]
    return np.array([part.sum() / (5 if zero else len(part)) for part in parts])


def filter_scores(engine: Engine, ids: list[int], prefix: Prefix | None = None) -> np.ndarray:
    assert engine._prompt_filter is not None
    return engine._prompt_filter.scores(ids, prefix)


def tolerance(passes: str) -> float:
    """What storing the keys and values below the filter layer in few bits may change of scores up to 25."""
    return 3.0 if "native" in passes else 1.0 if "kv-cache" in passes else 1e-4


def pipelines() -> Iterator[Any]:
    for name, text in PIPELINES.items():
        yield pytest.param(text, False, id=name)
    for name in ("plain", "lossless", "zero", "native int8"):
        yield pytest.param(PIPELINES[name], True, id=f"portable {name}")


@pytest.mark.parametrize(("passes", "portable"), list(pipelines()))
def test_an_engine_reads_what_its_filter_keeps(
    build: Build, raw_scores: Callable[[list[int]], np.ndarray], passes: str, portable: bool
) -> None:
    with effc.load(build(passes, portable=portable)) as engine:
        for count in (KEEP + 1, len(IDS)):
            ids = IDS[:count]
            expected = mean_of_five(raw_scores(ids), "padding=zero" in passes)
            found = filter_scores(engine, ids)
            np.testing.assert_allclose(found, expected, atol=tolerance(passes))
        kept = engine.shortened(IDS)
        assert kept == [IDS[place] for place in choose_tokens(found, KEEP, fixed_places(len(IDS), FORCED, True))]
        assert (len(kept), kept[0], kept[-FORCED:]) == (KEEP, IDS[0], IDS[-FORCED:])
        (result,) = engine.generate([IDS], max_new_tokens=6)
        (direct,) = engine.generate([kept], max_new_tokens=6, filter_prompt=False)
        assert (result.token_ids, result.prompt_tokens, result.kept_tokens) == (direct.token_ids, len(IDS), KEEP)
        (whole,) = engine.generate([IDS], max_new_tokens=6, filter_prompt=False)
        assert whole.kept_tokens == len(IDS)
        assert whole.token_ids != result.token_ids


@pytest.mark.parametrize(("passes", "portable"), list(pipelines()))
def test_what_follows_a_prefix_is_shortened_where_it_stands(
    build: Build, raw_scores: Callable[[list[int]], np.ndarray], tmp_path: Path, passes: str, portable: bool
) -> None:
    start = IDS[::-1][:19]
    with effc.load(build(passes, portable=portable)) as engine:
        engine.write_prefix(start, tmp_path / "prefix")
        prefix = engine.open_prefix(tmp_path / "prefix")
        found = filter_scores(engine, IDS, prefix)
        expected = mean_of_five(raw_scores([*start, *IDS])[len(start) :], "padding=zero" in passes)
        np.testing.assert_allclose(found, expected, atol=tolerance(passes))
        assert not np.allclose(found, filter_scores(engine, IDS), atol=2.0)
        kept = engine.shortened(IDS, prefix)
        assert kept == [IDS[place] for place in choose_tokens(found, KEEP, range(len(IDS) - FORCED, len(IDS)))]
        results = engine.generate([IDS, IDS[:KEEP], IDS[:5]], max_new_tokens=6, prefix=tmp_path / "prefix")
        assert [one.kept_tokens for one in results] == [KEEP, KEEP, 5]
        assert [one.prompt_tokens for one in results] == [len(IDS), KEEP, 5]
        assert {one.prefix_tokens for one in results} == {len(start)}
        whole = {"max_new_tokens": 6, "filter_prompt": False}
        for result, read in zip(results, (kept, IDS[:KEEP], IDS[:5]), strict=True):
            (direct,) = engine.generate([[*start, *read]], prefill_chunk=len(start), **whole)
            assert result.token_ids == direct.token_ids
        (unfiltered,) = engine.generate([IDS], prefix=prefix, **whole)
        assert (unfiltered.kept_tokens, unfiltered.prefix_tokens) == (len(IDS), len(start))
        assert unfiltered.token_ids != results[0].token_ids


def test_a_prefix_of_another_engine_is_refused(build: Build, tmp_path: Path) -> None:
    with effc.load(build(PIPELINES["zero"])) as other:
        other.write_prefix(IDS, tmp_path / "prefix")
        prefix = other.open_prefix(tmp_path / "prefix")
    with effc.load(build(FILTER)) as engine, pytest.raises(UsageError, match="was computed with another engine"):
        engine.shortened(IDS, prefix)


def test_a_prefix_counts_towards_the_limit_of_the_model(build: Build, tmp_path: Path) -> None:
    with effc.load(build(FILTER)) as engine:
        engine.write_prefix(IDS * 2, tmp_path / "prefix")
        with pytest.raises(UsageError, match="prompt 0 has 93 tokens, the model takes at most 64"):
            engine.generate([IDS], prefix=tmp_path / "prefix")


def test_endless_engines_filter_what_the_model_has_positions_for(build: Build) -> None:
    long = (IDS * 3)[:80]
    with effc.load(build(ENDLESS)) as engine:
        assert engine.cache_layout().endless
        with pytest.raises(UsageError, match=r"80 tokens, the engine's filter takes at most 64.*no-filter-prompt"):
            engine.generate([IDS, long], max_new_tokens=2)
        whole = engine.generate([long], max_new_tokens=2, filter_prompt=False)
        (result,) = engine.generate([long[:64]], max_new_tokens=60)
    assert whole[0].kept_tokens == 80
    assert (result.kept_tokens, len(result.token_ids)) == (KEEP, 60)


def test_layers_that_see_a_window_only_do_not_score(build: Build) -> None:
    with pytest.raises(ContractError, match="its window of 24 tokens hides the others"):
        build("sparse-attention{scheme=window,sinks=2,recent=24}," + FILTER)


@pytest.mark.parametrize("passes", [PIPELINES["plain"], PIPELINES["lossless"]], ids=["plain", "lossless"])
def test_short_prompts_are_read_as_ever(build: Build, passes: str) -> None:
    without = passes.removesuffix(FILTER).removesuffix(",") or "cached-attention"
    assert (build(passes) / "weights.bin").stat().st_size < 1.05 * (build(without) / "weights.bin").stat().st_size
    with effc.load(build(passes)) as engine, effc.load(build(without)) as plain:
        for count in (1, KEEP - 1, KEEP):
            assert engine.shortened(IDS[:count]) == IDS[:count]
            found, expected = (one.generate([IDS[:count]], max_new_tokens=4)[0].token_ids for one in (engine, plain))
            assert found == expected
        feeds = {
            "input_ids": np.array([IDS], np.int64),
            "attention_mask": np.ones((1, len(IDS)), np.int64),
            "position_ids": np.arange(len(IDS))[None],
        }
        assert list(engine.run(feeds)) == ["logits"]
        assert np.array_equal(engine.run(feeds)["logits"], plain.run(feeds)["logits"])
        assert plain.shortened(IDS) == IDS


def test_rows_of_a_batch_are_shortened_alone(build: Build) -> None:
    prompts = [IDS, IDS[:5], IDS[::-1], IDS[3:27]]
    with effc.load(build(FILTER)) as engine:
        together = engine.generate(prompts, max_new_tokens=5)
        alone = [engine.generate([prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [one.kept_tokens for one in together] == [KEEP, 5, KEEP, KEEP]


def test_a_shortened_prompt_leaves_room_for_more_tokens(build: Build) -> None:
    prompt = (IDS * 3)[:64]
    with effc.load(build(FILTER)) as engine:
        (short,) = engine.generate([prompt], max_new_tokens=20)
        (whole,) = engine.generate([prompt], max_new_tokens=20, filter_prompt=False)
    assert (len(short.token_ids), len(whole.token_ids)) == (20, 1)


def test_coded_weights_are_kept_once(build: Build) -> None:
    before = kernels.live_weights()
    with effc.load(build(LOSSLESS)):
        alone = kernels.live_weights() - before
    folder = build(PIPELINES["lossless"])
    manifest = json.loads((folder / "effc.json").read_text())
    assert alone > 0
    assert len(manifest["prompt_filter"]["weights"]) > alone // 2
    with effc.load(folder) as engine:
        assert kernels.live_weights() - before == alone
        engine.generate([IDS], max_new_tokens=2)
    del engine
    assert kernels.live_weights() == before


def test_coded_weights_may_have_tensors_without_content(model: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    signs = LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    for layer in signs.model.layers:
        layer.mlp.gate_proj.weight.data.sign_()
    signs.save_pretrained(tmp_path / "model")
    effc.optimize(tmp_path / "model", tmp_path / "engine", passes=PIPELINES["lossless"])
    before = kernels.live_weights()
    with effc.load(tmp_path / "engine") as engine:
        entry = engine.manifest.prompt_filter
        assert entry is not None and all(0 not in weight.shape for weight in entry.weights)
        assert kernels.live_weights() - before == 4 * 7 + 2
        (result,) = engine.generate([IDS], max_new_tokens=2)
    assert result.kept_tokens == KEEP


def test_benchmarks_and_pass_keys_read_what_stays(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    new_state = Engine.new_state

    def recorded(engine: Engine, batch: int, *, max_length: int) -> KvState:
        lengths.append((batch, max_length))
        return new_state(engine, batch, max_length=max_length)

    monkeypatch.setattr(Engine, "new_state", recorded)
    worker = Worker(build(FILTER))
    worker.load(1)
    worker.generate(3, 40, 2)
    found = answer(worker.engine, Prompt(IDS, [7, 8, 9]))
    kept = answer(worker.engine, Prompt(worker.engine.shortened(IDS), [7, 8, 9]))
    assert lengths == [(3, KEEP + 2), (1, KEEP + 2), (1, KEEP + 2)]
    assert found == kept


def test_the_filter_has_the_first_layers_only(build: Build) -> None:
    import onnx

    folder = build(FILTER)
    graph = onnx.load(folder / "prompt_filter.onnx", load_external_data=False).graph
    assert [value.name for value in graph.output] == ["prompt_scores"]
    assert [node.op_type for node in graph.node].count("CachedAttention") == LAYER
    assert not any("layers.3" in weight.name or "lm_head" in weight.name for weight in graph.initializer)
    used = {weight.name for weight in graph.initializer}
    assert not any(name.startswith(f"model.layers.{LAYER}.") and "v_proj" in name for name in used)


def test_damaged_filters_are_refused(build: Build, tmp_path: Path) -> None:
    def damaged(name: str, change: Callable[[dict], None]) -> Path:
        folder = tmp_path / name
        shutil.copytree(build(PIPELINES["lossless"]), folder)
        manifest = json.loads((folder / "effc.json").read_text())
        change(manifest)
        (folder / "effc.json").write_text(json.dumps(manifest))
        return folder

    def refused(name: str, change: Callable[[dict], None], message: str) -> None:
        with pytest.raises(EngineError, match=message):
            effc.load(damaged(name, change))

    refused("path", lambda one: one["prompt_filter"].update(model="../x.onnx"), "leaves its folder")
    refused("hash", lambda one: one["files"].pop("prompt_filter.onnx"), "no hash for prompt_filter.onnx")
    refused("graph", lambda one: one["prompt_filter"].update(model="model.onnx"), "not the filter of this engine")
    refused("key", lambda one: one["prompt_filter"].pop("keep"), "missing or malformed")
    weight = "prompt_filter", "weights"
    refused("file", lambda one: one[weight[0]][weight[1]][0].update(file="x.bin"), "is no file of it")
    refused("end", lambda one: one[weight[0]][weight[1]][0].update(offset=1 << 40), "ends before weight")
    refused("offset", lambda one: one[weight[0]][weight[1]][0].update(offset=-1), "has the shape .* and the offset -1")
    refused("shape", lambda one: one[weight[0]][weight[1]][0].update(shape=["n"]), "has the shape .'n'. and the offset")
    refused("forced", lambda one: one["prompt_filter"].update(forced=KEEP), "keep is 16 and forced 16")


def test_choosing_tokens() -> None:
    scores = np.array([5.0, 1, 9, 9, 9, 0, 2, 3], np.float32)
    assert choose_tokens(scores, 3, []).tolist() == [2, 3, 4]
    assert choose_tokens(scores, 2, []).tolist() == [2, 3]
    assert choose_tokens(scores, 4, [0, 6, 7]).tolist() == [0, 2, 6, 7]
    assert choose_tokens(scores, 3, [0, 6, 7]).tolist() == [0, 6, 7]
    assert choose_tokens(scores, 8, [0, 7]).tolist() == list(range(8))
    assert choose_tokens(scores[:1], 1, []).tolist() == [0]
    assert choose_tokens(-scores, 3, []).tolist() == [1, 5, 6]


def test_forced_places() -> None:
    assert fixed_places(8, 2, True) == [0, 6, 7]
    assert fixed_places(8, 2, False) == [6, 7]
    assert fixed_places(8, 0, True) == fixed_places(8, 0, False) == []
    assert fixed_places(2, 1, True) == [0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_chosen_tokens_are_the_best_of_those_not_forced(seed: int) -> None:
    draw = np.random.default_rng(seed)
    count = int(draw.integers(2, 40))
    keep = int(draw.integers(1, count))
    forced = int(draw.integers(0, keep))
    scores = draw.integers(0, 5, count).astype(np.float32)
    fixed = {0, *range(count - forced, count)} if forced else set()
    chosen = choose_tokens(scores, keep, sorted(fixed)).tolist()
    free = sorted(set(range(count)) - fixed, key=lambda place: (-scores[place], place))
    assert chosen == sorted(fixed | set(free[: keep - len(fixed)]))
    assert len(chosen) == keep
    assert np.all(np.diff(chosen) > 0)
