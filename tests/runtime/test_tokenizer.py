"""The tokenizer wrapper, chat templates in their sandbox, and the files they come from."""

from __future__ import annotations

import json
import lzma
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from effc.errors import EngineError, UsageError
from effc.runtime import assets as assets_module
from effc.runtime.assets import Assets
from effc.runtime.chat import find_template, render
from effc.runtime.limits import eos_ids, pad_id, position_limit
from effc.runtime.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "Hi <b>&"}]


def make_assets(folder: Path, files: dict[str, Any]) -> Assets:
    for name, content in files.items():
        data = (
            content
            if isinstance(content, bytes)
            else (content if isinstance(content, str) else json.dumps(content)).encode()
        )
        (folder / name).write_bytes(data)
    return Assets(folder, files)


def test_stored_padding_and_truncation_are_off(tmp_path: Path, bytes_tokenizer: tokenizers.Tokenizer) -> None:
    stored = tokenizers.Tokenizer.from_str(bytes_tokenizer.to_str())
    stored.enable_padding(length=128)
    stored.enable_truncation(4)
    tokenizer = Tokenizer(make_assets(tmp_path, {"tokenizer.json": stored.to_str()}))
    assert len(tokenizer.encode("abcdefgh")) == 8
    assert [len(ids) for ids, _ in tokenizer.encode_batch(["abcdefgh", "ab"], 5)] == [5, 2]
    assert len(tokenizer.encode("abcdefgh")) == 8
    assert tokenizer.size == 260


@pytest.mark.parametrize(("text", "message"), [("ab\udcff", "not UTF-8 at character 2"), (b"ab", "bytes, not str")])
def test_what_is_no_text_is_refused(
    tmp_path: Path, bytes_tokenizer: tokenizers.Tokenizer, text: Any, message: str
) -> None:
    tokenizer = Tokenizer(make_assets(tmp_path, {"tokenizer.json": bytes_tokenizer.to_str()}))
    with pytest.raises(UsageError, match=message):
        tokenizer.encode(text)
    with pytest.raises(UsageError, match=message):
        tokenizer.encode_batch(["good", text], None)


def test_special_tokens_come_from_either_file_in_either_form(
    tmp_path: Path, bytes_tokenizer: tokenizers.Tokenizer
) -> None:
    files = {
        "tokenizer.json": bytes_tokenizer.to_str(),
        "special_tokens_map.json": {"pad_token": {"content": "<pad>"}, "bos_token": "<eos>"},
        "tokenizer_config.json": {"bos_token": "<bos>", "eos_token": None, "model_max_length": 512},
    }
    tokenizer = Tokenizer(make_assets(tmp_path, files))
    assert tokenizer.special_tokens() == {"bos_token": "<bos>", "pad_token": "<pad>"}
    assert [tokenizer.special_id(name) for name in ("pad_token", "bos_token", "eos_token")] == [0, 1, None]
    assert tokenizer.max_length == 512


@pytest.mark.parametrize("value", [1e30, 1000000000000000019884624838656, None, "512", -1])
def test_a_huge_or_odd_length_is_no_limit(tmp_path: Path, bytes_tokenizer: tokenizers.Tokenizer, value: Any) -> None:
    files = {"tokenizer.json": bytes_tokenizer.to_str(), "tokenizer_config.json": {"model_max_length": value}}
    assert Tokenizer(make_assets(tmp_path, files)).max_length is None


def test_missing_and_damaged_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"tokenizer\.json: is missing"):
        Tokenizer(make_assets(tmp_path, {}))
    with pytest.raises(EngineError, match=r"tokenizer\.json: is damaged"):
        Tokenizer(make_assets(tmp_path, {"tokenizer.json": {"model": 1}}))


def test_compressed_assets_are_read(tmp_path: Path, bytes_tokenizer: tokenizers.Tokenizer) -> None:
    data = lzma.compress(bytes_tokenizer.to_str().encode())
    assert Tokenizer(make_assets(tmp_path, {"tokenizer.json.xz": data})).size == 260


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b"{", "is not JSON"),
        ("a.json", b"\xff", "is not UTF-8"),
        ("a.json", b"[1]", "holds no JSON object"),
        ("a.json.xz", b"plain", "cannot be read"),
        ("a.json.xz", lzma.compress(b"{}")[:-4], "cannot be read"),
        ("a.json.xz", lzma.compress(b"{}" * 200)[:20] + b"\0" * 20, "cannot be read"),
    ],
)
def test_damaged_assets_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(EngineError, match=rf"{name}: {message}"):
        make_assets(tmp_path, {name: data}).json_object("a.json")


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets_module, "SIZE_LIMIT", 1000)
    with pytest.raises(EngineError, match="is larger than"):
        make_assets(tmp_path, {"a.json.xz": lzma.compress(b" " * 100_000)}).read("a.json")


