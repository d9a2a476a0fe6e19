"""Dialogues with a tiny model, and the surprise of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from effc.errors import EngineError, UsageError
from effc.runtime.bundle import Port
from effc.runtime.session import load
from effc.runtime.surprise import TokenScores, surprise

MODES = ("in-place", "growing")
TEMPLATE = "{% for m in messages %}<turn>{{ m.role[0] }}{{ m.content }}<eos>{% endfor %}<turn>a"
MakeLm = Callable[..., Path]


@pytest.mark.parametrize("mode", MODES)
def test_turns_are_one_text(make_lm: MakeLm, lm_oracle: Any, mode: str) -> None:
    with load(make_lm(mode)) as engine:
        dialogue, ids = engine.dialogue(), []
        for turn in ([5, 6, 7], [8], [9, 10, 11]):
            ids += turn
            answer = dialogue.say(turn, max_new_tokens=6)
            assert answer.token_ids == lm_oracle.greedy(ids, 6)[: len(answer.token_ids)]
            ids += answer.token_ids
        assert dialogue.length == len(ids) - 1
        assert dialogue.turns == 3


def test_texts_are_one_text(make_lm: MakeLm, lm_oracle: Any) -> None:
    with load(make_lm()) as engine:
        dialogue, ids, pieces = engine.dialogue(), [], []
        for turn in ("The qu", "ick", " brown"):
            ids += engine.tokenizer.encode(turn)
            answer = dialogue.say(turn, max_new_tokens=5, stream=pieces.append)
            assert answer.token_ids == lm_oracle.greedy(ids, 5)[: len(answer.token_ids)]
            assert "".join(pieces) == answer.text
            pieces.clear()
            ids += answer.token_ids


def test_turns_of_a_chat(make_lm: MakeLm, lm_assets: dict[str, Any], lm_oracle: Any) -> None:
    """Between the words of the model and its next ones there is what the template puts there."""
    folder = make_lm(assets={**lm_assets, "chat_template.jinja": TEMPLATE})
    with load(folder) as engine:
        dialogue = engine.dialogue(chat=True, system="é")
        text = "<turn>sé<eos><turn>uone<eos><turn>a"
        ids: list[int] = []
        for turn in ("two", "three", ""):
            ids += engine.tokenizer.encode(text, add_special_tokens=False)
            answer = dialogue.say(text.removesuffix("<eos><turn>a").rpartition("<turn>u")[2], max_new_tokens=6)
            assert answer.token_ids == lm_oracle.greedy(ids, 6)[: len(answer.token_ids)]
            ids += answer.token_ids
            # What ended the model's turn is not there twice.
            ids = ids[:-1] if answer.finish_reason == "eos" else ids
            text = f"<eos><turn>u{turn}<eos><turn>a"


def test_the_end_that_the_model_made_is_that_of_the_template(
    make_lm: MakeLm, lm_assets: dict[str, Any], lm_oracle: Any
) -> None:
    folder = make_lm(assets={**lm_assets, "chat_template.jinja": TEMPLATE})
    with load(folder) as engine:
        first = engine.dialogue(chat=True).say("one", max_new_tokens=1).token_ids
    config = {"vocab_size": 260, "max_position_embeddings": 96, "eos_token_id": first}
    with load(make_lm(assets={**lm_assets, "chat_template.jinja": TEMPLATE}, config=config)) as engine:
        dialogue = engine.dialogue(chat=True)
        assert dialogue.say("one").finish_reason == "eos"
        before = dialogue.length
        assert dialogue.say("two", max_new_tokens=1).prompt_tokens == len("..u") + len("two") + len("..a")
        assert dialogue.length - before == 9


@pytest.mark.parametrize(
    ("turn", "options", "message"),
    [
        ("", {}, "the turn is empty"),
        ([], {}, "the turn is empty"),
        ([999], {}, "outside the vocabulary"),
        ([5], {"chat": True}, "chat takes texts"),
        ("a", {"chat": True}, "no chat template"),
        ("a", {"system": "b"}, "a system message needs chat"),
        ("a", {"decay": -0.1}, "decay is -0.1"),
        ("a", {"seed": -1}, "seed is -1"),
        ("a", {"temperature": -1.0}, "temperature is -1"),
        ([5] * 97, {}, "has 0 tokens and this turn 97, the engine takes 96 in all"),
    ],
)
def test_what_there_is_not(make_lm: MakeLm, turn: Any, options: dict[str, Any], message: str) -> None:
    with load(make_lm()) as engine, pytest.raises(UsageError, match=message):
        engine.dialogue(**options).say(turn)


def test_a_template_without_the_assistant_is_refused(make_lm: MakeLm, lm_assets: dict[str, Any]) -> None:
    template = "{{ messages[-1].content }}:"
    with load(make_lm(assets={**lm_assets, "chat_template.jinja": template})) as engine:
        dialogue = engine.dialogue(chat=True)
        dialogue.say("one", max_new_tokens=2)
        with pytest.raises(UsageError, match="does not show what the assistant said"):
            dialogue.say("two")


def test_other_inputs_are_refused(make_lm: MakeLm) -> None:
    folder = make_lm()
    with load(folder) as engine:
        engine.manifest.inputs.append(Port("pixels", "float32", ["batch"]))
        with pytest.raises(EngineError, match="generation needs input_ids"):
            engine.dialogue()


def test_surprise() -> None:
    """ln V of uniform logits, and minus the logarithm of the probability of any others."""
    for size in (1, 7, 32000):
        assert surprise(np.full(size, 3.0, np.float32), size // 2) == pytest.approx(np.log(size), abs=1e-6)
    logits = np.array([0.0, 1.0, -np.inf, 80.0], np.float32)
    probabilities = np.exp(logits.astype(np.float64) - 80) / np.exp(logits.astype(np.float64) - 80).sum()
    for token in (0, 1, 3):
        assert surprise(logits, token) == pytest.approx(-np.log(probabilities[token]), rel=1e-6, abs=1e-6)
    assert surprise(logits, 2) == np.finfo(np.float32).max


def uniform(*sizes: int) -> np.ndarray:
    return np.zeros((*sizes, 32), np.float32)


def test_the_first_token_is_worth_the_most_of_its_turn() -> None:
    scores = TokenScores([0, 2])
    logits = uniform(2, 3)
    logits[0, 1, 9] = 3.0
    scores.add(np.array([[1, 2, 3], [0, 0, 5]]), logits)
    plain, rare = np.log(32), np.log(31 + np.exp(3))
    np.testing.assert_allclose(scores.values(4), [[rare, plain, rare, 0], [0, 0, 0, 0]], rtol=1e-6)
    scores.add(np.array([[4], [6]]), uniform(2, 1))
    np.testing.assert_allclose(scores.values(4), [[rare, plain, rare, plain], [0, 0, plain, plain]], rtol=1e-6)
    assert np.array_equal(scores.values(2), scores.values(4)[:, :2])


def test_scores_decay_with_every_turn() -> None:
    """A token of u turns ago has its surprise times decay to the u; no later turn changes the first token."""
    scores = TokenScores([0])
    for turn in range(4):
        if turn:
            scores.decay(0.5)
        logits = uniform(1, 200)
        logits[0, 7, 9] = 5.0 * turn
        scores.add(np.ones((1, 200), np.int64), logits)
    found = scores.values(800)[0].reshape(4, 200)
    expected = np.log(32) * 0.5 ** np.arange(3, -1, -1)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(found[:, 100], expected, rtol=1e-5)


@pytest.mark.parametrize("parts", [[12], [1] * 12, [5, 0, 7]])
def test_parts_score_alike(parts: list[int]) -> None:
    draw = np.random.default_rng(3)
    ids, logits = draw.integers(0, 32, (2, 12)), draw.standard_normal((2, 12, 32)).astype(np.float32)
    whole, scores, done = TokenScores([0, 4]), TokenScores([0, 4]), 0
    whole.add(ids, logits)
    for count in parts:
        scores.add(ids[:, done : done + count], logits[:, done : done + count])
        done += count
    assert np.array_equal(scores.values(12), whole.values(12))
