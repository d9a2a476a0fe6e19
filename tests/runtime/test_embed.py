"""Embedding: pooling against a plain loop, the files that steer it, order and batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from onnx import TensorProto, helper

from effc.errors import EngineError, UsageError
from effc.runtime.bundle import Port
from effc.runtime.embed import MODES, pool, pooling_modes, unit_length
from effc.runtime.session import load

DIM = 6
MakeEngine = Callable[..., Path]
TEXTS = ["b", "", "a longer text than the others", "hello", "héllo 👍", "b", "x" * 40]


@pytest.fixture
def make_encoder(tmp_path: Path, make_engine: MakeEngine, bytes_tokenizer: tokenizers.Tokenizer) -> MakeEngine:
    """An encoder whose token vector is its row of a table plus the mean over the text, so padding would show."""
    stored = tokenizers.Tokenizer.from_str(bytes_tokenizer.to_str())
    stored.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    stored.enable_padding(length=64)
    table = np.random.default_rng(0).standard_normal((260, DIM)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last_axis"], ["wide"]),
        helper.make_node("Mul", ["rows", "wide"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "middle_axis"], ["sum"], keepdims=1),
        helper.make_node("ReduceSum", ["wide", "middle_axis"], ["count"], keepdims=1),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        helper.make_node("Add", ["rows", "mean"], ["last_hidden_state"]),
    ]
    weights = {"table": table, "last_axis": np.array([2]), "middle_axis": np.array([1])}
    inputs = [Port(name, "int64", ["batch", "seq"]) for name in ("input_ids", "attention_mask")]
    outputs = [Port("last_hidden_state", "float32", ["batch", "seq", DIM])]

    def make(files: dict[str, Any] | None = None, **manifest: Any) -> Path:
        values = {"task": "encoder", "config": {"pad_token_id": 0}}
        assets = {"tokenizer.json": stored.to_str(), **(files or {})}
        return make_engine(nodes, inputs, outputs, weights, **{**values, **manifest}, assets=assets)

    make.table = table  # type: ignore[attr-defined]
    make.tokenizer = stored  # type: ignore[attr-defined]
    return make


def oracle(make_encoder: Any, text: str, limit: int | None = None) -> np.ndarray:
    """float64 token vectors of one text."""
    stored = tokenizers.Tokenizer.from_str(make_encoder.tokenizer.to_str())
    stored.no_padding()
    if limit:
        stored.enable_truncation(limit)
    rows = make_encoder.table[stored.encode(text).ids].astype(np.float64)
    return rows + rows.mean(axis=0)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_mean_in_input_order_whatever_the_batches(make_encoder: Any, batch_size: int) -> None:
    expected = np.array([oracle(make_encoder, text).mean(axis=0) for text in TEXTS])
    with load(make_encoder()) as engine:
        raw = engine.embed(TEXTS, batch_size=batch_size, normalize=False)
        unit = engine.embed(TEXTS, batch_size=batch_size)
    assert raw.dtype == unit.dtype == np.float32
    np.testing.assert_allclose(raw, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-5, atol=1e-6)


def test_no_texts_give_no_rows(make_encoder: Any) -> None:
    with load(make_encoder()) as engine:
        result = engine.embed([])
    assert (result.shape, result.dtype) == ((0, DIM), np.float32)


@pytest.mark.parametrize(
    ("modules", "normalize", "length_is_one"),
    [
        (["Transformer", "Pooling"], None, False),
        (["Transformer", "Pooling"], True, True),
        (["Transformer", "Pooling", "Normalize"], None, True),
        (["Transformer", "Pooling", "Normalize"], False, False),
        (None, None, True),
        (None, False, False),
    ],
)
def test_normalization_follows_the_model_unless_said(
    make_encoder: Any, modules: list[str] | None, normalize: bool | None, length_is_one: bool
) -> None:
    files = {"modules.json": [{"type": f"sentence_transformers.models.{name}"} for name in modules]} if modules else {}
    with load(make_encoder(files)) as engine:
        lengths = np.linalg.norm(engine.embed(TEXTS, normalize=normalize), axis=1)
    assert np.allclose(lengths, 1, atol=1e-5) == length_is_one


@pytest.mark.parametrize("source", ["sentence", "tokenizer", "config"])
def test_long_texts_are_cut_at_the_smallest_limit(make_encoder: Any, source: str) -> None:
    files = {
        "sentence_bert_config.json": {"max_seq_length": 9 if source == "sentence" else 50},
        "tokenizer_config.json": {"model_max_length": 9 if source == "tokenizer" else 50},
    }
    config = {"max_position_embeddings": 9 if source == "config" else 50}
    text = "x" * 20 + "y" * 20
    with load(make_encoder(files, config=config)) as engine:
        vector = engine.embed([text, "b"], normalize=False)[0]
    np.testing.assert_allclose(vector, oracle(make_encoder, text, 9).mean(axis=0), rtol=1e-5)


def test_texts_are_lowered_when_the_model_says(make_encoder: Any) -> None:
    with load(make_encoder({"sentence_bert_config.json": {"do_lower_case": True}})) as engine:
        upper, lower = engine.embed(["HELLO", "hello"])
    np.testing.assert_array_equal(upper, lower)


def test_pooling_file_is_followed(make_encoder: Any) -> None:
    config = {"word_embedding_dimension": DIM, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}
    with load(make_encoder({"1_Pooling_config.json": config})) as engine:
        result = engine.embed(TEXTS, normalize=False)
    for row, text in enumerate(TEXTS):
        hidden = oracle(make_encoder, text)
        np.testing.assert_allclose(result[row], np.concatenate([hidden[0], hidden.max(axis=0)]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_every_mode_against_a_loop_over_tokens(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = [1, 4, 7]
    hidden = rng.standard_normal((3, 7, 5)).astype(np.float32)
    mask = np.arange(7)[None, :] < np.array(lengths)[:, None]
    hidden[~mask] = np.nan  # what padding holds must not matter
    for row, length in enumerate(lengths):
        tokens = hidden[row, :length].astype(np.float64)
        places = np.arange(1, length + 1)[:, None]
        expected = {
            "cls": tokens[0],
            "max": tokens.max(axis=0),
            "mean": tokens.mean(axis=0),
            "mean_sqrt_len_tokens": tokens.sum(axis=0) / np.sqrt(length),
            "weightedmean": (tokens * places).sum(axis=0) / places.sum(),
            "lasttoken": tokens[-1],
        }
        assert set(expected) == set(MODES.values())
        for mode, vector in expected.items():
            np.testing.assert_allclose(pool(hidden, mask, [mode])[row], vector, rtol=1e-5, atol=1e-6)
    left = mask[:, ::-1]
    np.testing.assert_array_equal(pool(hidden[:, ::-1], left, ["lasttoken"]), hidden[:, 0])


def test_rows_without_tokens_pool_to_zero() -> None:
    hidden = np.ones((1, 3, 2), np.float32)
    for mode in MODES.values():
        np.testing.assert_array_equal(pool(hidden, np.zeros((1, 3), bool), [mode]), np.zeros((1, 2)))
    np.testing.assert_array_equal(unit_length(np.zeros((1, 2), np.float32)), np.zeros((1, 2)))


def test_pooling_configurations() -> None:
    assert pooling_modes({}) == ("mean",)
    assert pooling_modes({"pooling_mode": "cls"}) == ("cls",)
    assert pooling_modes({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}) == ("lasttoken",)
    for config in ({"pooling_mode": "magic"}, {"pooling_mode_magic": True}):
        with pytest.raises(EngineError, match="magic"):
            pooling_modes(config)


def test_an_unknown_module_is_refused(make_encoder: Any) -> None:
    modules = [{"type": "sentence_transformers.models.Dense"}]
    with load(make_encoder({"modules.json": modules})) as engine, pytest.raises(EngineError, match="module Dense"):
        engine.embed(["a"])


def test_wrong_requests_are_refused(make_encoder: Any) -> None:
    with load(make_encoder()) as engine:
        for texts, batch_size, message in (
            ("a", 1, "list of strings"),
            ([1], 1, "list of strings"),
            (["a"], 0, "batch_size"),
        ):
            with pytest.raises(UsageError, match=message):
                engine.embed(texts, batch_size=batch_size)
    with load(make_encoder(task="causal-lm")) as engine, pytest.raises(UsageError, match="only encoder engines"):
        engine.embed(["a"])


def test_graphs_that_cannot_be_pooled_are_refused(
    make_engine: MakeEngine, bytes_tokenizer: tokenizers.Tokenizer
) -> None:
    assets = {"tokenizer.json": bytes_tokenizer.to_str()}
    node = helper.make_node("Cast", ["input_ids"], ["scores"], to=TensorProto.FLOAT)
    ports = [Port("input_ids", "int64", ["batch", "seq"])], [Port("scores", "float32", ["batch", "seq"])]
    folder = make_engine([node], *ports, {}, task="encoder", assets=assets)
    with load(folder) as engine, pytest.raises(EngineError, match="embedding needs last_hidden_state"):
        engine.embed(["a"])


def test_a_pooled_output_is_taken_as_it_is(make_engine: MakeEngine, bytes_tokenizer: tokenizers.Tokenizer) -> None:
    assets = {"tokenizer.json": bytes_tokenizer.to_str()}
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "axis"], ["count"], keepdims=1),
        helper.make_node("Cast", ["count"], ["sentence_embedding"], to=TensorProto.FLOAT),
        helper.make_node("Identity", ["input_ids"], ["unused"]),
    ]
    inputs = [Port(name, "int64", ["batch", "seq"]) for name in ("input_ids", "attention_mask")]
    outputs = [Port("sentence_embedding", "float32", ["batch", 1]), Port("unused", "int64", ["batch", "seq"])]
    folder = make_engine(nodes, inputs, outputs, {"axis": np.array([1])}, task="encoder", assets=assets)
    with load(folder) as engine:
        np.testing.assert_array_equal(engine.embed(["abc", "", "a"], normalize=False), [[3], [0], [1]])
