"""Pass key prompts, and what engines that answer in a known way get for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
from tiny_tokenizer import BOS, ZERO, tokenizer_json, with_tokenizer
from verify_models import causal_lm, write_engine
from verify_schemas import schema

from effc.errors import UsageError
from effc.runtime.session import Engine, load
from effc.verify.filler import sentences
from effc.verify.passkey import _row, answer, measure_passkey
from effc.verify.passkey_prompt import PasskeyTask, make_prompt

VOCAB = 37


def characters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def triples(text: str) -> list[int]:
    """Ids of digits in groups of three with a space before them, as some tokenizers make them."""
    return [hash(piece) for piece in re.findall(r" ?\d{1,3}|\D", text)]


def plain(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def test_filler_is_varied_repeatable_and_without_digits() -> None:
    first = list(islice(sentences(0), 500))
    assert first == list(islice(sentences(0), 500))
    assert first != list(islice(sentences(1), 500))
    assert len(set(first)) > 350
    assert not any(re.search(r"\d", sentence) for sentence in first)
    assert all(re.fullmatch(r"[A-Z][^.]*\.", sentence) for sentence in first)


@pytest.mark.parametrize("depth", [0, 50, 100])
@pytest.mark.parametrize("length", [400, 2001])
def test_a_prompt_is_as_long_as_asked_and_the_key_as_deep(depth: int, length: int) -> None:
    prompt = make_prompt(characters, None, PasskeyTask([length]), length, depth, 3)
    text, key = plain(prompt.ids), plain(prompt.answer)
    assert length - 100 < len(prompt.ids) + len(prompt.answer) <= length
    assert re.fullmatch(r"\d{5}", key)
    assert text.count(key) == 2
    before, after = re.fullmatch(r"(?s).*remember it\.\n\n(.*)The pass key .* door\.(.*)\n\nWhat.*", text).groups()
    assert len(before) / len(before + after) == pytest.approx(depth / 100, abs=0.1 if length > 1000 else 0.5)
    colour = re.search(r"What is the pass key of the (\w+) door\?", text).group(1)
    assert f"The pass key of the {colour} door is {key}." in text
    assert text.endswith(f"The pass key of the {colour} door is ")


def test_samples_differ_and_repeat() -> None:
    task = PasskeyTask([500])
    prompts = [make_prompt(characters, 7, task, 500, 50, sample) for sample in range(4)]
    assert len({plain(prompt.answer) for prompt in prompts}) == 4
    assert all(prompt.ids[0] == 7 for prompt in prompts)
    assert prompts[1] == make_prompt(characters, 7, PasskeyTask([500]), 500, 50, 1)
    deep = make_prompt(characters, 7, task, 500, 100, 1)
    assert deep.answer == prompts[1].answer


def test_other_doors_have_other_keys() -> None:
    prompt = make_prompt(characters, None, PasskeyTask([2000], keys=5), 2000, 25, 0)
    stated = re.findall(r"The pass key of the (\w+) door is (\d{5})\. Remember it: (\d{5})", plain(prompt.ids))
    assert len(stated) == len({colour for colour, _, _ in stated}) == len({key for _, key, _ in stated}) == 5
    assert all(first == second for _, first, second in stated)
    assert plain(prompt.answer) in {key for _, key, _ in stated}


def test_digits_may_share_tokens_with_each_other_and_the_space() -> None:
    prompt = make_prompt(triples, None, PasskeyTask([500]), 500, 50, 0)
    key = plain(make_prompt(characters, None, PasskeyTask([500]), 500, 50, 0).answer)
    assert prompt.answer == [hash(" " + key[:3]), hash(key[3:])]


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"lengths": []}, "at least one length"),
        ({"lengths": [9], "depths": []}, "at least one length and one depth"),
        ({"lengths": [9], "depths": [101]}, "from 0 to 100"),
        ({"lengths": [9], "samples": 0}, "samples is 0"),
        ({"lengths": [9], "keys": 17}, "give 1 to 16"),
        ({"lengths": [9], "seed": -1}, "seed is -1"),
    ],
)
def test_wrong_tasks(figures: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PasskeyTask(**figures)


def test_a_length_without_room_for_the_question() -> None:
    with pytest.raises(UsageError, match=r"at least \d+ tokens here, 100 were asked for"):
        make_prompt(characters, None, PasskeyTask([100]), 100, 0, 0)


@dataclass
class Reader:
    """An engine that looks for the last digits stated after what precedes the next token, in the last `span` tokens."""

    span: int
    folder: Path = Path("reader")
    task: str = "causal-lm"
    has_tokenizer: bool = True
    manifest: object = field(
        default_factory=lambda: SimpleNamespace(
            config={}, cache=None, inputs=[SimpleNamespace(name="input_ids", dtype="int64")]
        )
    )

    def __post_init__(self) -> None:
        import tokenizers

        library = tokenizers.Tokenizer.from_buffer(tokenizer_json())
        self.tokenizer = SimpleNamespace(
            encode=lambda text, add_special_tokens=True: (
                library.encode(text, add_special_tokens=add_special_tokens).ids
            ),
            special_id=lambda name: BOS,
        )
        self.runs: list[int] = []

    def shortened(self, ids: list[int]) -> list[int]:
        return list(ids)

    def new_state(self, batch: int, *, max_length: int) -> Reader:
        self.seen: list[int] = []
        self.most = max_length
        return self

    def run(self, feed: dict[str, np.ndarray], outputs: list[str], *, num_logits: int) -> dict[str, np.ndarray]:
        self.seen += feed["input_ids"][0].tolist()
        self.runs.append(feed["input_ids"].shape[1])
        assert len(self.seen) <= self.most
        logits = np.zeros((1, num_logits, VOCAB), np.float32)
        kept = self.seen[-self.span :]
        digits = [token - ZERO for token in kept if ZERO <= token < ZERO + 10]
        said = next(count for count in range(6) if not ZERO <= self.seen[-1 - count] < ZERO + 10)
        if len(digits) >= 5 + said:
            logits[0, -1, ZERO + digits[:5][said]] = 5
        return {name: logits for name in outputs}


def test_an_engine_that_remembers_and_one_that_forgets() -> None:
    task = PasskeyTask([600, 1200], samples=2)
    forgetful = Reader(700)
    result = measure_passkey(forgetful, Reader(10_000), task, chunk=50)
    jsonschema.validate(result, schema("verify")["properties"]["passkey"])
    assert result["source"] == [[1.0] * 5] * 2
    assert result["engine"] == [[1.0] * 5, [0.0, 0.0, 1.0, 1.0, 1.0]]
    assert result["score"] == {"source": 1.0, "engine": 0.8}
    assert result["rank"]["source"] == [[1.0] * 5] * 2
    assert result["rank"]["engine"][1][0] == VOCAB
    sure = 5 - np.log(np.exp(5) + VOCAB - 1)
    np.testing.assert_allclose(result["log_probability"]["source"], np.full((2, 5), sure), rtol=1e-5)
    np.testing.assert_allclose(result["log_probability"]["engine"][1][:2], -np.log(VOCAB), rtol=1e-5)
    assert max(forgetful.runs) == 50
    assert forgetful.runs[-4:] == [1, 1, 1, 1]
    assert all(0 < length - tokens < 100 for length, tokens in zip([600, 1200], result["tokens"], strict=True))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    folder = tmp_path_factory.mktemp("engines")
    made = {
        "native": write_engine(with_tokenizer(causal_lm()), folder / "native"),
        "portable": write_engine(with_tokenizer(causal_lm()), folder / "portable", portable=True),
        "bytes": write_engine(causal_lm(), folder / "bytes", portable=True),
    }
    return {name: load(path) for name, path in made.items()}


@pytest.mark.parametrize("name", ["native", "portable"])
def test_an_answer_against_one_run_of_the_whole(engines: dict[str, Engine], name: str) -> None:
    engine = engines[name]
    prompt = make_prompt(lambda text: engine.tokenizer.encode(text)[1:], BOS, PasskeyTask([401]), 401, 50, 0)
    found = answer(engine, prompt, chunk=37)
    ids = np.array([[*prompt.ids, *prompt.answer]])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    rows = engines["portable"].run(feed)["logits"][0, len(prompt.ids) - 1 : -1].astype(np.float64)
    right = rows[np.arange(5), prompt.answer]
    assert found.log_probability == pytest.approx(np.mean(right - np.log(np.exp(rows).sum(axis=-1))), abs=1e-5)
    assert found.rank == np.mean(1 + (rows > right[:, None]).sum(axis=-1))
    assert found.exact == bool((rows.argmax(axis=-1) == prompt.answer).all())
    generated = engine.generate([prompt.ids], max_new_tokens=5)[0].token_ids
    assert found.exact == (generated == prompt.answer)


def test_numbers_that_are_none_are_no_answer() -> None:
    assert _row(np.array([0, 1, 2.0]), 2)[::2] == (True, 1)
    assert _row(np.array([2, 1, 2.0]), 2)[::2] == (False, 2)
    for broken in (np.full(3, np.nan), np.array([np.nan, 0, 1]), np.array([0, 0, np.inf])):
        exact, log_probability, rank = _row(broken, 2)
        assert (exact, rank) == (False, 3)
        assert np.isnan(log_probability)


def test_what_cannot_be_asked(engines: dict[str, Engine]) -> None:
    with pytest.raises(UsageError, match=r"at least \d+ tokens here, 50 were asked for"):
        measure_passkey(engines["native"], engines["native"], PasskeyTask([400, 50]))
    with pytest.raises(UsageError, match="has no tokenizer"):
        measure_passkey(engines["bytes"], engines["bytes"], PasskeyTask([400]))
    said: list[str] = []
    one_sided = measure_passkey(
        engines["bytes"], engines["native"], PasskeyTask([320], [0], 2), progress=lambda stage, *_: said.append(stage)
    )
    assert one_sided["log_probability"]["source"][0][0] == pytest.approx(one_sided["log_probability"]["engine"][0][0])
    assert said == ["pass key in 320 tokens, 0 % deep"]
