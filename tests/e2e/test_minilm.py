"""all-MiniLM-L6-v2, a real fp32 encoder: coded embeddings are the uncoded ones bit for bit, and those of torch."""

from __future__ import annotations

import pydoc_data.topics
import re
from pathlib import Path

import numpy as np
import pytest

import effc

SENTENCES = 200


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    text = " ".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    found = [re.sub(r"\s+", " ", item).strip() for item in re.split(r"(?<=[.!?])\s", text)]
    chosen = [item for item in found if len(item) > 20][:SENTENCES]
    assert len(chosen) == SENTENCES
    return chosen


@pytest.fixture(scope="module")
def embeddings(
    minilm_folder: Path, sentences: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """Embeddings of the coded and of the uncoded engine, and the sizes of both."""
    found = {}
    for passes in ("lossless-weights", "stored-weights"):
        folder = tmp_path_factory.mktemp(passes) / "engine"
        result = effc.optimize(minilm_folder, folder, passes=passes)
        with effc.load(folder) as engine:
            found[passes] = engine.embed(sentences)
        found[passes + " bytes"] = np.array(result.summary["bytes"]["weights_stored"])
    return found


def test_coded_and_uncoded_embeddings_are_the_same_bits(embeddings: dict[str, np.ndarray]) -> None:
    coded, raw = embeddings["lossless-weights"], embeddings["stored-weights"]
    assert coded.shape == (SENTENCES, 384)
    np.testing.assert_array_equal(coded.view(np.uint32), raw.view(np.uint32))


def test_embeddings_are_those_of_torch(
    embeddings: dict[str, np.ndarray], minilm_folder: Path, sentences: list[str]
) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    model = AutoModel.from_pretrained(minilm_folder).eval()
    rows = []
    with torch.no_grad():
        for sentence in sentences:
            tokens = tokenizer(sentence, return_tensors="pt", truncation=True, max_length=256)
            rows.append(torch.nn.functional.normalize(model(**tokens).last_hidden_state.mean(1)).numpy()[0])
    np.testing.assert_allclose(embeddings["lossless-weights"], np.array(rows), atol=1e-5)


def test_the_coded_engine_is_smaller_by_what_fp32_allows(embeddings: dict[str, np.ndarray]) -> None:
    ratio = int(embeddings["lossless-weights bytes"]) / int(embeddings["stored-weights bytes"])
    assert 0.80 < ratio < 0.86
