"""Decoders that are attention layers alone, and runs of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.tape import Tape

from effc import kernels
from effc.ir.dialect.cache_storage import DenseStorage
from effc.ir.dialect.cached_attention import AttentionForm, cached_attention
from effc.ir.program import Program, Source, Task
from effc.passes.base import Pass

HEADS, KV_HEADS, SIZE = 4, 2, 32


def decoder(
    layers: int = 1,
    *,
    size: int = SIZE,
    windows: tuple[int, ...] = (),
    bias: bool = False,
    ring: bool = True,
    rotary: bool = False,
) -> Program:
    """Attention layers side by side, raised, over inputs q, k, v and, with rotary, the positions."""

    def value(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    float32 = ir.DataType.FLOAT
    operands = [
        value("q", float32, "batch", "seq", HEADS * size),
        value("k", float32, "batch", "seq", KV_HEADS * size),
        value("v", float32, "batch", "seq", KV_HEADS * size),
        value("valid", ir.DataType.BOOL, "batch", "total"),
    ]
    mask = value("bias", float32, 1, 1, "seq", "total") if bias else None
    positions = value("position_ids", ir.DataType.INT64, "batch", "seq")
    tape, tables = Tape(), None
    if rotary:
        tables = rotation(tape, positions, size)
    optional = [*([mask] if mask else []), *([positions] if rotary else [])]
    inputs, nodes, outputs = [*operands, *optional], list(tape.nodes), []
    for layer in range(layers):
        window = windows[layer] if layer < len(windows) else 0
        length = window if window and ring else "past"
        past = [
            value(f"past_key_values.{layer}.{kind}", float32, "batch", KV_HEADS, length, size)
            for kind in ("key", "value")
        ]
        turned = {"rotary": "half", "rotary_size": size} if rotary else {}
        form = AttentionForm(HEADS, KV_HEADS, size, size, size**-0.5, window=window, **turned)
        storage = DenseStorage(float32, window if ring else 0)
        name = f"layers.{layer}.attention"
        node = cached_attention(operands, past, form, storage, bias=mask, tables=tables, name=name)
        for output, name in zip(node.outputs, (f"y{layer}", f"present.{layer}.key", f"present.{layer}.value")):
            output.name = name
        inputs += past
        nodes.append(node)
        outputs += node.outputs
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 24, "effc": 1}, name="decoder")
    return Program(ir.Model(graph, ir_version=11), Task.CAUSAL_LM, Source("memory", "decoder"))


def rotation(tape: Tape, positions: ir.Value, size: int) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines [batch, seq, size / 2]."""
    frequencies = (1 / 40.0 ** np.linspace(0, 1, size // 2)).astype(np.float32)
    constants = [
        tape.op("Constant", [], {"value": ir.Tensor(array, name="constant")})
        for array in (np.array([2], np.int64), frequencies)
    ]
    floats = tape.op("Cast", [positions], {"to": int(ir.DataType.FLOAT)})
    angles = tape.op("Mul", [tape.op("Unsqueeze", [floats, constants[0]]), constants[1]])
    cos, sin = (tape.op(name, [angles]) for name in ("Cos", "Sin"))
    for table in (cos, sin):
        table.type, table.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "seq", size // 2])
    return cos, sin


def changed(program: Program, *passes: Pass) -> Program:
    """A copy after the passes."""
    result = program.clone()
    for one in passes:
        one.apply(result, one.match(result).sites)
    return result


def run_steps(program: Program, steps: Sequence[int], seed: int = 5) -> np.ndarray:
    """y of all steps, the cache carried on; two rows, the second with 7 tokens of padding."""
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(kernels.library_path()))
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(program.model).SerializeToString(), options)
    draw = np.random.default_rng(seed)
    sizes = {"batch": 2, "past": 0}
    cache = {}
    for past, _ in program.cache_pairs():
        shape = [axis if isinstance(axis, int) else sizes.get(str(axis), 0) for axis in past.shape]
        assert past.dtype is not None
        cache[str(past.name)] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            np.zeros(shape, np.uint16 if past.dtype == ir.DataType.BFLOAT16 else past.dtype.numpy()), int(past.dtype)
        )
    names = [str(value.name) for value in program.graph.outputs]
    pairs = {str(present.name): str(past.name) for past, present in program.cache_pairs()}
    results, done = [], 0
    for count in steps:
        valid = np.ones((2, done + count), bool)
        valid[1, :7] = False
        feeds = {"valid": valid}
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            feeds[name] = draw.standard_normal((2, count, heads * SIZE)).astype(np.float32)
        if any(one.name == "token_scores" for one in program.graph.inputs):
            feeds["token_scores"] = np.random.default_rng(seed).random((2, sum(steps)), np.float32)[:, : done + count]
        if any(one.name == "position_ids" for one in program.graph.inputs):
            feeds["position_ids"] = np.maximum(valid.cumsum(axis=1) - 1, 0)[:, done:]
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        outputs = dict(zip(names, session.run_with_ort_values(names, {**values, **cache})))
        results.append(outputs["y0"].numpy())
        cache = {past: outputs[present] for present, past in pairs.items()}
        done += count
    return np.concatenate(results, axis=1)
