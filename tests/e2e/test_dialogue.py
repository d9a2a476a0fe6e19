"""Engines that keep what surprised the model, and dialogues that never end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import effc
from effc.errors import UsageError
from effc.runtime.cache_ports import cache_bytes
from effc.runtime.limits import token_limit
from effc.runtime.session import Engine
from effc.verify.steps import token_feed

VOCABULARY, LIMIT, BUDGET = 96, 160, 64
RETAIN = f"sparse-attention{{scheme=retain,budget={BUDGET},recent=8,block=4}}"


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


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("retain") / "engine"
    effc.optimize(model, folder, passes=RETAIN)
    return effc.load(folder)


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("plain") / "engine"
    effc.optimize(model, folder, passes="")
    return effc.load(folder)


def kept(engine_dialogue: object) -> list[list[int]]:
    """Tokens that each layer keeps."""
    state = engine_dialogue._rows.state  # type: ignore[attr-defined]
    return [
        [int(n) - 1 for n in tensor[0] if n] for name, tensor in state.snapshot().items() if name.endswith(".token")
    ]


def test_the_interface(engine: Engine) -> None:
    layout = engine.manifest.cache
    assert layout is not None
    assert (layout.endless, layout.longest_step, token_limit(engine.manifest)) == (True, BUDGET - 5, None)
    (scores,) = [port for port in engine.manifest.inputs if port.name == "token_scores"]
    assert (scores.dtype, scores.shape) == ("float32", ["batch", "total"])
    sizes = {sum(cache_bytes(layout, length).values()) for length in (1, 100, 100_000)}
    assert sizes == {3 * (2 * BUDGET * 2 * 16 * 4 + BUDGET * 4)}


def test_an_endless_dialogue(engine: Engine) -> None:
    """Many times the cache and the positions of the model, and what every layer keeps follows the scores."""
    dialogue, draw = engine.dialogue(decay=0.8), np.random.default_rng(2)
    for turn in range(40):
        answer = dialogue.say(draw.integers(0, VOCABULARY, 17).tolist(), max_new_tokens=20)
        assert (len(answer.token_ids), answer.finish_reason) == (20, "length")
        assert answer.prompt_tokens == 17 + (turn > 0)
    assert dialogue.length == 40 * 37 - 1 > 4 * LIMIT
    assert dialogue.turns == 40
    layers = kept(dialogue)
    assert layers[0] == layers[1] == layers[2]
    assert layers[0][:4] == [0, 1, 2, 3]
    assert layers[0][-8:] == list(range(dialogue.length - 8, dialogue.length))
    assert BUDGET - 4 <= len(layers[0]) <= BUDGET
    scores = dialogue.scores
    assert scores is not None
    assert len(scores) == dialogue.length
    older = layers[0][4:-8]
    assert scores[older].mean() > scores[older[0] : -8].mean()


def test_scores_are_the_surprise_of_the_model(engine: Engine, plain: Engine) -> None:
    """The same as from the logits of the engine without a bounded cache, while nothing is dropped."""
    dialogue = engine.dialogue(decay=0.5)
    turns = [[5, 6, 7, 8, 5, 6], [9, 10], [11, 12, 13]]
    ids: list[int] = []
    steps = []
    for turn in turns:
        ids += [*turn, *dialogue.say(turn, max_new_tokens=4).token_ids]
        steps.append(len(turn) + 4)
    ids = ids[:-1]
    array = np.array([ids])
    logits = plain.new_state(1).run(token_feed(plain, array, 0), ["logits"])["logits"][0].astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = np.array([0, *(-logs[i - 1, token] for i, token in enumerate(ids) if i)])
    expected[0] = expected[1 : steps[0] - 1].max()
    # The last token of an answer is read, and so counts, with the next turn.
    ages = np.array([2] * (steps[0] - 1) + [1] * steps[1] + [0] * steps[2])
    np.testing.assert_allclose(dialogue.scores, expected * 0.5**ages, atol=1e-4)


def test_decay_0_keeps_sinks_and_the_newest_turn(engine: Engine) -> None:
    dialogue = engine.dialogue(decay=0.0)
    for first in (1, 20, 40):
        dialogue.say(list(range(first, first + 19)), max_new_tokens=11)
    assert kept(dialogue)[0] == [0, 1, 2, 3, *range(dialogue.length - len(kept(dialogue)[0]) + 4, dialogue.length)]


@pytest.mark.parametrize("turn", [1, 7, 59, 60, 61, 130, 500])
def test_turns_of_any_length(engine: Engine, turn: int) -> None:
    """A turn longer than the cache is read in parts."""
    dialogue = engine.dialogue()
    ids = np.random.default_rng(turn).integers(0, VOCABULARY, turn).tolist()
    for _ in range(2):
        assert len(dialogue.say(ids, max_new_tokens=3).token_ids) == 3
    assert len(kept(dialogue)[0]) <= BUDGET


def test_a_dialogue_is_repeatable(engine: Engine) -> None:
    def answers() -> list[list[int]]:
        dialogue = engine.dialogue(temperature=0.8, seed=7)
        return [dialogue.say([3, 4, 5], max_new_tokens=40).token_ids for _ in range(5)]

    assert answers() == answers()


def test_the_first_turn_is_generate(engine: Engine, plain: Engine) -> None:
    prompt = list(range(5, 35))
    for one in (engine, plain):
        generated = one.generate([prompt], max_new_tokens=60)[0]
        assert one.dialogue().say(prompt, max_new_tokens=60).token_ids == generated.token_ids


def test_a_dialogue_with_any_engine(plain: Engine) -> None:
    """Turns are one text, up to the last position of the model."""
    dialogue, ids = plain.dialogue(), []
    for turn in ([5, 6, 7], [8], [9, 10, 11, 12]):
        alone = plain.generate([[*ids, *turn]], max_new_tokens=10)[0]
        answer = dialogue.say(turn, max_new_tokens=10)
        assert answer.token_ids == alone.token_ids
        ids += [*turn, *answer.token_ids]
    assert dialogue.scores is None
    with pytest.raises(UsageError, match="the dialogue has 37 tokens and this turn 124, the engine takes 160 in all"):
        dialogue.say(list(range(5, 90)) + list(range(5, 43)))
    assert len(dialogue.say(list(range(5, 90)), max_new_tokens=900).token_ids) == 160 - 37 - 86 + 1


def test_generate_beyond_the_cache(engine: Engine) -> None:
    """Rows of different lengths, far beyond the positions of the model."""
    prompts = [list(range(1, 90)), [5, 6, 7], list(range(20, 60))]
    together = engine.generate(prompts, max_new_tokens=2 * LIMIT)
    assert [len(one.token_ids) for one in together] == [2 * LIMIT] * 3
    (alone,) = engine.generate([prompts[0]], max_new_tokens=2 * LIMIT)
    assert alone.token_ids == together[0].token_ids


def test_within_the_cache_it_is_the_model(engine: Engine, plain: Engine) -> None:
    ids = np.random.default_rng(8).integers(0, VOCABULARY, (2, BUDGET))
    found, wanted = [
        one.new_state(2).run(token_feed(one, ids[:, :40], 0), ["logits"])["logits"] for one in (engine, plain)
    ]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_what_there_is_not(engine: Engine, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a prefix does not hold what surprised it"):
        engine.write_prefix([5, 6, 7], tmp_path / "prefix")
    with pytest.raises(UsageError, match=r"decay is 1\.5"):
        engine.dialogue(decay=1.5)
    with pytest.raises(UsageError, match="a system message needs chat"):
        engine.dialogue(system="x")
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        engine.dialogue().say([5], max_new_tokens=0)
    with pytest.raises(UsageError, match="the turn is empty"):
        engine.dialogue().say("")


def test_a_turn_that_is_broken_off(engine: Engine) -> None:
    from effc.runtime.continuation import Continuation

    dialogue = engine.dialogue()
    dialogue.say([5, 6], max_new_tokens=2)

    def interrupt(self: Continuation, token: int) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Continuation, "accept", interrupt)
        with pytest.raises(KeyboardInterrupt):
            dialogue.say([7])
    with pytest.raises(UsageError, match="the last turn was broken off"):
        dialogue.say([7])


def test_beside_layers_with_windows(tmp_path: Path) -> None:
    """They keep their windows, and the dialogue is endless all the same."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(3)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=LIMIT, sliding_window=24, bos_token_id=None,
        eos_token_id=None, pad_token_id=0, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "model")
    effc.optimize(tmp_path / "model", tmp_path / "engine", passes=RETAIN)
    engine = effc.load(tmp_path / "engine")
    assert token_limit(engine.manifest) is None
    dialogue = engine.dialogue()
    for _ in range(10):
        assert len(dialogue.say(list(range(5, 25)), max_new_tokens=20).token_ids) == 20
    assert dialogue.length > 2 * LIMIT
    assert len(kept(dialogue)) == 1
