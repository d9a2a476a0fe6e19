"""Perplexity at several context lengths against whole runs in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from tiny_tokenizer import BOS, with_tokenizer
from verify_models import causal_lm, encoder, write_engine
from verify_schemas import schema

from effc import verification
from effc.errors import UsageError
from effc.runtime.session import Engine, load
from effc.verify.long_context import measure_contexts

TEXT = "the quick brown fox jumps over 13 lazy dogs and runs into the wood where it meets 7 others of its kind. " * 20


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    folder = tmp_path_factory.mktemp("engines")
    made = {
        "native": write_engine(with_tokenizer(causal_lm()), folder / "native"),
        "portable": write_engine(with_tokenizer(causal_lm()), folder / "portable", portable=True),
        "other": write_engine(with_tokenizer(causal_lm(1)), folder / "other", portable=True),
        "bytes": write_engine(causal_lm(), folder / "bytes", portable=True),
        "encoder": write_engine(encoder(), folder / "encoder"),
    }
    return {name: load(path) for name, path in made.items()}


def losses(engine: Engine, window: list[int]) -> list[float]:
    """Nats of each token but the first, the window in one run."""
    ids = np.array([window])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    logits = engine.run(feed)["logits"][0].astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return [-logs[place, target] for place, target in enumerate(window[1:])]


def test_every_length_reads_the_same_tokens(engines: dict[str, Engine]) -> None:
    engine, reference = engines["other"], engines["portable"]
    lengths = [100, 300, 2]
    figures = measure_contexts(engine, reference, lengths, text=TEXT, tokens=700)
    for figure in figures:
        jsonschema.validate(figure, schema("verify")["properties"]["contexts"]["items"])
    assert [figure["context"] for figure in figures] == lengths
    ids = reference.tokenizer.encode(TEXT)[1:][: 2 * 299]
    for figure in figures:
        width = figure["context"] - 1
        windows = [[BOS, *ids[start : start + width]] for start in range(0, len(ids), width)]
        assert figure["tokens"] == len(ids)
        for side, one in (("source", reference), ("engine", engine)):
            expected = [losses(one, window) for window in windows]
            assert figure[side] == pytest.approx(math.exp(np.mean(np.concatenate(expected))), rel=1e-5)
            for bucket in figure["positions"]:
                there = [
                    row[place - 1]
                    for row in expected
                    for place in range(bucket["begin"], bucket["end"])
                    if 0 < place <= len(row)
                ]
                assert bucket["tokens"] == len(there)
                assert bucket[side] == pytest.approx(np.mean(there), rel=1e-5)
        assert figure["ratio"] == pytest.approx(figure["engine"] / figure["source"])
    assert [(b["begin"], b["end"]) for b in figures[1]["positions"]] == [(0, 128), (128, 256), (256, 300)]
    assert [(b["begin"], b["end"]) for b in figures[2]["positions"]] == [(0, 2)]


@pytest.mark.parametrize("name", ["native", "portable"])
def test_the_chunk_does_not_matter_to_an_exact_cache(engines: dict[str, Engine], name: str) -> None:
    engine = engines[name]
    one, other = (measure_contexts(engine, engine, [130], text=TEXT, chunk=size)[0] for size in (1, 1000))
    assert one["engine"] == pytest.approx(other["engine"], rel=1e-6)
    assert one["source"] == one["engine"]


def test_without_a_tokenizer_bytes_are_read(engines: dict[str, Engine]) -> None:
    said: list[str] = []
    (figure,) = measure_contexts(
        engines["bytes"], engines["bytes"], [64], text=TEXT, tokens=10, progress=lambda stage, *_: said.append(stage)
    )
    assert figure["tokens"] == 63
    assert said == ["perplexity at a context of 64 tokens"]


def test_refusals(engines: dict[str, Engine]) -> None:
    engine = engines["portable"]
    assert measure_contexts(engine, engine, []) == []
    with pytest.raises(UsageError, match="its task is encoder"):
        measure_contexts(engines["encoder"], engines["encoder"], [64])
    with pytest.raises(UsageError, match="context 1: give at least 2"):
        measure_contexts(engine, engine, [64, 1])
    with pytest.raises(UsageError, match="the text has 2 tokens, a context of 64 needs 63"):
        measure_contexts(engine, engine, [64], text="ab")


def test_positions_have_an_end(engines: dict[str, Engine], tmp_path: Path) -> None:
    program = causal_lm()
    program.source = replace(program.source, config={**program.source.config, "max_position_embeddings": 96})
    short = load(write_engine(program, tmp_path / "short", portable=True))
    for pair in ((short, engines["bytes"]), (engines["bytes"], short)):
        assert measure_contexts(*pair, [96], text=TEXT)[0]["tokens"] > 0
        with pytest.raises(UsageError, match="context 97: the model has positions for 96"):
            measure_contexts(*pair, [97], text=TEXT)


def test_all_of_it_in_one_object_and_on_one_page(engines: dict[str, Engine], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    said: list[str] = []
    result = verification.verify(
        engines["native"].folder,
        engines["portable"].folder,
        text=TEXT,
        tokens=60,
        context=30,
        contexts=[50, 20],
        passkey=[450],
        passkey_depths=[0, 100],
        passkey_samples=1,
        passkey_keys=2,
        chunk=16,
        budget="perplexity=1.001",
        report=page,
        progress=lambda stage, done, total: said.append(stage),
    )
    jsonschema.validate(result, schema("verify"))
    assert result["holds"]
    assert [figure["ratio"] for figure in result["contexts"]] == pytest.approx([1, 1], abs=1e-5)
    assert result["passkey"]["chunk"] == 16
    assert result["passkey"]["engine"] == result["passkey"]["source"]
    assert len(said) == 2 + 1 + 2
    assert page.read_text(encoding="utf-8").count("<svg") == 3
