"""Tiny engines made by hand: a two-layer attention model in both cache modes, an encoder, and their tokenizers."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tokenizers
from onnx import TensorProto, helper, numpy_helper
from tokenizers import decoders, models, pre_tokenizers

from effc.runtime.bundle import MANIFEST, CacheLayout, CachePort, Manifest, Port, sha256_file

HEADS, KV_HEADS, SIZE, LAYERS, POSITIONS = 4, 2, 8, 2, 96
HIDDEN = HEADS * SIZE
SPECIALS = ["<pad>", "<bos>", "<eos>", "<turn>"]
VOCABULARY = 256 + len(SPECIALS)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Byte level: one token a byte after four special tokens, so that a character may span several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def write_engine(
    folder: Path, model: onnx.ModelProto, *, assets: Mapping[str, Any] | None = None, **manifest: Any
) -> Path:
    """Write an engine folder around a graph; assets are objects (stored as JSON), text or bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    for name, content in (assets or {}).items():
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        data = content.encode("utf-8") if isinstance(content, str) else content
        (folder / name).write_bytes(lzma.compress(data) if name.endswith(".xz") else data)
    values: dict[str, Any] = {
        "effc_version": "0", "task": "generic", "target": "ort-cpu", "portable": True, "needs_kernels": False,
        "model": "model.onnx", "inputs": [], "outputs": [], "cache": None, "pipeline": "", "passes": [],
        "source": {}, "config": {}, "bytes": {}, "versions": {}, "opset": 24, "ir_version": 11,
    }  # fmt: skip
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in folder.iterdir()
        if path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(Manifest(**{**values, "files": files, **manifest}).to_json(), encoding="utf-8")
    return folder


def proto(
    nodes: list[onnx.NodeProto], inputs: Sequence[Port], outputs: Sequence[Port], weights: Mapping[str, np.ndarray]
) -> onnx.ModelProto:
    """A model of nodes, ports and initializers."""

    def info(port: Port) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(
            port.name, helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype)), port.shape
        )

    graph = helper.make_graph(
        nodes,
        "tiny",
        [info(port) for port in inputs],
        [info(port) for port in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def lm_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of the tiny language model, large enough that its argmax has clear margins."""
    rng = np.random.default_rng(seed)
    weights = {
        "tokens": rng.standard_normal((VOCABULARY, HIDDEN)),
        "positions": rng.standard_normal((POSITIONS, HIDDEN)),
        "head": rng.standard_normal((HIDDEN, VOCABULARY)),
    }
    for layer in range(LAYERS):
        for name, width in (("q", HIDDEN), ("k", KV_HEADS * SIZE), ("v", KV_HEADS * SIZE), ("o", HIDDEN)):
            inner = HIDDEN
            weights[f"{name}{layer}"] = rng.standard_normal((inner, width)) / np.sqrt(inner)
    return {name: value.astype(np.float32) for name, value in weights.items()}


class _Graph:
    """Collects nodes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, name: str, value: Any, dtype: Any) -> str:
        self.constants[name] = np.array(value, dtype)
        return name


def _mask_bias(graph: _Graph) -> None:
    """`bias` float [batch, 1, seq, total], -1e9 at padding; `batch`, `seq`, `total` as int64[1]."""
    graph.op("Shape", ["input_ids"], "batch_size", start=0, end=1)
    graph.op("Shape", ["input_ids"], "seq_size", start=1, end=2)
    graph.op("Shape", ["attention_mask"], "total_size", start=1, end=2)
    graph.op("Cast", ["attention_mask"], "mask_float", to=TensorProto.FLOAT)
    graph.op("Sub", ["mask_float", graph.constant("one", 1, np.float32)], "mask_minus")
    graph.op("Mul", ["mask_minus", graph.constant("big", 1e9, np.float32)], "mask_bias")
    graph.op("Unsqueeze", ["mask_bias", graph.constant("axes", [1, 2], np.int64)], "bias_narrow")
    graph.constant("one_long", [1], np.int64)
    graph.op("Concat", ["batch_size", "one_long", "seq_size", "total_size"], "bias_shape", axis=0)
    graph.op("Expand", ["bias_narrow", "bias_shape"], "bias")


def _attention(graph: _Graph, layer: int, mode: str, out: str) -> None:
    qkv = [f"{name}_proj{layer}" for name in "qkv"]
    past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
    present = [f"present.{layer}.key", f"present.{layer}.value"]
    if mode == "in-place":
        inputs = [*qkv, *past, "last", "total_scalar", "", "", "", "bias"]
        node = helper.make_node(
            "GroupQueryAttention",
            inputs,
            [out, *present],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
        )
    else:
        node = helper.make_node(
            "Attention", [*qkv, "bias", *past], [out, *present], is_causal=1, q_num_heads=HEADS, kv_num_heads=KV_HEADS
        )
    graph.nodes.append(node)


def lm_nodes(mode: str) -> _Graph:
    """Nodes of the language model: embeddings, layers of residual attention, head."""
    graph = _Graph()
    _mask_bias(graph)
    graph.op("Cast", ["total_size"], "total_int", to=TensorProto.INT32)
    graph.op("Squeeze", ["total_int"], "total_scalar")
    graph.op("Sub", ["total_int", graph.constant("one_int", [1], np.int32)], "last_one")
    graph.op("Expand", ["last_one", "batch_size"], "last")
    graph.op("Gather", ["tokens", "input_ids"], "token_rows")
    graph.op("Gather", ["positions", "position_ids"], "position_rows")
    hidden = graph.op("Add", ["token_rows", "position_rows"], "hidden")
    for layer in range(LAYERS):
        for name in "qkv":
            graph.op("MatMul", [hidden, f"{name}{layer}"], f"{name}_proj{layer}")
        _attention(graph, layer, mode, f"mixed{layer}")
        graph.op("MatMul", [f"mixed{layer}", f"o{layer}"], f"out{layer}")
        hidden = graph.op("Add", [hidden, f"out{layer}"], f"hidden{layer}")
    graph.op("MatMul", [hidden, "head"], "logits")
    return graph


def lm_ports(mode: str) -> tuple[list[Port], list[Port], CacheLayout]:
    inputs = [
        Port("input_ids", "int64", ["batch", "seq"]),
        Port("attention_mask", "int64", ["batch", "total"]),
        Port("position_ids", "int64", ["batch", "seq"]),
    ]
    outputs = [Port("logits", "float32", ["batch", "seq", VOCABULARY])]
    cache = [
        CachePort(
            f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}", "float32", ["batch", KV_HEADS, "past", SIZE]
        )
        for layer in range(LAYERS)
        for kind in ("key", "value")
    ]
    return inputs, outputs, CacheLayout(mode, cache)


