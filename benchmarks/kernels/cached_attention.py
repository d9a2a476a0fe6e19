"""Speed of `effc.CachedAttention` beside onnxruntime's GroupQueryAttention and the memory limit.

Run: `python benchmarks/kernels/cached_attention.py [--threads 2] [--rounds 7] [--heads 8/2 32/8] [--decode 1024 8192]
[--prefill 512 2048] [--storages fp32 bf16 int8 int4 kivi-2 zipcache-4/2]`

Decode: one new token over a full cache that is bound as past and present, in enough equal nodes to overflow the caches.
Prefill: all tokens at once into an empty cache. The variants take turns in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from effc import kernels
from effc.ir.dialect.cached_attention import NO_SELECTION, NO_STORAGE
from effc.kernels import kv_page

SIZE = 128  # of a head
WORKING_SET = 200_000_000  # bytes of all float32 caches of a variant
PLAIN: dict[str, object] = {
    "storage": "dense",
    "selection": "all",
    **{name: value for name, value in (NO_STORAGE | NO_SELECTION).items() if value != ()},
}
"""Attributes of a dense cache of which everything is read; onnx refuses empty lists, which may be absent."""


@dataclass(frozen=True)
class Variant:
    """A way to keep the cache: the type of its exact tokens, and the attributes of the op."""

    type: int
    attributes: dict[str, object] = field(default_factory=lambda: {"storage": "dense"})

    @property
    def exact_tokens(self) -> int:
        """Places of the exact buffer."""
        return sum(int(str(self.attributes[name])) for name in ("sinks", "recent", "page"))

    def pages(self, tokens: int) -> int:
        """Full pages of so many tokens."""
        page = int(str(self.attributes["page"]))
        return max(0, tokens - self.exact_tokens + page) // page


def paged(bits: tuple[int, int], group: int = 0, **attributes: object) -> Variant:
    """Pages of 128 tokens."""
    page = {"storage": "pages", "sinks": 4, "recent": 32, "page": 128, "salient": 128, "key_scheme": "channel"}
    groups = {"key_group": group, "value_group": group, "key_bits": bits, "value_bits": bits}
    return Variant(TensorProto.BFLOAT16, page | groups | {"value_scheme": "token"} | attributes)


STORAGES = {
    "fp32": Variant(TensorProto.FLOAT),
    "bf16": Variant(TensorProto.BFLOAT16),
    "fp16": Variant(TensorProto.FLOAT16),
    "int8": paged((8, 8)),
    "int4": paged((4, 4)),
    "kivi-2": paged((2, 2), group=32),
    "zipcache-4/2": paged((4, 2), salient=80, value_scheme="separable", importance="normalised"),
}
DTYPES = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Case:
    """Heads, new tokens and tokens in all."""

    heads: int
    kv_heads: int
    seq: int
    total: int

    @property
    def layers(self) -> int:
        """Nodes in a model."""
        if self.seq > 1:
            return 1
        return max(1, WORKING_SET // (2 * 4 * self.kv_heads * self.total * SIZE))


def open_session(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    threads: int,
) -> ort.InferenceSession:
    """A session with the library of custom ops."""
    imports = [helper.make_opsetid(domain, 1) for domain in ("effc", "com.microsoft")]
    graph = helper.make_graph(list(nodes), "bench", list(inputs), list(outputs))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24), *imports], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle sessions must not take part
    options.register_custom_ops_library(str(kernels.library_path()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def value(name: str, type_: int, shape: Sequence[int]) -> onnx.ValueInfoProto:
    """A graph input or output."""
    return helper.make_tensor_value_info(name, type_, shape)


def ortvalue(array: np.ndarray) -> ort.OrtValue:
    """A copy of an array, of which an OrtValue shares the memory; bfloat16 by its bits."""
    array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def new_tokens(case: Case) -> dict[str, np.ndarray]:
    """Random queries, keys and values."""
    rng = np.random.default_rng(0)
    widths = {"query": case.heads * SIZE, "key": case.kv_heads * SIZE, "value": case.kv_heads * SIZE}
    return {name: rng.standard_normal((1, case.seq, width), dtype=np.float32) for name, width in widths.items()}


def runner(
    session: ort.InferenceSession, feeds: dict[str, np.ndarray], caches: dict[str, np.ndarray]
) -> Callable[[], float]:
    """A function that runs once, caches bound as past and present, and returns seconds."""
    binding = session.io_binding()
    alive = []
    for name, array in feeds.items():
        alive.append(ortvalue(array))
        binding.bind_ortvalue_input(name, alive[-1])
    for name, array in caches.items():
        alive.append(ortvalue(array))
        binding.bind_ortvalue_input(f"past_{name}", alive[-1])
        binding.bind_ortvalue_output(f"present_{name}", alive[-1])
    for output in session.get_outputs():
        if output.name.startswith("y"):
            alive.append(ort.OrtValue.ortvalue_from_shape_and_type(output.shape, np.float32))
            binding.bind_ortvalue_output(output.name, alive[-1])

    def run(_: object = alive) -> float:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        return time.perf_counter() - start

    run()
    return run


def dense_caches(case: Case, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Random full caches of all layers."""
    rng = np.random.default_rng(1)
    shape = (1, case.kv_heads, case.total, SIZE)
    one = rng.standard_normal(shape, dtype=np.float32).astype(dtype)
    return {f"{name}{i}": one for i in range(case.layers) for name in ("k", "v")}