def test_files_the_manifest_does_not_list_are_invisible(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    assert Assets(tmp_path, []).read("a.json") is None


def test_templates_see_what_hugging_face_gives_them() -> None:
    template = (
        "{{ bos_token }}\n"
        "{%- for message in messages %}\n"
        "    {%- if message['role'] == 'skip' %}{% continue %}{% endif %}\n"
        "    {%- generation %}{{ message | tojson }}{% endgeneration %}\n"
        "{%- endfor %}\n"
        "{{- strftime_now('%Y') }}{% if add_generation_prompt %}>{% endif %}"
    )
    text = render(template, [{"role": "skip", "content": ""}, *MESSAGES], {"bos_token": "<s>"})
    assert text == '<s>{"role": "user", "content": "Hi <b>&"}' + datetime.now().strftime("%Y") + ">"


def test_tojson_takes_the_usual_arguments() -> None:
    assert render("{{ {'b': 1, 'a': 'é'} | tojson(indent=1, sort_keys=true) }}", [], {}) == '{\n "a": "é",\n "b": 1\n}'


def test_a_template_may_refuse() -> None:
    with pytest.raises(UsageError, match="refuses the conversation: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", MESSAGES, {})


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ undefined_name.attribute }}",
        "{% include 'x' %}",
    ],
)
def test_damaged_and_hostile_templates_fail_clearly(template: str) -> None:
    with pytest.raises(EngineError, match="chat template fails"):
        render(template, MESSAGES, {})


def test_where_a_template_is_found(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    cases = [
        ({}, None),
        ({"tokenizer_config.json": {}}, None),
        ({"tokenizer_config.json": {"chat_template": "C"}}, "C"),
        ({"tokenizer_config.json": {"chat_template": named}}, "D"),
        ({"tokenizer_config.json": {"chat_template": named[:1]}}, None),
        ({"tokenizer_config.json": {"chat_template": "C"}, "chat_template.json": {"chat_template": "J"}}, "J"),
        ({"chat_template.json": {"chat_template": "J"}, "chat_template.jinja": "F"}, "F"),
    ]
    for files, expected in cases:
        assert find_template(make_assets(tmp_path, files)) == expected


def test_a_chat_without_a_template_is_refused(tmp_path: Path, bytes_tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(make_assets(tmp_path, {"tokenizer.json": bytes_tokenizer.to_str()}))
    with pytest.raises(UsageError, match="has no chat template"):
        tokenizer.chat_prompt(MESSAGES)


def test_lengths_and_ids_from_configurations(tmp_path: Path) -> None:
    assert position_limit({"max_position_embeddings": 512}) == 512
    assert position_limit({"n_positions": 1024}) == 1024
    assert position_limit({"text_config": {"max_position_embeddings": 8}, "max_position_embeddings": 9}) == 8
    assert position_limit({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}) == 512
    assert position_limit({}) is None
    none = make_assets(tmp_path, {})
    assert eos_ids({"eos_token_id": 3}, none) == {3}
    assert eos_ids({"eos_token_id": [3, 4]}, none) == {3, 4}
    assert eos_ids({"eos_token_id": None}, none) == eos_ids({}, none) == frozenset()
    assert eos_ids({"text_config": {"eos_token_id": 7}, "eos_token_id": 8}, none) == {7}
    some = make_assets(tmp_path, {"generation_config.json": {"eos_token_id": [1, 106], "pad_token_id": 9}})
    assert eos_ids({"eos_token_id": 3}, some) == {1, 106}
    assert pad_id({"pad_token_id": 5}, some) == 9
    assert pad_id({"pad_token_id": 5}, none) == 5
    assert pad_id({"pad_token_id": None}, none) == pad_id({"pad_token_id": -1}, none) == 0
