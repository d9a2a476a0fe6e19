"""Models as they are exported today: every layer raised, few nodes left, equal outputs in awkward batches."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graph_programs import canonical, random_feeds, tolerance

from effc.frontends import import_model
from effc.ir.analysis.attention import attention_sites
from effc.ir.analysis.embedding import embedding_sites
from effc.ir.analysis.linear import linear_sites
from effc.ir.analysis.residual_blocks import residual_blocks
from effc.ir.program import Program

COMMON = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 128}
LLAMA = {**COMMON, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA = {**LLAMA, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8, "tie_word_embeddings": True}
GPT = {"vocab_size": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
MODELS = {
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]}, 26),
    "gpt2": ("GPT2Config", GPT, 28),
}
SLOW = {
    "llama": ("LlamaConfig", LLAMA, 28),
    "gemma2": ("Gemma2Config", {**GEMMA, "num_key_value_heads": 2}, 30),
    "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 8}, 30),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": 8}, 28),
    "phi": ("PhiConfig", {**LLAMA, "num_key_value_heads": 4, "partial_rotary_factor": 0.5}, 30),
    "gptj": ("GPTJConfig", {**GPT, "n_head": 2, "rotary_dim": 8}, 26),
    "cohere": ("CohereConfig", LLAMA, 28),
}
SIZES = ((1, 1, 0, 0), (1, 1, 9, 0), (2, 5, 0, 3), (3, 2, 7, 4), (1, 24, 3, 0))
"""(batch, seq, past, padding): empty past, one token, left-padded, more than one window."""


def _export(config_name: str, options: dict, folder: Path, dtype: str) -> Program:
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return import_model(folder, check=False)


def _session(program: Program, path: Path) -> ort.InferenceSession:
    ir.save(program.model, path, external_data=path.name + ".data")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _check_equal(source: Program, result: Program, folder: Path) -> None:
    sessions = [_session(program, folder / f"{name}.onnx") for name, program in (("before", source), ("after", result))]
    for batch, seq, past, padding in SIZES:
        feeds = random_feeds(source, {"batch": batch, "seq": seq, "past": past}, padding=padding)
        old, new = ([*session.run(None, feeds)] for session in sessions)
        for value, before, after in zip(source.graph.outputs, old, new, strict=True):
            assert not np.isnan(after).any()
            largest = float(np.abs(before).max(initial=0.0))
            difference = _seen(str(value.name), np.abs(before - after), padding, past)
            assert difference.max(initial=0.0) <= tolerance(before.dtype, largest)


def _seen(name: str, array: np.ndarray, padding: int, past: int) -> np.ndarray:
    """Zero where a token is padding: what such rows hold depends on the spelling of the mask, and nothing reads it."""
    if name.startswith("present"):
        array[0, :, :padding] = 0
    else:
        array[0, : max(padding - past, 0)] = 0
    return array


def _check_model(name: str, config_name: str, options: dict, per_layer: int, folder: Path, dtype: str) -> Program:
    source = _export(config_name, options, folder / name, dtype)
    result = canonical(source)
    sites = attention_sites(result.graph)
    assert len(sites) == 2
    assert all(site.understood and site.causal and site.past_key is not None for site in sites)
    assert [block.kind for block in residual_blocks(result.graph)][:1] == ["attention"]
    weights = {site.weight for site in linear_sites(result.graph)}
    computed = [node for node in result.graph if not _is_weight_route(node, weights)]
    assert len(computed) <= 2 * per_layer + 30
    assert result.weight_bytes() <= source.weight_bytes() + len(computed) * 256
    _check_equal(source, result, folder)
    return result


def _is_weight_route(node: ir.Node, weights: set[ir.Value]) -> bool:
    """Whether a node only converts or transposes a stored weight."""
    if node.op_type not in ("Cast", "Transpose"):
        return False
    value = node.inputs[0]
    while value is not None and value.producer() is not None and value.producer().op_type in ("Cast", "Transpose"):
        value = value.producer().inputs[0]
    return value in weights


@pytest.mark.parametrize("name", MODELS)
def test_decoder(name: str, tmp_path: Path) -> None:
    config, options, per_layer = MODELS[name]
    result = _check_model(name, config, options, per_layer, tmp_path, "bfloat16" if name == "gemma3" else "float32")
    if name == "gemma3":
        assert [site.window for site in attention_sites(result.graph)] == [8, None]
        assert [site.kv_heads for site in attention_sites(result.graph)] == [1, 1]
        (table,) = embedding_sites(result.graph)
        assert table.uses == 2
        assert table.weight.dtype == ir.DataType.BFLOAT16


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_decoders(name: str, tmp_path: Path) -> None:
    config, options, per_layer = SLOW[name]
    _check_model(name, config, options, per_layer, tmp_path, "float32")


def test_encoder(minilm_folder: Path, tmp_path: Path) -> None:
    source = import_model(minilm_folder, check=False)
    result = canonical(source)
    sites = attention_sites(result.graph)
    assert len(sites) == 6
    assert all(site.understood and not site.causal and site.padding is not None for site in sites)
    assert [block.kind for block in residual_blocks(result.graph)] == ["attention", "feed-forward"] * 6
    _check_equal(source, result, tmp_path)
