"""Models with a cache: native engines against the source, rows against rows alone, chunks against the whole."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import effc
from effc.compiler import reference_engine
from effc.verify.inputs import FeedShape, attention_mask, manifest_interface
from effc.verify.steps import run_at

_spec = importlib.util.spec_from_file_location("effc_zoo", Path(__file__).parent / "architectures.py")
assert _spec is not None
assert _spec.loader is not None
_module = sys.modules.get("effc_zoo") or importlib.util.module_from_spec(_spec)
if "effc_zoo" not in sys.modules:
    sys.modules["effc_zoo"] = _module
    _spec.loader.exec_module(_module)

QUICK = ("gemma3",)
WITHOUT_CACHE = ("mamba",)
"""Models whose state is no cache of tokens."""
DECODERS = [
    item
    for item in _module.ZOO
    if item.model.endswith(("ForCausalLM", "LMHeadModel")) and item.name not in WITHOUT_CACHE
]
SHAPES = (FeedShape(3, 7, 0, True), FeedShape(2, 1, 9, True), FeedShape(1, 6, 19), FeedShape(2, 5, 40, True))
PROMPTS = (40, 3, 17)
NEW = 20


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(item, id=item.name, marks=() if item.name in QUICK else (pytest.mark.slow,)) for item in DECODERS],
)
def test_a_native_cache_computes_what_the_source_does(architecture: Any, tmp_path: Path) -> None:
    model = architecture.save(tmp_path / "model")
    effc.optimize(model, tmp_path / "engine", check=False)
    with effc.load(tmp_path / "engine") as engine, effc.load(reference_engine(model)) as plain:
        interface = manifest_interface(plain.manifest)
        for shape in SHAPES:
            expected, found = (run_at(one, interface, shape)["logits"] for one in (plain, engine))
            seen = attention_mask(interface, shape)[:, shape.past :] == 1
            scale = np.sqrt(np.mean(np.square(expected[seen])))
            assert np.abs(expected[seen] - found[seen]).max() <= 1e-4 * scale, str(shape)
        draw = np.random.default_rng(0)
        prompts = [draw.integers(3, 127, count).tolist() for count in PROMPTS]
        whole = [row.token_ids for row in engine.generate(prompts, max_new_tokens=NEW)]
        assert whole == [engine.generate([one], max_new_tokens=NEW)[0].token_ids for one in prompts]
        assert whole == [row.token_ids for row in engine.generate(prompts, max_new_tokens=NEW, prefill_chunk=7)]


SCHEMES = ("int8", "int4", "kivi", "zipcache", "mikv", "dense")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_cache_is_the_same_for_a_row_alone(scheme: str, llama_folder: Path, tmp_path: Path) -> None:
    pages = "" if scheme == "dense" else ",page=32,recent=16"
    result = effc.optimize(llama_folder, tmp_path / "engine", passes=f"kv-cache{{scheme={scheme}{pages}}}", check=False)
    assert result.manifest is not None and result.manifest.cache is not None
    assert result.manifest.cache.mode == "in-place"
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, 127, count).tolist() for count in (90, 3, 57)]
    with effc.load(tmp_path / "engine") as engine:
        together = [row.token_ids for row in engine.generate(prompts, max_new_tokens=80)]
        assert together == [engine.generate([one], max_new_tokens=80)[0].token_ids for one in prompts]
        state = engine.new_state(2)
        for name, value in state.nbytes(100).items():
            assert value > 0, name


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama; all schemes share its import."""
    return next(item for item in DECODERS if item.name == "llama").save(tmp_path_factory.mktemp("zoo") / "model")