def group_query(case: Case, threads: int) -> tuple[Callable[[], float], float]:
    """onnxruntime's own op, and the bytes of its caches."""
    nodes, inputs, outputs = [], [], []
    caches = dense_caches(case, np.dtype(np.float32))
    for name, array in caches.items():
        inputs.append(value(f"past_{name}", TensorProto.FLOAT, array.shape))
        outputs.append(value(f"present_{name}", TensorProto.FLOAT, array.shape))
    for i in range(case.layers):
        names = ["query", "key", "value", f"past_k{i}", f"past_v{i}", "seqlens", "total"]
        results = [f"y{i}", f"present_k{i}", f"present_v{i}"]
        sizes = {"num_heads": case.heads, "kv_num_heads": case.kv_heads}
        nodes.append(helper.make_node("GroupQueryAttention", names, results, domain="com.microsoft", **sizes))
        outputs.append(value(f"y{i}", TensorProto.FLOAT, [1, case.seq, case.heads * SIZE]))
    feeds = new_tokens(case)
    inputs += [value(name, TensorProto.FLOAT, array.shape) for name, array in feeds.items()]
    feeds["seqlens"] = np.array([case.total - 1], np.int32)
    feeds["total"] = np.array(case.total, np.int32)
    inputs += [value("seqlens", TensorProto.INT32, [1]), value("total", TensorProto.INT32, [])]
    session = open_session(nodes, inputs, outputs, threads)
    return runner(session, feeds, caches), sum(array.nbytes for array in caches.values())


