"""Programs from ONNX text, inputs for them, and their outputs in onnxruntime without its optimizer."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from effc.ir.program import Program, Source, Task
from effc.passes.canonicalize import Canonicalize

HEADER = '<ir_version: 11, opset_import: ["" : 24]>\n'
SIZES = (
    {"batch": 1, "seq": 1, "past": 0},
    {"batch": 2, "seq": 5, "past": 0},
    {"batch": 3, "seq": 1, "past": 7},
    {"batch": 2, "seq": 9, "past": 4},
    {"batch": 1, "seq": 33, "past": 31},
)


def program(text: str, task: Task = Task.GENERIC) -> Program:
    proto = onnx.parser.parse_model(HEADER + text)
    onnx.checker.check_model(proto)
    return Program(ir.from_proto(proto), task, Source("memory", "test"))


def canonical(source: Program) -> Program:
    result = source.clone()
    one = Canonicalize()
    one.apply(result, one.match(result).sites)
    return result


def run(one: Program, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    proto = ir.to_proto(one.model)
    onnx.checker.check_model(proto, full_check=False)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    return session.run(None, {name: array for name, array in feeds.items() if name in names})


def random_feeds(one: Program, sizes: dict[str, int], seed: int = 0, padding: int = 0) -> dict[str, np.ndarray]:
    """Random inputs; token masks hide the first `padding` tokens of the first row."""
    rng = np.random.default_rng(seed)
    sizes = {**sizes, "total": sizes["past"] + sizes["seq"]}
    feeds = {}
    for value in one.graph.inputs:
        shape = [size if isinstance(size, int) else _number(size, sizes) for size in value.shape]
        dtype = value.dtype.numpy()
        if value.name.startswith("attention_mask"):
            array = np.ones(shape, dtype=dtype)
            array[0, : min(padding, shape[-1] - 1)] = 0
        elif value.name == "position_ids":
            array = np.broadcast_to(np.arange(shape[-1]) + sizes["past"], shape).astype(dtype)
        elif value.dtype == ir.DataType.BOOL:
            array = rng.random(shape) < 0.7
            array[..., 0] = True
            array = ~array if value.name == "hide" else array
        elif np.issubdtype(dtype, np.integer):
            array = rng.integers(0, 2 if value.name == "token_type_ids" else 16, shape).astype(dtype)
        else:
            array = rng.standard_normal(shape).astype(dtype)
        feeds[value.name] = array
    return feeds


def _number(size: ir.SymbolicDim, sizes: dict[str, int]) -> int:
    number = size.evaluate(sizes)
    assert isinstance(number, int), f"no number for {size}"
    return number


def tolerance(dtype: np.dtype, magnitude: float) -> float:
    """Rounding of a few hundred accumulated operations: 64 units in the last place of the largest output."""
    return 64 * float(np.finfo(dtype).eps) * max(magnitude, 1.0)


def assert_same_outputs(
    before: Program, after: Program, sizes: dict[str, int], padding: int = 0, seed: int = 0
) -> None:
    feeds = random_feeds(before, sizes, seed, padding)
    for old, new in zip(run(before, feeds), run(after, feeds), strict=True):
        assert old.shape == new.shape
        assert old.dtype == new.dtype
        assert not np.isnan(new).any()
        limit = tolerance(old.dtype, float(np.abs(old).max(initial=0.0)))
        assert np.abs(old.astype(np.float64) - new.astype(np.float64)).max(initial=0.0) <= limit
