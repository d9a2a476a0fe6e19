"""A DFloat11 folder becomes the checkpoint it was made from."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from effc.errors import InputError, OutputError
from effc.frontends.dfloat11 import import_dfloat11

_spec = importlib.util.spec_from_file_location("dfloat11_writer", Path(__file__).parent / "writer.py")
assert _spec is not None
assert _spec.loader is not None
writer = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(writer)

PARTS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
PATTERNS = {r"model\.layers\.\d+": PARTS, r"lm_head": [], r"model\.embed_tokens": []}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    folder = tmp_path_factory.mktemp("original")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def coded(original: Path, tmp_path: Path) -> Path:
    """The same checkpoint in the DFloat11 container."""
    folder = tmp_path / "coded"
    folder.mkdir()
    weights = load_file(original / "model.safetensors")
    arrays: dict[str, np.ndarray] = {}
    groups = {"lm_head": ["lm_head.weight"], "model.embed_tokens": ["model.embed_tokens.weight"]}
    groups |= {f"model.layers.{layer}": [f"model.layers.{layer}.{part}.weight" for part in PARTS] for layer in (0, 1)}
    for path, names in groups.items():
        flat = [weights.pop(name).view(np.uint16).reshape(-1) for name in names]
        group = writer.write_group(np.concatenate(flat))
        group["output_positions"] = group["output_positions"].view(np.uint8)
        group["split_positions"] = np.cumsum([part.size for part in flat])[:-1].astype(np.int64)
        arrays |= {f"{path}.{name}": array for name, array in group.items()}
    save_file({**arrays, **weights}, folder / "model.safetensors")
    config = json.loads((original / "config.json").read_text())
    config["dfloat11_config"] = {
        "version": "0.5.0",
        "threads_per_block": [512],
        "bytes_per_thread": 8,
        "pattern_dict": PATTERNS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_weight_comes_back_bit_for_bit(original: Path, coded: Path, tmp_path: Path) -> None:
    result = import_dfloat11(coded, tmp_path / "decoded")
    expected = load_file(original / "model.safetensors")
    found = {}
    for shard in (tmp_path / "decoded").glob("*.safetensors"):
        found |= load_file(shard)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found[name].view(np.uint16), array.view(np.uint16), err_msg=name)
    assert result["groups"] == 4
    assert result["weights"] == 16
    from effc.frontends import import_model

    program = import_model(tmp_path / "decoded", check=False)
    assert program.source.weight_bytes == sum(array.nbytes for array in expected.values())


def test_a_plain_checkpoint_is_refused(original: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no DFloat11 checkpoint"):
        import_dfloat11(original, tmp_path / "decoded")
    assert not (tmp_path / "decoded").exists()


def test_nothing_is_written_when_a_group_is_damaged(coded: Path, tmp_path: Path) -> None:
    arrays = load_file(coded / "model.safetensors")
    arrays["model.layers.1.gaps"] = arrays["model.layers.1.gaps"] ^ 0x55
    save_file(arrays, coded / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.layers\.1"):
        import_dfloat11(coded, tmp_path / "decoded")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coded"]


def test_an_occupied_output_is_refused(coded: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    with pytest.raises(OutputError, match="Name a new one"):
        import_dfloat11(coded, tmp_path / "mine")


@pytest.mark.parametrize("patterns", [{"model.layers.(": ["a"]}, {"lm_head": "weight"}, {"lm_head": [1]}])
def test_patterns_that_are_none_are_refused(coded: Path, tmp_path: Path, patterns: dict[str, object]) -> None:
    content = json.loads((coded / "config.json").read_text())
    content["dfloat11_config"]["pattern_dict"] = patterns
    (coded / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="pattern_dict"):
        import_dfloat11(coded, tmp_path / "decoded")


def test_arrays_of_another_type_are_refused(coded: Path, tmp_path: Path) -> None:
    arrays = load_file(coded / "model.safetensors")
    arrays["model.layers.0.luts"] = arrays["model.layers.0.luts"].astype(np.float32)
    save_file(arrays, coded / "model.safetensors")
    with pytest.raises(InputError, match=r"luts has type FLOAT"):
        import_dfloat11(coded, tmp_path / "decoded")
