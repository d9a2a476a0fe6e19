"""Prefixes of a tiny model: what they hold, how texts go on from them, and everything that can be wrong with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from effc.errors import EffcError, EngineError, OutputError, UsageError
from effc.runtime.bundle import numbers_hash
from effc.runtime.prefix_folder import ALIGNMENT, DATA, MANIFEST
from effc.runtime.session import Engine, load

MODES = ("in-place", "growing")
MakeLm = Callable[..., Path]
NO_EOS = {"vocab_size": 260, "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1}
START = "The quick brown fox. "
IDS = [9, 200, 3, 77, 5]


@pytest.fixture
def engine(make_lm: MakeLm) -> Engine:
    return load(make_lm("growing", config=NO_EOS))


@pytest.fixture
def prefix(engine: Engine, tmp_path: Path) -> Path:
    """A prefix of `START`."""
    engine.write_prefix(START, tmp_path / "prefix")
    return tmp_path / "prefix"


def with_specials(tokenizer: tokenizers.Tokenizer, template: str) -> str:
    """The tokenizer as JSON, adding specials as the template says."""
    changed = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    changed.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    return changed.to_str()


@pytest.mark.parametrize("mode", MODES)
def test_greedy_equals_the_model_without_a_cache(make_lm: MakeLm, lm_oracle: Any, tmp_path: Path, mode: str) -> None:
    with load(make_lm(mode, config=NO_EOS)) as engine:
        for length in (1, 2, 30):
            start = [int(item) for item in np.random.default_rng(length).integers(0, 260, length)]
            said = engine.write_prefix(start, tmp_path / "prefix")
            assert said["tokens"] == length
            assert said["bytes"] == sum(path.stat().st_size for path in (tmp_path / "prefix").iterdir())
            for prompt in ([9], IDS):
                (result,) = engine.generate([prompt], max_new_tokens=12, prefix=tmp_path / "prefix")
                assert result.token_ids == lm_oracle.greedy([*start, *prompt], 12)
                assert (result.prompt_tokens, result.prefix_tokens) == (len(prompt), length)
                again = engine.generate([prompt], max_new_tokens=12, prefix=tmp_path / "prefix", prefill_chunk=2)
                assert again[0].token_ids == result.token_ids


def test_prompts_of_any_lengths_equal_the_whole_in_every_way(engine: Engine, prefix: Path) -> None:
    prompts = ["a", "hello there", "ü", "b", "the lazy dogs"]
    for options in (
        {},
        {"temperature": 0.9, "top_k": 30, "seed": 4},
        {"repetition_penalty": 1.5},
        {"stop": ["e", "qu"]},
    ):
        pieces: dict[int, str] = dict.fromkeys(range(5), "")

        def stream(row: int, text: str, pieces: dict[int, str] = pieces) -> None:
            pieces[row] += text

        whole = engine.generate([START + text for text in prompts], max_new_tokens=20, **options)
        found = engine.generate(prompts, max_new_tokens=20, prefix=prefix, stream=stream, **options)
        assert [(one.text, one.token_ids, one.finish_reason) for one in found] == [
            (one.text, one.token_ids, one.finish_reason) for one in whole
        ]
        assert [pieces[row] for row in range(5)] == [one.text for one in found]
        assert {one.prefix_tokens for one in found} == {len(START)}
        assert {one.prefix_tokens for one in whole} == {0}
    assert engine.generate([], prefix=prefix) == []


def test_what_the_folder_holds(engine: Engine, prefix: Path) -> None:
    manifest = json.loads((prefix / MANIFEST).read_text())
    data = (prefix / DATA).read_bytes()
    assert {key: manifest[key] for key in ("format", "version", "text", "tokens", "cache_mode", "target")} == {
        "format": "effc-prefix", "version": 1, "text": START, "tokens": 21, "cache_mode": "growing",
        "target": "ort-cpu",
    }  # fmt: skip
    assert manifest["engine"] == numbers_hash(engine.manifest)
    assert [(one["role"], one["name"]) for one in manifest["tensors"]] == [
        ("tokens", "token_ids"),
        *(("cache", f"past_key_values.{layer}.{name}") for layer in (0, 1) for name in ("key", "value")),
    ]
    assert all(one["offset"] % ALIGNMENT == 0 for one in manifest["tensors"])
    (tokens, key, *_) = manifest["tensors"]
    assert np.frombuffer(data, "<i8", 21, tokens["offset"]).tolist() == engine.tokenizer.encode(START)
    assert key["shape"] == [1, 2, 21, 8]
    ids = np.array([engine.tokenizer.encode(START)])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(21)[None]}
    state = engine.new_state(1)
    state.run(feed, [])
    saved = np.frombuffer(data, "<f4", 2 * 21 * 8, key["offset"]).reshape(1, 2, 21, 8)
    assert np.array_equal(saved, state.snapshot()["past_key_values.0.key"])


def test_the_file_is_never_written_to(engine: Engine, prefix: Path) -> None:
    before = (prefix / DATA).read_bytes()
    opened = engine.open_prefix(prefix)
    for array in opened.tensors.values():
        array[:] = 7
    engine.generate(["a", "b"], prefix=prefix)
    assert (prefix / DATA).read_bytes() == before


@pytest.mark.parametrize(
    ("template", "lead", "end"), [("<bos> $A", [1], []), ("<bos> $A <eos>", [1], [2]), ("$A <eos>", [], [2])]
)
def test_special_tokens_around_a_text(
    make_lm: MakeLm, lm_assets: dict[str, Any], bytes_tokenizer: tokenizers.Tokenizer, tmp_path: Path, template: str,
    lead: list[int], end: list[int],
) -> None:  # fmt: skip
    assets = {**lm_assets, "tokenizer.json": with_specials(bytes_tokenizer, template)}
    with load(make_lm("growing", config=NO_EOS, assets=assets)) as engine:
        plain = engine.tokenizer.encode("abc", add_special_tokens=False)
        assert engine.tokenizer.encode_start("abc") == [*lead, *plain]
        engine.write_prefix("abc", tmp_path / "prefix")
        assert engine.open_prefix(tmp_path / "prefix").token_ids == [*lead, *plain]
        (result,) = engine.generate("de", prefix=tmp_path / "prefix", max_new_tokens=9)
        (whole,) = engine.generate("abcde", max_new_tokens=9)
        assert result.prompt_tokens == 2 + len(end)
        assert result.token_ids == whole.token_ids
        if lead:
            with pytest.raises(UsageError, match="prompt 1: begins with token 1, with which"):
                engine.generate([[5], [1, 5]], prefix=tmp_path / "prefix")


def test_a_prompt_that_changes_the_end_of_the_prefix_is_refused(
    make_lm: MakeLm, lm_assets: dict[str, Any], tmp_path: Path
) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet, "ab"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    with load(make_lm("growing", config=NO_EOS, assets={**lm_assets, "tokenizer.json": tokenizer.to_str()})) as engine:
        engine.write_prefix("xa", tmp_path / "prefix")
        with pytest.raises(UsageError, match=r"prompt 1: does not continue .*prefix.*'b c' make other tokens"):
            engine.generate(["c", "b c"], prefix=tmp_path / "prefix")
        manifest = json.loads((tmp_path / "prefix" / MANIFEST).read_text())
        (tmp_path / "prefix" / MANIFEST).write_text(json.dumps({**manifest, "text": "xb"}))
        with pytest.raises(UsageError, match="makes other tokens of its text now"):
            engine.generate("c", prefix=tmp_path / "prefix")


def test_texts_go_on_from_ids(engine: Engine, lm_oracle: Any, tmp_path: Path) -> None:
    engine.write_prefix(IDS, tmp_path / "prefix")
    (result,) = engine.generate("ab", prefix=tmp_path / "prefix", max_new_tokens=4)
    assert result.token_ids == lm_oracle.greedy([*IDS, *engine.tokenizer.encode("ab")], 4)


def test_the_limit_of_the_model_counts_the_prefix(engine: Engine, tmp_path: Path) -> None:
    engine.write_prefix([7] * 90, tmp_path / "prefix")
    results = engine.generate([[7] * 6, [7] * 4], prefix=tmp_path / "prefix", max_new_tokens=20)
    assert [len(result.token_ids) for result in results] == [1, 3]
    with pytest.raises(UsageError, match="prompt 0 has 97 tokens, the model takes at most 96"):
        engine.generate([[7] * 7], prefix=tmp_path / "prefix")
    with pytest.raises(UsageError, match="the prefix has 96 tokens, the model takes at most 96"):
        engine.write_prefix([7] * 96, tmp_path / "prefix")


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    ("", {}, "the prefix is empty"),
    ([], {}, "the prefix is empty"),
    ([260], {}, "the prefix: an id is outside the vocabulary"),
    ([1.5], {}, "other than whole numbers"),
    (7, {}, "the prefix is a int"),
    ("a\udcff", {}, "not UTF-8"),
    ("a", {"prefill_chunk": 0}, "prefill_chunk is 0"),
]


@pytest.mark.parametrize(("text", "options", "message"), WRONG)
def test_wrong_requests_write_nothing(
    engine: Engine, prefix: Path, text: Any, options: dict[str, Any], message: str
) -> None:
    before = (prefix / MANIFEST).read_bytes()
    with pytest.raises(UsageError, match=message):
        engine.write_prefix(text, prefix, **options)
    assert (prefix / MANIFEST).read_bytes() == before
    assert not [path for path in prefix.parent.iterdir() if "partial" in path.name]


def test_a_failure_leaves_the_old_prefix(engine: Engine, prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("effc.runtime.write_prefix.write_synced", fail)
    with pytest.raises(KeyboardInterrupt):
        engine.write_prefix("other", prefix)
    assert engine.open_prefix(prefix).manifest.text == START
    assert not [path for path in prefix.parent.iterdir() if "partial" in path.name]


def test_a_prefix_is_replaced_and_nothing_else(engine: Engine, prefix: Path) -> None:
    engine.write_prefix("other", prefix)
    assert json.loads((prefix / MANIFEST).read_text())["text"] == "other"
    for place in (engine.folder, prefix / MANIFEST):
        with pytest.raises(OutputError, match="Name"):
            engine.write_prefix("other", place)


def test_engines_that_cannot(make_lm: MakeLm, tmp_path: Path) -> None:
    with load(make_lm(assets={})) as engine, pytest.raises(EngineError, match=r"tokenizer\.json: is missing"):
        engine.write_prefix("a", tmp_path / "prefix")
    with load(make_lm(task="encoder")) as engine, pytest.raises(UsageError, match="only causal-lm"):
        engine.write_prefix("a", tmp_path / "prefix")
    with load(make_lm()) as engine:
        engine.write_prefix("a", tmp_path / "prefix")
        object.__setattr__(engine.manifest, "cache", None)
        for run in (engine.write_prefix, lambda text, place: engine.generate(text, prefix=place)):
            with pytest.raises(EngineError, match="carries no cache"):
                run("a", tmp_path / "prefix")


def test_another_engine_is_refused(make_lm: MakeLm, prefix: Path, engine: Engine) -> None:
    opened = engine.open_prefix(prefix)
    with load(make_lm("in-place", config=NO_EOS)) as other:
        for given in (prefix, opened):
            with pytest.raises(UsageError, match="computed with another engine"):
                other.generate("a", prefix=given)


def test_another_tokenizer_or_text_is_the_same_engine(make_lm: MakeLm, lm_assets: dict[str, Any], prefix: Path) -> None:
    assets = {**lm_assets, "generation_config.json": {"eos_token_id": 5}, "chat_template.jinja": "{{ bos_token }}"}
    with load(make_lm("growing", config=NO_EOS, assets=assets)) as engine:
        assert engine.generate("a", prefix=prefix)[0].prefix_tokens == len(START)
        with pytest.raises(UsageError, match="is plain text, which no chat template continues"):
            engine.generate("a", prefix=prefix, chat=True)


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}[assistant]"
DATED = "{{ strftime_now('%f') }}" + TEMPLATE
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"


def test_chats_go_on_from_their_system_message(make_lm: MakeLm, lm_assets: dict[str, Any], tmp_path: Path) -> None:
    with load(make_lm("growing", config=NO_EOS, assets={**lm_assets, "chat_template.jinja": TEMPLATE})) as engine:
        said = engine.write_prefix("Be kind.", tmp_path / "prefix", chat=True)
        assert said["tokens"] == 1 + len("[system]Be kind.\n[user]")
        for message in ("hello", "1", "\n\n", "é"):
            (found,) = engine.generate(message, chat=True, prefix=tmp_path / "prefix", max_new_tokens=5)
            text = f"<bos>[system]Be kind.\n[user]{message}\n[assistant]"
            assert found.prefix_tokens + found.prompt_tokens == len(engine.tokenizer.encode(text))
            assert found.token_ids == engine.generate(text, max_new_tokens=5)[0].token_ids
        with pytest.raises(UsageError, match=r"is the beginning of a chat\. Generate with chat"):
            engine.generate("a", prefix=tmp_path / "prefix")
        with pytest.raises(UsageError, match="prompt 0 is a list of ids; chat takes texts"):
            engine.generate([[5]], chat=True, prefix=tmp_path / "prefix")
        with pytest.raises(UsageError, match="the prefix is a list of ids; chat takes a text"):
            engine.write_prefix(IDS, tmp_path / "prefix", chat=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "has no chat template"), (NO_SYSTEM, "no system message"), ("{{ messages[1]['content'] }}", "no tokens")],
)
def test_templates_without_a_place_for_a_system_message(
    make_lm: MakeLm, lm_assets: dict[str, Any], tmp_path: Path, template: str | None, message: str
) -> None:
    assets = {**lm_assets, "chat_template.jinja": template} if template else lm_assets
    with load(make_lm(assets=assets)) as engine, pytest.raises(UsageError, match=message):
        engine.write_prefix("Be kind.", tmp_path / "prefix", chat=True)


def test_a_template_that_changes_with_the_time_is_told(
    make_lm: MakeLm, lm_assets: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(make_lm("growing", config=NO_EOS, assets={**lm_assets, "chat_template.jinja": DATED})) as engine:
        monkeypatch.setattr("effc.runtime.chat._strftime_now", lambda pattern: "Monday")
        engine.write_prefix("Be kind.", tmp_path / "prefix", chat=True)
        engine.generate("a", chat=True, prefix=tmp_path / "prefix")
        monkeypatch.setattr("effc.runtime.chat._strftime_now", lambda pattern: "Tuesday")
        with pytest.raises(UsageError, match="chat template makes other tokens of its text now"):
            engine.generate("a", chat=True, prefix=tmp_path / "prefix")


def _flip(folder: Path, offset: int) -> None:
    data = bytearray((folder / DATA).read_bytes())
    data[offset] ^= 1
    (folder / DATA).write_bytes(data)


def test_every_flipped_byte_is_found(engine: Engine, prefix: Path) -> None:
    for tensor in json.loads((prefix / MANIFEST).read_text())["tensors"]:
        for offset in (tensor["offset"], tensor["offset"] + tensor["bytes"] - 1):
            _flip(prefix, offset)
            with pytest.raises(EngineError, match=f"the bytes of '{tensor['name']}' are not those that were written"):
                engine.generate("a", prefix=prefix)
            if tensor["role"] == "cache":
                assert engine.open_prefix(prefix, check=False).length == len(START)
            _flip(prefix, offset)
    engine.generate("a", prefix=prefix)


def test_data_that_is_cut_longer_missing_or_a_link(engine: Engine, prefix: Path) -> None:
    data = (prefix / DATA).read_bytes()
    for wrong in (data[:-1], b"", data + b"\0"):
        (prefix / DATA).write_bytes(wrong)
        with pytest.raises(EngineError, match=f"has {len(wrong)} bytes, {len(data)} were written"):
            engine.generate("a", prefix=prefix)
    (prefix / DATA).unlink()
    with pytest.raises(EngineError, match="missing or not a plain file"):
        engine.generate("a", prefix=prefix)
    (prefix.parent / "elsewhere").write_bytes(data)
    (prefix / DATA).symlink_to(prefix.parent / "elsewhere")
    with pytest.raises(EngineError, match="missing or not a plain file"):
        engine.generate("a", prefix=prefix)


def _tensor(index: int, **change: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def changed(manifest: dict[str, Any]) -> dict[str, Any]:
        tensors = [dict(tensor) for tensor in manifest["tensors"]]
        tensors[index] |= change
        return {**manifest, "tensors": tensors}

    return changed


def _tensors(change: Callable[[list[Any]], list[Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda manifest: {**manifest, "tensors": change(manifest["tensors"])}


MANIFESTS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda manifest: [manifest], "is not a manifest of a prefix"),
    (lambda manifest: {**manifest, "format": "effc-engine"}, "is not a manifest of a prefix"),
    (lambda manifest: {**manifest, "version": 99}, "format version 99, this effc reads 1"),
    (lambda manifest: {**manifest, "version": "1"}, "format version '1'"),
    (lambda manifest: {**manifest, "file": "../prefix.bin"}, "leaves its folder"),
    (lambda manifest: {**manifest, "file": "/etc/passwd"}, "leaves its folder"),
    (lambda manifest: {**manifest, "file": "a\\b"}, "leaves its folder"),
    (lambda manifest: {**manifest, "file": 3}, "missing or malformed"),
    (lambda manifest: {**manifest, "file": MANIFEST}, "bytes, .* were written"),
    (lambda manifest: {key: manifest[key] for key in manifest if key != "engine"}, "'engine'"),
    (lambda manifest: {**manifest, "text": 3}, r"malformed \(text\)"),
    (lambda manifest: {**manifest, "chat": "no"}, r"malformed \(chat\)"),
    (lambda manifest: {**manifest, "tokens": 0}, r"malformed \(tokens\)"),
    (lambda manifest: {**manifest, "tokens": True}, r"malformed \(tokens\)"),
    (lambda manifest: {**manifest, "tokens": 20}, "tensor of tokens"),
    (lambda manifest: {**manifest, "bytes": -1}, "malformed"),
    (_tensors(lambda tensors: tensors[:-1]), r"differ in past_key_values\.1\.value"),
    (_tensors(lambda tensors: tensors[1:]), "tensor of tokens"),
    (_tensors(lambda tensors: [*tensors, tensors[-1]]), "named twice"),
    (_tensors(lambda tensors: [*tensors, {**tensors[-1], "name": "more"}]), "differ in more"),
    (_tensors(lambda tensors: {"a": 1}), "malformed"),
    (_tensors(lambda tensors: [3]), "malformed"),
    (_tensor(1, offset=8), "offset"),
    (_tensor(1, offset=-64), "offset"),
    (_tensor(1, offset=1 << 40), "bytes"),
    (_tensor(1, offset="0"), "offset"),
    (_tensor(1, bytes=10**30), "bytes"),
    (_tensor(1, bytes=64), "bytes of its shape"),
    (_tensor(1, shape=[1, 2, 8, 21]), r"is float32\[1, 2, 8, 21\], the engine has float32\[1, 2, 21, 8\] after 21"),
    (_tensor(1, shape=[2, 1, 21, 8]), "the engine has"),
    (_tensor(1, shape=[1, 2, -21, -8]), "past_key_values.0.key': shape"),
    (_tensor(1, shape=7), "malformed"),
    (_tensor(1, dtype="int32"), r"is int32\[1, 2, 21, 8\], the engine has float32"),
    (_tensor(1, dtype="object"), "dtype 'object'"),
    (_tensor(1, dtype="f2,f2"), "dtype 'f2,f2'"),
    (_tensor(1, dtype="nothing"), "dtype 'nothing'"),
    (_tensor(1, dtype=None), "dtype None"),
    (_tensor(1, name=3), "name or role"),
    (_tensor(1, role=["cache"]), "name or role"),
    (_tensor(1, sha256=None), "are not those that were written"),
]


@pytest.mark.parametrize(("change", "message"), MANIFESTS)
def test_manifests_that_cannot_be_right(engine: Engine, prefix: Path, change: Any, message: str) -> None:
    path = prefix / MANIFEST
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(EngineError, match=message) as caught:
        engine.generate("a", prefix=prefix)
    assert str(prefix) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_manifests_that_are_no_json(engine: Engine, prefix: Path, content: bytes) -> None:
    (prefix / MANIFEST).write_bytes(content)
    with pytest.raises(EngineError, match=r"prefix\.json: is damaged"):
        engine.generate("a", prefix=prefix)


def test_places_without_a_prefix(engine: Engine, tmp_path: Path) -> None:
    for place in (tmp_path / "nothing", engine.folder, engine.folder / "model.onnx"):
        with pytest.raises(EngineError, match=r"is not a prefix folder.*effc prefix"):
            engine.generate("a", prefix=place)


def test_ids_outside_the_vocabulary_are_refused(make_lm: MakeLm, prefix: Path) -> None:
    with (
        load(make_lm("growing", config={**NO_EOS, "vocab_size": 50})) as engine,
        pytest.raises(EngineError, match="its tokens: an id is outside the vocabulary of 50"),
    ):
        engine.generate([[1]], prefix=prefix)


def test_tensors_of_other_roles_are_left_alone_but_checked(engine: Engine, prefix: Path) -> None:
    path = prefix / MANIFEST
    manifest = json.loads(path.read_text())
    extra = {**manifest["tensors"][1], "role": "notes", "dtype": "later", "shape": None, "new key": 1}
    path.write_text(json.dumps({**manifest, "tensors": [*manifest["tensors"], extra], "another": 2}))
    assert engine.generate("a", prefix=prefix)[0].prefix_tokens == len(START)
    path.write_text(json.dumps({**manifest, "tensors": [*manifest["tensors"], {**extra, "sha256": ""}]}))
    with pytest.raises(EngineError, match="are not those that were written"):
        engine.generate("a", prefix=prefix)


@pytest.mark.parametrize("mode", MODES)
def test_states_refuse_what_does_not_fit(make_lm: MakeLm, tmp_path: Path, mode: str) -> None:
    with load(make_lm(mode, config=NO_EOS)) as engine:
        engine.write_prefix(IDS, tmp_path / "prefix")
        tensors = engine.open_prefix(tmp_path / "prefix").tensors
        with pytest.raises(UsageError, match="at most 4 tokens, 5 were given"):
            engine.new_state(1, max_length=4).restore(tensors, 5)
        with pytest.raises(EngineError, match="after 4 tokens"):
            engine.new_state(1).restore(tensors, 4)
        with pytest.raises(EngineError, match="differ in"):
            engine.new_state(1).restore({}, 5)
        state = engine.new_state(3)
        assert state.snapshot()["past_key_values.0.key"].shape == (3, 2, 0, 8)
        state.restore(tensors, 5)
        with pytest.raises(UsageError, match="holds 5 tokens already"):
            state.restore(tensors, 5)
        for array in state.snapshot().values():
            assert array.shape == (3, 2, 5, 8)
            array[:] = 0
        assert all(array.any() for array in engine.open_prefix(tmp_path / "prefix").tensors.values())


def test_errors_are_ours() -> None:
    assert issubclass(OutputError, EffcError)
