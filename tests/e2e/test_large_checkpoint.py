"""A 3 GB checkpoint in 8 shards is compiled in less than half its size of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KV_HEADS = 31, 2048, 5632, 32000, 16, 4
SHARDS = 8
LIMIT = 1.5e9


def _shapes() -> dict[str, tuple[int, ...]]:
    size = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (size, HIDDEN),
            "self_attn.v_proj": (size, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }.items():
            shapes[f"{prefix}{name}.weight"] = shape
    return {**shapes, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def _write_checkpoint(folder: Path) -> int:
    """Random weights of a Llama-style model; returns their bytes."""
    shapes = _shapes()
    names = list(shapes)
    generator = np.random.default_rng(0)
    weight_map, total = {}, 0
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = {}
        for name in names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]:
            values = generator.standard_normal(shapes[name], dtype=np.float32) * np.float32(0.02)
            part[name] = (values + (len(shapes[name]) == 1)).astype(ml_dtypes.bfloat16)
            total += part[name].nbytes
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


@pytest.mark.slow
def test_peak_memory_stays_below_half_the_weights(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    total = _write_checkpoint(tmp_path / "model")
    assert total > 3e9
    command = [sys.executable, "-m", "effc", "optimize", str(tmp_path / "model"), "-o", str(tmp_path / "engine")]
    command += ["--passes", "lossless-weights", "--json"]
    environment = {**os.environ, "EFFC_CACHE": str(tmp_path / "cache")}
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    summary = json.loads(finished.stdout)
    assert summary["bytes"]["source"] == total
    assert summary["bytes"]["engine"] < 0.675 * total
    assert summary["peak_rss"] < LIMIT, f"{summary['peak_rss'] / 1e9:.2f} GB"
