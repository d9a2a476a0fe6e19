"""Generation against the model without a cache, and everything a caller can get wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from effc.errors import EffcError, EngineError, UsageError
from effc.runtime.bundle import Port
from effc.runtime.session import load

MODES = ("in-place", "growing")
MakeLm = Callable[..., Path]
NO_EOS = {"vocab_size": 260, "max_position_embeddings": 96, "pad_token_id": 0}


@pytest.mark.parametrize("mode", MODES)
def test_greedy_equals_the_model_without_a_cache(make_lm: MakeLm, lm_oracle: Any, mode: str) -> None:
    with load(make_lm(mode, config=NO_EOS)) as engine:
        for prompt in ([9], [9, 10], [200, 3, 77, 5, 5, 5, 8]):
            (result,) = engine.generate([prompt], max_new_tokens=12)
            assert result.token_ids == lm_oracle.greedy(prompt, 12)
            assert (result.finish_reason, result.prompt_tokens) == ("length", len(prompt))
            assert result.prefill_seconds > 0
            assert result.decode_seconds > 0


@pytest.mark.parametrize("mode", MODES)
def test_every_row_of_a_batch_equals_the_row_alone(make_lm: MakeLm, mode: str) -> None:
    prompts = ["a", "hello there", "é" * 20, "x y", "the quick brown fox jumps over the lazy dog"]
    with load(make_lm(mode, config={**NO_EOS, "eos_token_id": [2, 5, 50, 99, 130]})) as engine:
        alone = [engine.generate(prompt, max_new_tokens=30)[0] for prompt in prompts]
        together = engine.generate(prompts, max_new_tokens=30)
    assert {result.finish_reason for result in alone} == {"eos", "length"}
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.text, one.finish_reason, one.prompt_tokens) == (
            other.text,
            other.finish_reason,
            other.prompt_tokens,
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk", [1, 2, 5, 6, 7, 100])
def test_a_chunked_prompt_gives_the_same(make_lm: MakeLm, lm_oracle: Any, mode: str, chunk: int) -> None:
    prompt = [200, 3, 77, 5, 5, 8]
    with load(make_lm(mode, config=NO_EOS)) as engine:
        (result,) = engine.generate([prompt], max_new_tokens=5, prefill_chunk=chunk)
    assert result.token_ids == lm_oracle.greedy(prompt, 5)


def test_a_long_prompt_is_split_to_keep_the_logits_small(
    make_lm: MakeLm, lm_oracle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effc.runtime.batch.LOGITS_LIMIT", 1)
    prompt = [int(item) for item in np.random.default_rng(0).integers(0, 260, 50)]
    with load(make_lm(config=NO_EOS)) as engine:
        assert engine.generate([prompt], max_new_tokens=4)[0].token_ids == lm_oracle.greedy(prompt, 4)


@pytest.mark.parametrize("eos_is_list", [False, True])
def test_eos_ends_a_row_and_leaves_no_text(make_lm: MakeLm, lm_oracle: Any, eos_is_list: bool) -> None:
    free = lm_oracle.greedy([9], 12)
    eos = free[7]
    end = free.index(eos) + 1
    config = {**NO_EOS, "eos_token_id": [1, eos] if eos_is_list else eos}
    with load(make_lm(config=config)) as engine:
        (result,) = engine.generate([[9]], max_new_tokens=12)
        assert (result.token_ids, result.finish_reason) == (free[:end], "eos")
        assert result.text == engine.tokenizer.decode(free[: end - 1])


def test_generation_config_names_the_eos_first(make_lm: MakeLm, lm_oracle: Any) -> None:
    free = lm_oracle.greedy([9], 12)
    folder_config = {**NO_EOS, "eos_token_id": free[0]}
    folder = make_lm(config=folder_config, assets={"generation_config.json": {"eos_token_id": [free[3]], "top_k": 5}})
    with load(folder) as engine:
        (result,) = engine.generate([[9]], max_new_tokens=12)
    assert result.token_ids == free[: free.index(free[3]) + 1]
    assert result.text == ""


@pytest.mark.parametrize("length", range(1, 6))
def test_stop_strings_end_the_text_wherever_tokens_end(make_lm: MakeLm, length: int) -> None:
    with load(make_lm(config=NO_EOS)) as engine:
        (free,) = engine.generate("hello", max_new_tokens=40)
        assert len(free.text) > 12
        stop = free.text[6 : 6 + length]
        pieces: list[str] = []
        (result,) = engine.generate(
            "hello", max_new_tokens=40, stop=["never there", stop], stream=lambda _, text: pieces.append(text)
        )
    assert result.text == free.text[: free.text.index(stop)]
    assert "".join(pieces) == result.text
    assert result.finish_reason == "stop"
    assert len(result.token_ids) < 40
    assert result.token_ids == free.token_ids[: len(result.token_ids)]


def test_streams_of_a_batch_join_to_the_texts(make_lm: MakeLm) -> None:
    pieces: dict[int, list[str]] = {0: [], 1: [], 2: []}
    with load(make_lm()) as engine:
        results = engine.generate(
            ["a", "bcd", "ü"], max_new_tokens=25, stream=lambda row, text: pieces[row].append(text)
        )
    for row, result in enumerate(results):
        assert "".join(pieces[row]) == result.text
        assert all(pieces[row])


def test_the_limit_of_the_model_ends_a_row(make_lm: MakeLm) -> None:
    with load(make_lm(config=NO_EOS)) as engine:
        results = engine.generate([[7] * 96, [7] * 90, [7]], max_new_tokens=20)
        assert [len(result.token_ids) for result in results] == [1, 7, 20]
        assert {result.finish_reason for result in results} == {"length"}
        with pytest.raises(UsageError, match="prompt 1 has 97 tokens, the model takes at most 96"):
            engine.generate([[7], [7] * 97])


def test_sampling_repeats_with_a_seed_and_rows_differ(make_lm: MakeLm) -> None:
    with load(make_lm(config=NO_EOS)) as engine:
        options = {"max_new_tokens": 20, "temperature": 1.5}
        first = engine.generate(["abc", "abc"], seed=3, **options)
        again = engine.generate(["abc", "abc"], seed=3, **options)
        other = engine.generate(["abc", "abc"], seed=4, **options)
    assert [item.token_ids for item in first] == [item.token_ids for item in again]
    assert first[0].token_ids != first[1].token_ids
    assert first[0].token_ids != other[0].token_ids


def test_a_row_samples_the_same_whoever_sits_beside_it(make_lm: MakeLm) -> None:
    with load(make_lm(config=NO_EOS)) as engine:
        options = {"max_new_tokens": 20, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 5}
        (alone,) = engine.generate(["abc"], **options)
        beside = engine.generate(["abc", "a longer neighbour"], **options)[0]
    assert alone.token_ids == beside.token_ids


def test_a_tiny_temperature_and_top_k_1_are_greedy(make_lm: MakeLm, lm_oracle: Any) -> None:
    expected = lm_oracle.greedy([9, 10], 10)
    with load(make_lm(config=NO_EOS)) as engine:
        for options in ({"temperature": 1e-9}, {"temperature": 2.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-9}):
            assert engine.generate([[9, 10]], max_new_tokens=10, seed=0, **options)[0].token_ids == expected


def test_a_strong_repetition_penalty_never_repeats(make_lm: MakeLm) -> None:
    with load(make_lm(config=NO_EOS)) as engine:
        (result,) = engine.generate([[9, 10, 11]], max_new_tokens=50, repetition_penalty=1e6)
    seen = [9, 10, 11, *result.token_ids]
    assert len(set(seen)) == len(seen)


def test_no_prompts_give_no_results(make_lm: MakeLm) -> None:
    with load(make_lm()) as engine:
        assert engine.generate([]) == []


def test_inputs_a_graph_lacks_are_not_fed(make_lm: MakeLm) -> None:
    with load(make_lm()) as engine:
        manifest = engine.manifest
        unknown = [*manifest.inputs, Port("pixel_values", "float32", ["batch"])]
        object.__setattr__(manifest, "inputs", unknown)
        with pytest.raises(EngineError, match="generation needs"):
            engine.generate("a")


def test_unequal_prompts_need_a_mask_and_positions(make_lm: MakeLm, lm_oracle: Any) -> None:
    with load(make_lm(config=NO_EOS)) as engine:
        object.__setattr__(engine.manifest, "inputs", engine.manifest.inputs[:2])
        with pytest.raises(EngineError, match="takes no position_ids"):
            engine.generate(["a", "bc"])


def test_several_rows_in_chunks_say_what_the_attention_cannot(make_lm: MakeLm) -> None:
    with load(make_lm("growing", config=NO_EOS)) as engine:
        whole = engine.generate(["abcde", "fghijkl"], max_new_tokens=4)
        chunked = engine.generate(["abcde", "fghijkl"], max_new_tokens=4, prefill_chunk=3)
        assert [row.token_ids for row in whole] == [row.token_ids for row in chunked]
    with load(make_lm("in-place", config=NO_EOS)) as engine:
        by_one = engine.generate(["abcde", "fghijkl"], max_new_tokens=4, prefill_chunk=1)
        assert [row.token_ids for row in whole] == [row.token_ids for row in by_one]
        with pytest.raises(EngineError, match="batch_size must be 1"):
            engine.generate(["abcde", "fghijkl"], max_new_tokens=4, prefill_chunk=3)


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    ("", {}, "prompt 0 is empty"),
    (["a", ""], {}, "prompt 1 is empty"),
    ([[1], []], {}, "prompt 1 is empty"),
    ([1, 2], {}, "list of ids for each prompt"),
    ([[1.5]], {}, "other than whole numbers"),
    ([[[1], [2]]], {}, "other than whole numbers"),
    ([[[1], [2, 3]]], {}, "no flat list"),
    ([[260]], {}, "outside the vocabulary of 260"),
    ([[-1]], {}, "outside the vocabulary"),
    ("a", {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ("a", {"temperature": -0.1}, "temperature is -0.1"),
    ("a", {"temperature": float("nan")}, "temperature is nan"),
    ("a", {"temperature": float("inf")}, "temperature is inf"),
    ("a", {"top_p": 0.0}, "top_p is 0.0"),
    ("a", {"top_p": 1.1}, "top_p is 1.1"),
    ("a", {"top_k": -1}, "top_k is -1"),
    ("a", {"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ("a", {"repetition_penalty": 1e-300}, "repetition_penalty is 1e-300"),
    ("a\udcff", {}, "not UTF-8 at character 1"),
    ("a", {"prefill_chunk": 0}, "prefill_chunk is 0"),
    ("a", {"seed": -1}, "seed is -1"),
    ("a", {"stop": [""]}, "empty string"),
    ("a", {"stop": "abc"}, "stop is a string"),
    ("a", {"chat": True}, "no chat template"),
    ([[1]], {"chat": True}, "chat takes texts"),
]


@pytest.mark.parametrize(("prompts", "options", "message"), WRONG)
def test_wrong_requests_are_refused(make_lm: MakeLm, prompts: Any, options: dict[str, Any], message: str) -> None:
    with load(make_lm()) as engine, pytest.raises(UsageError, match=message):
        engine.generate(prompts, **options)


def test_without_a_tokenizer_only_ids_work(make_lm: MakeLm, lm_oracle: Any) -> None:
    with load(make_lm(assets={}, config=NO_EOS)) as engine:
        (result,) = engine.generate([np.array([9, 10])], max_new_tokens=3)
        assert (result.text, result.token_ids) == ("", lm_oracle.greedy([9, 10], 3))
        for options in ({}, {"stop": ["a"]}, {"stream": lambda _row, _text: None}):
            prompts = [[9]] if options else "a"
            with pytest.raises(EngineError, match=r"tokenizer\.json: is missing"):
                engine.generate(prompts, **options)


def test_other_tasks_and_engines_without_a_cache_do_not_generate(make_lm: MakeLm) -> None:
    with load(make_lm(task="encoder")) as engine, pytest.raises(UsageError, match="only causal-lm engines"):
        engine.generate("a")
    with load(make_lm()) as engine:
        object.__setattr__(engine.manifest, "cache", None)
        with pytest.raises(EngineError, match="carries no cache"):
            engine.generate("a")


def test_logits_that_are_not_finite_are_reported(make_lm: MakeLm, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(make_lm()) as engine:
        monkeypatch.setattr("effc.runtime.batch.Batch.prefill", lambda *_: np.full((1, 260), np.nan, np.float32))
        with pytest.raises(EngineError, match="logits are not finite"):
            engine.generate("a")


def test_a_chat_template_frames_the_prompt(make_lm: MakeLm, lm_assets: dict[str, Any]) -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}>"
    folder = make_lm(assets={**lm_assets, "chat_template.jinja": template})
    with load(folder) as engine:
        chat = engine.generate("héllo", chat=True, max_new_tokens=5)[0]
        plain = engine.generate([engine.tokenizer.encode("<bos>[user]héllo>")], max_new_tokens=5)[0]
    assert chat.prompt_tokens == 1 + len("[user]h\u00e9llo>".encode())
    assert chat.token_ids == plain.token_ids


def test_errors_are_ours(make_lm: MakeLm) -> None:
    assert issubclass(EngineError, EffcError)
    with load(make_lm()) as engine:
        engine.close()
        with pytest.raises(UsageError, match="was closed"):
            engine.generate("a")
        engine.close()