LM_CONFIG = {
    "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
LM_ASSETS: dict[str, Any] = {
    "tokenizer.json": byte_tokenizer().to_str(),
    "tokenizer_config.json": {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": "<pad>"},
}


@dataclass(frozen=True)
class TinyLm:
    """The language model in NumPy float64, without a cache and without padding."""

    weights: Mapping[str, np.ndarray]

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float64[seq, vocabulary] of one row."""
        weights = {name: value.astype(np.float64) for name, value in self.weights.items()}
        hidden = weights["tokens"][list(ids)] + weights["positions"][: len(ids)]
        causal = np.tril(np.ones((len(ids), len(ids)), bool))
        for layer in range(LAYERS):
            query = (hidden @ weights[f"q{layer}"]).reshape(-1, HEADS, SIZE)
            key, value = ((hidden @ weights[f"{n}{layer}"]).reshape(-1, KV_HEADS, SIZE) for n in "kv")
            rows = []
            for head in range(HEADS):
                group = head * KV_HEADS // HEADS
                scores = query[:, head] @ key[:, group].T / np.sqrt(SIZE)
                scores = np.where(causal, scores, -np.inf)
                scores = np.exp(scores - scores.max(axis=1, keepdims=True))
                rows.append(scores / scores.sum(axis=1, keepdims=True) @ value[:, group])
            hidden = hidden + np.concatenate(rows, axis=1) @ weights[f"o{layer}"]
        return hidden @ weights["head"]

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The next `count` ids, each the largest logit."""
        row = list(ids)
        for _ in range(count):
            row.append(int(self.logits(row)[-1].argmax()))
        return row[len(ids) :]


@pytest.fixture(scope="session")
def lm_oracle() -> TinyLm:
    return TinyLm(lm_weights())


@pytest.fixture
def make_lm(tmp_path: Path) -> Callable[..., Path]:
    """Writes the language model: mode, then what the manifest or the assets should have otherwise."""

    def make(mode: str = "in-place", *, assets: Mapping[str, Any] | None = None, **manifest: Any) -> Path:
        graph = lm_nodes(mode)
        inputs, outputs, cache = lm_ports(mode)
        past = [Port(port.input, port.dtype, port.shape) for port in cache.ports]
        present = [Port(port.output, port.dtype, ["batch", KV_HEADS, "present", SIZE]) for port in cache.ports]
        model = proto(graph.nodes, [*inputs, *past], [*outputs, *present], {**lm_weights(), **graph.constants})
        values = {"task": "causal-lm", "inputs": inputs, "outputs": outputs, "cache": cache, "config": LM_CONFIG}
        chosen = LM_ASSETS if assets is None else assets
        return write_engine(tmp_path / f"lm-{mode}", model, assets=chosen, **{**values, **manifest})

    return make


@pytest.fixture
def make_engine(tmp_path: Path) -> Callable[..., Path]:
    """Writes any graph: nodes, input ports, output ports, weights, then manifest entries."""

    def make(nodes: list[onnx.NodeProto], inputs: Sequence[Port], outputs: Sequence[Port],
             weights: Mapping[str, np.ndarray], **manifest: Any) -> Path:  # fmt: skip
        model = proto(nodes, inputs, outputs, weights)
        return write_engine(
            tmp_path / "engine", model, **{"inputs": list(inputs), "outputs": list(outputs), **manifest}
        )

    return make


@pytest.fixture(scope="session")
def lm_assets() -> dict[str, Any]:
    """Tokenizer files of the language model."""
    return dict(LM_ASSETS)


@pytest.fixture(scope="session")
def bytes_tokenizer() -> tokenizers.Tokenizer:
    return byte_tokenizer()
