"""Tiny models for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from effc.backends import backend
from effc.backends.engine_folder import new_engine_folder, seal
from effc.ir.program import Program, Source, Task
from effc.passes.pipeline import run_pipeline

VOCAB, HIDDEN, HEADS, HEAD = 37, 16, 2, 8
OPSETS = [helper.make_opsetid("", 24)]


def weight(name: str, *shape: int, dtype: type = ml_dtypes.bfloat16, seed: int = 0) -> TensorProto:
    """A random initializer scaled like a linear layer."""
    draw = np.random.default_rng([seed, *name.encode()])
    return numpy_helper.from_array((draw.standard_normal(shape) / shape[-1] ** 0.5).astype(dtype), name)


def linear(x: str, w: str, y: str) -> list[onnx.NodeProto]:
    """A product with a stored bfloat16 weight [N, K]."""
    return [
        helper.make_node("Cast", [w], [f"{w}.float"], f"{w}.cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", [f"{w}.float"], [f"{w}.t"], f"{w}.transpose", perm=[1, 0]),
        helper.make_node("MatMul", [x, f"{w}.t"], [y], f"{y}.matmul"),
    ]


def causal_lm_proto(layers: int = 2) -> onnx.ModelProto:
    """A decoder with tied embeddings, learned nothing, and the full causal interface."""
    nodes = [
        helper.make_node("Cast", ["embed"], ["embed.float"], "embed.cast", to=TensorProto.FLOAT),
        helper.make_node("Gather", ["embed.float", "input_ids"], ["tokens"], "embed.gather"),
        helper.make_node("Cast", ["position_ids"], ["positions"], "positions.cast", to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["positions", "last_axis"], ["positions.3d"], "positions.unsqueeze"),
        helper.make_node("Mul", ["positions.3d", "tenth"], ["positions.scaled"], "positions.mul"),
        helper.make_node("Sin", ["positions.scaled"], ["positions.sin"], "positions.sine"),
        helper.make_node("Add", ["tokens", "positions.sin"], ["h.0"], "embed.add"),
        *mask_nodes(),
    ]
    weights = [weight("embed", VOCAB, HIDDEN), *constants()]
    for layer in range(layers):
        nodes += layer_nodes(layer)
        weights += [weight(f"l{layer}.{name}", HIDDEN, HIDDEN) for name in ("q", "k", "v", "o", "up", "down")]
    nodes += linear(f"h.{layers}", "embed", "logits")[1:]
    graph = helper.make_graph(nodes, "decoder", causal_inputs(layers), causal_outputs(layers), weights)
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=11)


def mask_nodes() -> list[onnx.NodeProto]:
    """Bool [batch, 1, seq, total] from the attention mask."""
    return [
        helper.make_node("Cast", ["attention_mask"], ["mask.bool"], "mask.cast", to=TensorProto.BOOL),
        helper.make_node("Unsqueeze", ["mask.bool", "middle_axes"], ["mask.keys"], "mask.unsqueeze"),
        helper.make_node("Equal", ["positions.3d", "positions.3d"], ["mask.queries.3d"], "mask.every"),
        helper.make_node("Unsqueeze", ["mask.queries.3d", "head_axis"], ["mask.queries"], "mask.heads"),
        helper.make_node("And", ["mask.keys", "mask.queries"], ["mask"], "mask.and"),
    ]


def constants() -> list[TensorProto]:
    return [
        numpy_helper.from_array(np.array([2]), "last_axis"),
        numpy_helper.from_array(np.array([1]), "head_axis"),
        numpy_helper.from_array(np.array([1, 2]), "middle_axes"),
        numpy_helper.from_array(np.float32(0.1), "tenth"),
    ]


def layer_nodes(layer: int) -> list[onnx.NodeProto]:
    """Attention over the cache and a residual MLP."""
    x, y, mid = f"h.{layer}", f"h.{layer + 1}", f"m.{layer}"
    nodes = [node for name in "qkv" for node in linear(x, f"l{layer}.{name}", f"{name}.{layer}")]
    cache = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
    nodes.append(
        helper.make_node(
            "Attention",
            [f"q.{layer}", f"k.{layer}", f"v.{layer}", "mask", *cache],
            [f"a.{layer}", f"present.{layer}.key", f"present.{layer}.value"],
            f"attention.{layer}",
            q_num_heads=HEADS,
            kv_num_heads=HEADS,
            is_causal=1,
        )
    )
    nodes += linear(f"a.{layer}", f"l{layer}.o", f"o.{layer}")
    nodes.append(helper.make_node("Add", [x, f"o.{layer}"], [mid], f"add.{layer}"))
    nodes += linear(mid, f"l{layer}.up", f"u.{layer}")
    nodes.append(helper.make_node("Tanh", [f"u.{layer}"], [f"t.{layer}"], f"tanh.{layer}"))
    nodes += linear(f"t.{layer}", f"l{layer}.down", f"d.{layer}")
    nodes.append(helper.make_node("Add", [mid, f"d.{layer}"], [y], f"mlp.{layer}"))
    return nodes


def causal_inputs(layers: int) -> list[onnx.ValueInfoProto]:
    ids = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "seq"]),
    ]
    shape = ["batch", HEADS, "past", HEAD]
    return ids + [
        helper.make_tensor_value_info(f"past_key_values.{layer}.{kind}", TensorProto.FLOAT, shape)
        for layer in range(layers)
        for kind in ("key", "value")
    ]


def causal_outputs(layers: int) -> list[onnx.ValueInfoProto]:
    shape = ["batch", HEADS, "total", HEAD]
    return [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", VOCAB]),
        *(
            helper.make_tensor_value_info(f"present.{layer}.{kind}", TensorProto.FLOAT, shape)
            for layer in range(layers)
            for kind in ("key", "value")
        ),
    ]


def causal_lm(layers: int = 2) -> Program:
    """`causal_lm_proto` as a program."""
    source = Source("memory", "tiny", {"vocab_size": VOCAB})
    model = ir.from_proto(onnx.shape_inference.infer_shapes(causal_lm_proto(layers), data_prop=True))
    return Program(model, Task.CAUSAL_LM, source)


def write_engine(program: Program, folder: Path, *, portable: bool = False) -> Path:
    """An engine folder by the ort-cpu backend, from the canonical form."""
    lower = backend("ort-cpu")
    run_pipeline(program, ())
    lowered = lower.lower(program, portable=portable)
    with new_engine_folder(folder) as partial:
        seal(partial, lower.write(lowered, partial, portable=portable))
    return folder


def encoder() -> Program:
    """`encoder_proto` as a program."""
    source = Source("memory", "tiny", {"vocab_size": VOCAB})
    return Program(ir.from_proto(encoder_proto()), Task.ENCODER, source)


def encoder_proto() -> onnx.ModelProto:
    """Token ids [batch, seq] and a mask to a masked mean [batch, HIDDEN] and hidden states."""
    nodes = [
        helper.make_node("Cast", ["embed"], ["embed.float"], "embed.cast", to=TensorProto.FLOAT),
        helper.make_node("Gather", ["embed.float", "input_ids"], ["tokens"], "embed.gather"),
        *linear("tokens", "w", "last_hidden_state"),
        helper.make_node("Cast", ["attention_mask"], ["mask.float"], "mask.cast", to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask.float", "last_axis"], ["mask"], "mask.unsqueeze"),
        helper.make_node("Mul", ["last_hidden_state", "mask"], ["kept"], "keep"),
        helper.make_node("ReduceMean", ["kept", "seq_axis"], ["pooled"], "mean", keepdims=0),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "seq"])
        for name in ("input_ids", "attention_mask")
    ]
    outputs = [
        helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "seq", HIDDEN]),
        helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["batch", HIDDEN]),
    ]
    axes = numpy_helper.from_array(np.array([1]), "seq_axis")
    weights = [weight("embed", VOCAB, HIDDEN), weight("w", HIDDEN, HIDDEN), *constants(), axes]
    graph = helper.make_graph(nodes, "encoder", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=11)
