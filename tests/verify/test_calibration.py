"""Calibration data: every file format, every refusal, and values against whole runs of the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from verify_models import HEAD, HEADS, HIDDEN, VOCAB, causal_lm, encoder

from effc.errors import InputError
from effc.ir.program import Program
from effc.verify import calibration
from effc.verify.calibration import WINDOW, open_calibration
from effc.verify.calibration_windows import Window, open_windows
from effc.verify.snapshot import program_interface
from effc.verify.streaming import evaluate

BOS, EOS = 0, 1


def tokenizer(*, around: bool = True) -> bytes:
    """One id a letter, `a` is 2; with BOS and EOS around a text."""
    letters = {chr(ord("a") + place): 2 + place for place in range(26)}
    words = {"<s>": BOS, "</s>": EOS, **letters, " ": 28, "\n": 29, "?": 30}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    if around:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return made.to_str().encode()


def with_tokenizer(program: Program, **options: bool) -> Program:
    program.source = replace(program.source, assets={"tokenizer.json": tokenizer(**options)})
    return program


@pytest.fixture
def decoder() -> Program:
    return with_tokenizer(causal_lm())


def windows(path: Path, program: Program, tokens: int = 10_000, width: int = 8) -> list[Window]:
    return list(open_windows(path, program_interface(program), tokens, width))


def ids(path: Path, program: Program, **options: int) -> list[list[int]]:
    return [window.arrays["input_ids"][0].tolist() for window in windows(path, program, **options)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_is_one_stream_of_windows(decoder: Program, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "abcdefgh\nij")
    assert ids(path, decoder) == [[BOS, 2, 3, 4, 5, 6, 7, 8], [BOS, 9, 29, 10, 11]]
    assert ids(path, decoder, tokens=10) == [[BOS, 2, 3, 4, 5, 6, 7, 8], [BOS, 9]]
    assert ids(path, with_tokenizer(causal_lm(), around=False), width=6) == [[2, 3, 4, 5, 6, 7], [8, 9, 29, 10, 11]]


def test_long_text_does_not_depend_on_the_blocks(decoder: Program, tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / "a.txt", "ab cd ef\n" * 30 + "x" * 50)
    whole = ids(path, decoder)
    for size in (1, 7, 64):
        monkeypatch.setattr("effc.verify.calibration_files.BLOCK", size)
        assert ids(path, decoder) == whole


def test_encoders_get_the_marks_of_both_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "abcdefg")
    assert ids(path, with_tokenizer(encoder()), width=6) == [[BOS, 2, 3, 4, 5, EOS], [BOS, 6, 7, 8, EOS]]


def test_json_lines(decoder: Program, tmp_path: Path) -> None:
    lines = ['{"text": "ab"}', "", '"c"', '{"prompt": "d", "completion": "e"}', '{"prompt": "f", "x": 1}', "  "]
    path = write(tmp_path / "a.jsonl", "\r\n".join([*lines, '{"input_ids": [5, 36]}', '{"text": ""}']))
    assert ids(path, decoder) == [[BOS, 2, 3], [BOS, 4], [BOS, 5, 6], [BOS, 7], [5, 36]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is a list"),
        ('{"txt": "a"}', "line 2 has 'txt'; expected 'text'"),
        ('{"completion": "a"}', "line 2 has 'completion'"),
        ('{"text": 5}', "line 2: 'text' is a int"),
        ('{"prompt": "a", "completion": null}', "'completion' is a NoneType"),
        ('{"input_ids": [1, 37]}', "line 2: the id 37 is outside the vocabulary of 37"),
        ('{"input_ids": [-1]}', "the id -1 is outside"),
        ('{"input_ids": [true]}', "no flat list of whole numbers"),
        ('{"input_ids": [[1]]}', "no flat list of whole numbers"),
        ('{"text": "\\ud800"}', "line 2: holds characters that UTF-8 cannot express"),
        (b"\xff", "line 2 is not UTF-8"),
        ("[" * 100_000, "line 2 is not JSON"),
    ],
)
def test_bad_lines_are_named(decoder: Program, tmp_path: Path, line: str | bytes, message: str) -> None:
    content = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "a.jsonl", b'{"text": "ab"}\n' + content)
    with pytest.raises(InputError, match=message):
        open_calibration(path, decoder)


def test_files_that_are_none(decoder: Program, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "no.txt", "does not exist"),
        (tmp_path, "is no file"),
        (write(tmp_path / "a.txt", ""), "is empty"),
        (write(tmp_path / "b.txt", b"ab\xff"), "is not UTF-8"),
        (write(tmp_path / "a.json", "[]"), "name it .jsonl"),
        (write(tmp_path / "a.jsonl", "\n\n"), "no data"),
        (write(tmp_path / "a.npz", "no zip"), "no .npz file or is damaged"),
    ):
        with pytest.raises(InputError, match=message):
            open_calibration(path, decoder)
    with pytest.raises(InputError, match="came without a tokenizer"):
        open_calibration(write(tmp_path / "c.txt", "ab"), causal_lm())


def arrays(path: Path, **content: np.ndarray) -> Path:
    np.savez(path, **content)
    return path


def test_arrays_lose_their_padding(decoder: Program, tmp_path: Path) -> None:
    tokens = np.arange(2, 22, dtype=np.int32).reshape(2, 10)
    mask = np.ones((2, 10), np.int8)
    mask[0, :7], mask[1, 9:] = 0, 0
    path = arrays(tmp_path / "a.npz", input_ids=tokens, attention_mask=mask)
    assert ids(path, decoder) == [[9, 10, 11], [*range(12, 20)], [20]]
    assert ids(path, decoder, tokens=5) == [[9, 10, 11], [12, 13]]
    np.savez_compressed(path, input_ids=tokens)
    assert ids(path, decoder, width=5) == [[*range(start, start + 5)] for start in (2, 7, 12, 17)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ids": np.zeros((2, 3), int)}, "unknown names: ids. The model takes attention_mask, input_ids"),
        ({"attention_mask": np.ones((2, 3), int)}, "no array input_ids"),
        ({"input_ids": np.zeros((2, 3))}, "input_ids is float64, the model takes int64"),
        ({"input_ids": np.zeros(2, int)}, r"shape \[\], the model takes"),
        ({"input_ids": np.full((2, 3), 37)}, "sample 0: the id 37 is outside"),
        ({"input_ids": np.zeros((2, 3), int), "attention_mask": np.ones((1, 3), int)}, "unequal numbers of rows"),
        ({"input_ids": np.zeros((2, 3), int), "attention_mask": np.ones((2, 2), int)}, "must be 0 or 1 for every"),
        ({"input_ids": np.zeros((1, 3), int), "attention_mask": np.array([[1, 0, 1]])}, "without a gap"),
        ({"input_ids": np.zeros((1, 3), int), "position_ids": np.ones((1, 3), int)}, "Leave them out"),
        ({"input_ids": np.array([[1]], object)}, "Python objects"),
        ({"input_ids": np.int64(1)}, "single number"),
        ({"input_ids": np.zeros((3, 2), int).T}, "Fortran order"),
        ({"input_ids": np.zeros((0, 3), int)}, "no data"),
        ({"input_ids": np.zeros((2, 0), int)}, "has no tokens"),
        ({}, "no data"),
    ],
)
def test_bad_arrays(decoder: Program, tmp_path: Path, content: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_calibration(arrays(tmp_path / "a.npz", **content), decoder)


@pytest.mark.parametrize("part", [0.3, 0.6, 0.99])
def test_a_truncated_archive(decoder: Program, tmp_path: Path, part: float) -> None:
    path = arrays(tmp_path / "a.npz", input_ids=np.zeros((50, 30), int))
    content = path.read_bytes()
    write(path, content[: int(part * len(content))])
    with pytest.raises(InputError, match=r"a\.npz"):
        open_calibration(path, decoder)


def test_only_what_is_used_is_read(decoder: Program, tmp_path: Path) -> None:
    """The rest of the file is broken, and nobody notices."""
    path = write(tmp_path / "a.jsonl", '{"text": "abcdefgh"}\n' * 3 + "{{{")
    assert open_calibration(path, decoder, tokens=18).used == 18


def test_the_digest_is_that_of_the_windows(decoder: Program, tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", "abc")
    first = open_calibration(text, decoder)
    assert (first.windows, first.used) == (1, 4)
    assert open_calibration(write(tmp_path / "b.jsonl", json.dumps("abc")), decoder).digest == first.digest
    assert open_calibration(write(tmp_path / "c.txt", "abd"), decoder).digest != first.digest
    assert open_calibration(text, decoder, tokens=3).digest != first.digest
    assert "1 windows, 4 tokens" in first.describe()


def test_observed_values_are_those_of_whole_runs(decoder: Program, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '"abcdefghi"\n"x"\n"klm"\n')
    names = ["present.1.key", "t.0", "logits", "input_ids", "embed", "t.0"]
    data = open_calibration(path, decoder)
    before = len(list(decoder.graph))
    seen = list(data.observe(decoder, names))
    assert len(list(decoder.graph)) == before
    assert [values["t.0"].shape for values in seen] == [(1, 10, HIDDEN), (1, 2, HIDDEN), (1, 4, HIDDEN)]
    for values, row in zip(seen, ids(path, decoder, width=WINDOW), strict=True):
        assert values["input_ids"].tolist() == [row]
        assert values["embed"].shape == (VOCAB, HIDDEN)
        feed = {
            "input_ids": np.array([row]),
            "attention_mask": np.ones((1, len(row)), np.int64),
            "position_ids": np.arange(len(row))[None],
            **{
                f"past_key_values.{i}.{x}": np.zeros((1, HEADS, 0, HEAD), np.float32)
                for i in (0, 1)
                for x in ("key", "value")
            },
        }
        whole = evaluate(decoder.model, [feed])[0]
        for name in ("logits", "present.1.key"):
            np.testing.assert_array_equal(values[name], whole[name])


def test_little_room_changes_nothing(decoder: Program, tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / "a.jsonl", "".join(json.dumps("abcdefghij"[:n]) + "\n" for n in range(1, 10)))
    data = open_calibration(path, decoder)
    expected = [values["h.1"] for values in data.observe(decoder, ["h.1"])]
    calls = []

    def counted(model, feeds, **options):
        calls.append(len(feeds))
        return evaluate(model, feeds, **options)

    monkeypatch.setattr(calibration, "evaluate", counted)
    for room in (1, 2 * expected[-1].nbytes, 1 << 30):
        monkeypatch.setattr(calibration, "HELD_BYTES", room)
        for one, other in zip(expected, data.observe(decoder, ["h.1"]), strict=True):
            np.testing.assert_array_equal(one, other["h.1"])
    assert calls[:9] == [1] * 9
    assert calls[-2:] == [1, 8]


def test_a_name_that_is_not_there(decoder: Program, tmp_path: Path) -> None:
    data = open_calibration(write(tmp_path / "a.txt", "ab"), decoder)
    with pytest.raises(InputError, match="no value 'nothing'"):
        list(data.observe(decoder, ["logits", "nothing"]))
