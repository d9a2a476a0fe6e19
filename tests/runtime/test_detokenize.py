"""Text from tokens one by one: whole characters, the same text in the end, nothing of a stop string."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from effc.runtime.detokenize import GIVE_UP, PATIENCE, Detokenizer, StopFilter

TEXTS = [
    "",
    "a",
    "hello world",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family",
    "mixed é日👍 text",
    "  two  spaces ",
    "\n\ttabs\n",
]


def sentencepiece_like() -> tokenizers.Tokenizer:
    """As Llama 2 and Gemma: spaces as U+2581, unknown characters as byte tokens, the first space dropped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz",
              "▁hello", "▁world", "he", "llo"]  # fmt: skip
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def pieces_of(tokenizer: tokenizers.Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode, prompt or [])
    return [*(detokenizer.push(item) for item in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_pieces_join_to_the_decoded_whole(bytes_tokenizer: tokenizers.Tokenizer, kind: str, text: str) -> None:
    tokenizer = bytes_tokenizer if kind == "bytes" else sentencepiece_like()
    ids = tokenizer.encode(text).ids
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""


def test_a_space_after_the_prompt_stays(bytes_tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer = sentencepiece_like()
    hello, world = tokenizer.token_to_id("▁hello"), tokenizer.token_to_id("▁world")
    assert "".join(pieces_of(tokenizer, [world, world], [hello])) == " world world"
    assert "".join(pieces_of(tokenizer, [hello, world])) == "hello world"


def test_special_tokens_between_words_do_not_eat_the_space() -> None:
    tokenizer = sentencepiece_like()
    ids = [tokenizer.token_to_id(piece) for piece in ("▁hello", "<s>", "<s>", "▁world")]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids) == "hello world"


def test_a_character_comes_with_its_last_byte(bytes_tokenizer: tokenizers.Tokenizer) -> None:
    ids = bytes_tokenizer.encode("a👍b").ids
    assert pieces_of(bytes_tokenizer, ids) == ["a", "", "", "", "👍", "b", ""]


def test_an_incomplete_character_at_the_end_is_shown_as_such(bytes_tokenizer: tokenizers.Tokenizer) -> None:
    ids = bytes_tokenizer.encode("ok👍").ids[:-1]
    assert "".join(pieces_of(bytes_tokenizer, ids)) == bytes_tokenizer.decode(ids) == "ok\ufffd"


def test_endless_garbage_is_not_held_back_for_ever(bytes_tokenizer: tokenizers.Tokenizer) -> None:
    lead = bytes_tokenizer.encode("👍").ids[0]
    ids = [lead] * (3 * GIVE_UP)
    pieces = pieces_of(bytes_tokenizer, ids)
    assert "".join(pieces) == bytes_tokenizer.decode(ids)
    assert any(pieces[: 2 * GIVE_UP])


def test_tokens_that_never_end_with_a_character_still_stream() -> None:
    # Token 0 is the first three bytes of a thumb, token 1 the last byte and the first three of the next.
    thumb = "👍".encode()
    table = [thumb[:3], thumb[3:] + thumb[:3]]
    detokenizer = Detokenizer(lambda ids: b"".join(table[item] for item in ids).decode("utf-8", errors="replace"))
    pieces = [detokenizer.push(item) for item in [0] + [1] * 40]
    assert any(pieces[: PATIENCE + 3])
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == "👍" * 40 + "\ufffd"


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(3, 300), max_size=60))
def test_any_tokens_join_to_the_decoded_whole(ids: list[int]) -> None:
    table = BYTE_TABLE
    decode = lambda items: b"".join(table[item % 256] for item in items).decode("utf-8", errors="replace")  # noqa: E731
    detokenizer = Detokenizer(decode)
    pieces = [*(detokenizer.push(item) for item in ids), detokenizer.flush()]
    assert "".join(pieces) == decode(ids)


BYTE_TABLE = [bytes([byte]) for byte in range(256)]


@settings(deadline=None, max_examples=300)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=5), max_size=3), st.data())
def test_stop_filter_cuts_at_the_first_stop_however_the_text_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]
    stop_filter = StopFilter(stops)
    passed = ""
    for piece in pieces:
        passed += stop_filter.push(piece)
        # The text so far holds no stop string and nothing that could still become one.
        assert not any(stop in passed for stop in stops)
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert not stop_filter.stopped
        assert passed + stop_filter.flush() == text
    else:
        assert stop_filter.stopped
        assert text.startswith(passed)
        assert stop_filter.flush() == ""
        assert any(text[len(passed) :].startswith(stop) for stop in stops)


def test_stop_filter_holds_back_no_more_than_it_must() -> None:
    stop_filter = StopFilter(["</end>", "abc"])
    assert stop_filter.push("x<") == "x"
    assert stop_filter.push("/e") == ""
    assert stop_filter.push("xa") == "</ex"
    assert stop_filter.push("d") == "ad"
    assert stop_filter.push("z</end>tail") == "z"
    assert stop_filter.push("more") == ""