def paged_caches(case: Case, variant: Variant) -> dict[str, np.ndarray]:
    """Random caches of all layers: exact tokens, pages, statistics."""
    rng = np.random.default_rng(1)
    names = [item.name for item in fields(kv_page.PageSpec)]
    known = {name: item for name, item in variant.attributes.items() if name in names}
    spec = kv_page.PageSpec(SIZE, SIZE, **known)  # type: ignore[arg-type]
    shape = (case.kv_heads, spec.page, SIZE)
    keys, values = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    importance = rng.random(shape[:2], dtype=np.float32) if spec.two_classes else None
    page = kv_page.encode(spec, keys, values, importance=importance)
    pages = np.repeat(page[None, :, None], case.total // spec.page, axis=2)
    exact = rng.standard_normal((1, case.kv_heads, variant.exact_tokens, SIZE), dtype=np.float32)
    one = {"k": exact.astype(DTYPES[variant.type]), "v": exact.astype(DTYPES[variant.type]), "p": pages}
    if spec.two_classes:
        one["s"] = np.zeros((1, case.kv_heads, 2 * variant.exact_tokens + SIZE), np.float32)
    return {f"{name}{i}": array for i in range(case.layers) for name, array in one.items()}


def bytes_read(case: Case, variant: Variant, caches: dict[str, np.ndarray]) -> int:
    """Bytes of the cache that one step needs."""
    if "page" not in variant.attributes:
        return sum(array.nbytes for array in caches.values())
    pages = variant.pages(case.total)
    exact = case.total - pages * int(str(variant.attributes["page"]))
    used = {"k": exact / variant.exact_tokens, "v": exact / variant.exact_tokens, "s": 1.0}
    used["p"] = pages / caches["p0"].shape[2]
    return round(sum(array.nbytes * used[name[0]] for name, array in caches.items()))


def cached(case: Case, variant: Variant, threads: int) -> tuple[Callable[[], float], float]:
    """`effc.CachedAttention`, and the bytes of its caches that a step reads."""
    dense = "page" not in variant.attributes
    caches = dense_caches(case, DTYPES[variant.type]) if dense else paged_caches(case, variant)
    return cached_node_runner(case, variant, caches, case.layers, threads), bytes_read(case, variant, caches)


def cached_node_runner(
    case: Case,
    variant: Variant,
    caches: dict[str, np.ndarray],
    count: int,
    threads: int,
    constants: dict[str, np.ndarray] | None = None,
    angles: dict[str, np.ndarray] | None = None,
) -> Callable[[], float]:
    """Runs so many nodes with their caches, whose names end in the number of the node, and inputs behind the cache.

    With rotary, `angles` are `cos` and `sin` of the new tokens.
    """
    types = {dtype: type_ for type_, dtype in DTYPES.items()}
    types |= {np.dtype(np.uint8): TensorProto.UINT8, np.dtype(np.int32): TensorProto.INT32}
    nodes, inputs, outputs = [], [], []
    for name, array in caches.items():
        inputs.append(value(f"past_{name}", types[array.dtype], array.shape))
        outputs.append(value(f"present_{name}", types[array.dtype], array.shape))
    form = {"heads": case.heads, "kv_heads": case.kv_heads, "head_size": SIZE, "value_size": SIZE}
    scores = {"scale": SIZE**-0.5, "softcap": 0.0, "causal": 1, "window": 0, "rotary": "none", "rotary_size": 0}
    attributes = PLAIN | form | scores | variant.attributes
    for i in range(count):
        own = [name for name in caches if name[1:] == str(i)]
        behind = [f"{name}{i}" for name in constants or {}]
        rotation = [*(angles or ("", ""))]
        names = ["query", "key", "value", "valid", "", *rotation, *(f"past_{name}" for name in own), *behind]
        results = [f"y{i}", *(f"present_{name}" for name in own)]
        nodes.append(helper.make_node("CachedAttention", names, results, domain="effc", **attributes))
        outputs.append(value(f"y{i}", TensorProto.FLOAT, [1, case.seq, case.heads * SIZE]))
    feeds = new_tokens(case) | (angles or {})
    inputs += [value(name, TensorProto.FLOAT, array.shape) for name, array in feeds.items()]
    feeds["valid"] = np.ones((1, case.total), bool)
    inputs.append(value("valid", TensorProto.BOOL, [1, case.total]))
    for i in range(count):
        for name, array in (constants or {}).items():
            feeds[f"{name}{i}"] = array.copy()
            inputs.append(value(f"{name}{i}", types[array.dtype], array.shape))
    return runner(open_session(nodes, inputs, outputs, threads), feeds, caches)


def measure(case: Case, storages: Sequence[str], threads: int, rounds: int) -> None:
    """Print one table."""
    variants = {"GroupQueryAttention": group_query(case, threads)}
    for name in storages:
        variants[name] = cached(case, STORAGES[name], threads)
    times: dict[str, list[float]] = {name: [] for name in variants}
    reads = []
    for _ in range(rounds):
        reads.append(kernels.read_bandwidth(1 << 28, threads, rounds=2))
        for name, (run, _) in variants.items():
            times[name].append(run())
    bandwidth = max(reads)
    print(f"{case.heads}/{case.kv_heads} heads of {SIZE}, {case.seq} new of {case.total} tokens, {case.layers} nodes")
    base = times["GroupQueryAttention"]
    for name, (_, nbytes) in variants.items():
        median, best = statistics.median(times[name]), min(times[name])
        ratio = f"{statistics.median(base) / median:5.2f} (best {min(base) / best:5.2f}) x GroupQueryAttention"
        line = f"  {name:20} {median * 1e6 / case.layers:9.1f} us (best {best * 1e6 / case.layers:9.1f})  {ratio}"
        if case.seq == 1:
            share = nbytes / best / bandwidth
            line += f"  {nbytes / best / 1e9:5.1f} GB/s, {share:4.0%} of the memory limit"
        else:
            flops = 2 * case.heads * SIZE * case.seq * (case.seq + 1)
            line += f"  {flops / best / 1e9:6.0f} GFLOP/s"
        print(line, flush=True)


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--heads", nargs="+", default=["8/2", "32/8"])
    parser.add_argument("--decode", type=int, nargs="*", default=[1024, 8192, 32768])
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--storages", nargs="+", default=list(STORAGES), choices=list(STORAGES))
    args = parser.parse_args()
    print(f"{kernels.isa()}, {args.threads} threads, onnxruntime {ort.__version__}")
    for text in args.heads:
        heads, kv_heads = map(int, text.split("/"))
        for total in args.decode:
            measure(Case(heads, kv_heads, 1, total), args.storages, args.threads, args.rounds)
        for total in args.prefill:
            measure(Case(heads, kv_heads, total, total), args.storages, args.threads, args.rounds)


if __name__ == "__main__":
    main()
