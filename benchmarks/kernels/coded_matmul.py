"""Speed of coded products beside plain bfloat16, onnxruntime's float32 MatMul and the memory limit.

Run: `python benchmarks/kernels/coded_matmul.py [--threads 2] [--rows-of-x 1 8 64] [--shapes 262144x640 ...]`

Every variant is a session with enough equal nodes, each with its own weight, to overflow the caches. The variants take
turns in one process; a line gives the median and the best of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from effc import kernels
from effc.kernels import codec

TYPES = {
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
}
LAYOUTS = ("raw", "rank4", "rank3")
WORKING_SET = 100_000_000  # weights of one variant


def tensor(name: str, array: np.ndarray) -> onnx.TensorProto:
    """An initializer with the bytes of an array."""
    return helper.make_tensor(name, TYPES[array.dtype], array.shape, array.tobytes(), raw=True)


def make_session(
    nodes: list[onnx.NodeProto], arrays: dict[str, np.ndarray], columns: int, threads: int
) -> ort.InferenceSession:
    """A session over nodes that all read `x` and initializers."""
    outputs = [helper.make_tensor_value_info(n.output[0], TensorProto.FLOAT, None) for n in nodes]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", columns])
    small = [tensor(name, array) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "bench", [x], outputs, small)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid("effc", 1)], ir_version=10
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle sessions must not take part
    options.register_custom_ops_library(str(kernels.library_path()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def coded_session(weights: Sequence[codec.CodedWeight], threads: int) -> ort.InferenceSession:
    """One CodedMatMul a weight."""
    nodes = []
    arrays: dict[str, np.ndarray] = {}
    for i, weight in enumerate(weights):
        names = [f"w{i}_{j}" for j in range(len(weight.tensors))]
        arrays.update(zip(names, weight.tensors, strict=True))
        rows, columns = weight.shape
        nodes.append(
            helper.make_node(
                "CodedMatMul",
                ["x", *names],
                [f"y{i}"],
                domain="effc",
                layout=weight.layout,
                dtype=16,
                rows=rows,
                columns=columns,
            )
        )
    return make_session(nodes, arrays, weights[0].shape[1], threads)


def float32_session(weights: Sequence[np.ndarray], threads: int) -> ort.InferenceSession:
    """One MatMul with float32 weights a weight."""
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(len(weights))]
    arrays = {f"w{i}": np.ascontiguousarray(w.astype(np.float32).T) for i, w in enumerate(weights)}
    return make_session(nodes, arrays, weights[0].shape[1], threads)


def runner(session: ort.InferenceSession, m: int) -> Callable[[], float]:
    """A function that runs the session once with bound memory and returns seconds."""
    columns = session.get_inputs()[0].shape[1]
    binding = session.io_binding()
    binding.bind_cpu_input("x", np.random.default_rng(m).standard_normal((m, columns)).astype(np.float32))
    for output in session.get_outputs():
        rows = output.shape[1]
        binding.bind_ortvalue_output(output.name, ort.OrtValue.ortvalue_from_shape_and_type([m, rows], np.float32))

    def run() -> float:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        return time.perf_counter() - start

    run()
    return run


def measure(shape: tuple[int, int], xs: Sequence[int], threads: int, rounds: int) -> None:
    """Print one table for a weight shape."""
    rows, columns = shape
    copies = max(1, WORKING_SET // (rows * columns))
    rng = np.random.default_rng(0)
    normal = [rng.standard_normal(shape, dtype=np.float32) * 0.02 for _ in range(min(copies, 8))]
    weights = [normal[i % len(normal)].astype(ml_dtypes.bfloat16) for i in range(copies)]
    sessions = {}
    bits = {"onnxruntime float32": 32.0}
    for layout in LAYOUTS:
        coded = [codec.encode(weight, layout) for weight in weights]
        bits[layout] = coded[0].bits_per_weight
        sessions[layout] = coded_session(coded, threads)
    if rows * columns * copies < 1 << 28:
        sessions["onnxruntime float32"] = float32_session(weights, threads)
    total = rows * columns * copies
    for m in xs:
        runs = {name: runner(session, m) for name, session in sessions.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        reads = []
        for _ in range(rounds):
            reads.append(kernels.read_bandwidth(1 << 28, threads, rounds=2))
            for name, run in runs.items():
                times[name].append(run())
        bandwidth = statistics.median(reads)
        read = f"read {bandwidth / 1e9:.1f} (best {max(reads) / 1e9:.1f}) GB/s"
        print(f"{copies} x {rows}x{columns}, {m} rows of x, {read}")
        for name in runs:
            speed = total / statistics.median(times[name])
            limit = bandwidth * 8 / bits[name]
            print(
                f"  {name:20} {bits[name]:6.2f} bit  {speed / 1e9:6.1f} (best {total / min(times[name]) / 1e9:.1f})"
                f" G weights/s  {2 * m * speed / 1e9:7.1f} GFLOP/s  {speed / limit:5.0%} of the memory limit"
                f" {limit / 1e9:.1f}"
            )


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows-of-x", type=int, nargs="+", default=[1])
    parser.add_argument("--shapes", nargs="+", default=["262144x640", "2048x640", "640x2048"])
    args = parser.parse_args()
    print(f"{kernels.isa()}, {args.threads} threads, onnxruntime {ort.__version__}")
    for text in args.shapes:
        rows, columns = map(int, text.split("x"))
        measure((rows, columns), args.rows_of_x, args.threads, args.rounds)


if __name__ == "__main__":
    main()
