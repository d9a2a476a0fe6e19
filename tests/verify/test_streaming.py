import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from verify_models import OPSETS, causal_lm, causal_lm_proto, encoder_proto, linear, weight

from effc.errors import InputError
from effc.verify.segments import plan, prepare
from effc.verify.split_products import split_large_products
from effc.verify.streaming import evaluate


def model(nodes, inputs, outputs, weights) -> ir.Model:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    return ir.from_proto(helper.make_model(graph, opset_imports=OPSETS, ir_version=11))


def floats(name: str, *shape: int | str | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def untyped(*names: str) -> list[onnx.ValueInfoProto]:
    return [onnx.ValueInfoProto(name=name) for name in names]


def ids_feed(batch: int, seq: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(batch * 100 + seq)
    return {"input_ids": draw.integers(0, 37, (batch, seq)), "attention_mask": np.ones((batch, seq), np.int64)}


def whole(proto: onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The oracle: one plain session over the whole graph."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feed)))


@pytest.mark.parametrize("limit", [1, 1500, 1 << 30])
@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (3, 7), (2, 0)])
def test_segments_give_the_bits_of_the_whole(limit: int, batch: int, seq: int) -> None:
    proto, feed = encoder_proto(), ids_feed(batch, seq)
    if seq == 0:  # the mean of nothing is refused by onnxruntime
        for _ in range(4):
            proto.graph.node.pop()
        proto.graph.output.pop()
    expected = whole(proto, feed)
    [outputs] = evaluate(ir.from_proto(proto), [feed], limit=limit)
    assert outputs.keys() == expected.keys()
    for name, array in expected.items():
        assert outputs[name].tobytes() == array.tobytes()
        assert outputs[name].shape == array.shape


def test_several_feeds_of_different_shapes_at_once() -> None:
    proto, feeds = encoder_proto(), [ids_feed(1, 2), ids_feed(4, 3)]
    results = evaluate(ir.from_proto(proto), feeds, limit=1)
    for feed, outputs in zip(feeds, results):
        assert outputs["pooled"].tobytes() == whole(proto, feed)["pooled"].tobytes()


@pytest.mark.parametrize(("limit", "blocks"), [(1, 3), (10 * 2500 * 256, 2), (1 << 30, 1)])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_large_products_are_split_and_keep_their_bits(limit: int, blocks: int, rows: int) -> None:
    nodes = [helper.make_node("Neg", ["x"], ["n"]), *linear("n", "w", "y")]
    graph = model(nodes, [floats("x", "m", 256)], [floats("y", "m", 3077)], [weight("w", 3077, 256)])
    prepared = prepare(graph.clone()).graph
    assert split_large_products(prepared, limit) == (blocks > 1)
    assert sum(node.op_type == "MatMul" for node in prepared) == blocks
    feed = {"x": np.random.default_rng(0).standard_normal((rows, 256)).astype(np.float32)}
    [outputs], [expected] = evaluate(graph, [feed], limit=limit), evaluate(graph, [feed])
    assert outputs["y"].tobytes() == expected["y"].tobytes()


def test_a_small_limit_makes_many_segments_and_keeps_no_cast_between_them() -> None:
    prepared = prepare(ir.from_proto(causal_lm_proto()))
    segments = plan(prepared.graph, 1)
    assert len(segments) > 12
    assert len(plan(prepared.graph, 1 << 30)) == 1
    passed = {name for segment in segments for name in segment.inputs}
    assert not [name for name in passed if name.endswith((".float", ".t"))]
    assert max(len(segment.weights) for segment in segments) == 1
    assert "embed.float" not in {value.name for node in segments[0].nodes for value in node.outputs}


def test_the_model_is_not_changed() -> None:
    program = causal_lm()
    before = [(node.name, [str(value) for value in node.inputs]) for node in program.graph]
    prepare(program.model.clone())
    evaluate(ir.from_proto(encoder_proto()), [ids_feed(1, 1)])
    assert [(node.name, [str(value) for value in node.inputs]) for node in program.graph] == before


def test_every_value_is_observed_with_its_name() -> None:
    seen: dict[tuple[int, str], np.ndarray] = {}
    feeds = [ids_feed(1, 2), ids_feed(2, 3)]
    evaluate(
        ir.from_proto(encoder_proto()),
        feeds,
        limit=1,
        observe=lambda index, name, value: seen.update({(index, name): value}),
    )
    assert {"tokens", "kept", "mask", "last_hidden_state"} <= {name for index, name in seen if index == 0}
    assert seen[1, "kept"].shape == (2, 3, 16)
    assert not [name for _, name in seen if name in ("w.t", "embed.float")]


def test_subgraphs_capture_outer_values_and_weights() -> None:
    branches = {
        "then_branch": helper.make_graph([helper.make_node("Mul", ["h", "scale"], ["a"])], "then", [], untyped("a")),
        "else_branch": helper.make_graph([helper.make_node("Neg", ["x"], ["b"])], "else", [], untyped("b")),
    }
    nodes = [
        *linear("x", "w", "h"),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], **branches),
    ]
    weights = [
        weight("w", 4, 4),
        numpy_helper.from_array(np.full(4, 3, np.float32), "scale"),
        numpy_helper.from_array(np.float32(0), "zero"),
    ]
    graph = model(nodes, [floats("x", "n", 4)], [floats("y", "n", 4)], weights)
    x = np.ones((2, 4), np.float32)
    up, down = evaluate(graph, [{"x": x}, {"x": -x}], limit=1)
    w = weights[0]
    expected = 3 * (x @ numpy_helper.to_array(w).astype(np.float32).T)
    np.testing.assert_allclose(up["y"], expected, rtol=1e-6)
    np.testing.assert_array_equal(down["y"], x)


def test_outputs_that_are_inputs_weights_or_constants() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("Cast", ["w"], ["w.float"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.BFLOAT16),
    ]
    outputs = [
        floats("x", "n"),
        helper.make_tensor_value_info("w", TensorProto.BFLOAT16, [3, 5]),
        floats("w.float", 3, 5),
        floats("y", "n"),
        helper.make_tensor_value_info("half", TensorProto.BFLOAT16, ["n"]),
    ]
    graph = model(nodes, [floats("x", "n")], outputs, [weight("w", 3, 5)])
    [results] = evaluate(graph, [{"x": np.array([-1, 2.5], np.float32)}])
    np.testing.assert_array_equal(results["x"], [-1, 2.5])
    np.testing.assert_array_equal(results["y"], [0, 2.5])
    assert results["w"].dtype == results["half"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(results["w"].astype(np.float32), results["w.float"])


def test_random_nodes_are_run_once() -> None:
    nodes = [
        helper.make_node("RandomUniform", [], ["noise"], shape=[1000], low=-3.0, high=3.0),
        *[node for name in "ab" for node in linear("noise2d", name, f"y{name}")],
        helper.make_node("Reshape", ["noise", "shape"], ["noise2d"]),
        helper.make_node("Sub", ["noise", "noise"], ["zero"]),
    ]
    nodes = [nodes[0], nodes[-2], *nodes[1:-2], nodes[-1]]
    weights = [weight("a", 1000, 1000), weight("b", 1000, 1000), numpy_helper.from_array(np.array([1, 1000]), "shape")]
    graph = model(nodes, [], [floats("zero", 1000), floats("ya", 1, 1000), floats("noise", 1000)], weights)
    graph.opset_imports[""] = 20  # onnxruntime has no newer random kernels
    [results] = evaluate(graph, [{}], limit=1)
    assert np.abs(results["noise"]).max() > 1
    assert not results["zero"].any()


def test_duplicate_value_names_are_told_apart() -> None:
    graph = model(
        [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Exp", ["y"], ["z"])],
        [floats("x", 1)],
        [floats("z", 1)],
        [],
    )
    for node in graph.graph:
        node.outputs[0].name = "same"
    [results] = evaluate(graph, [{"x": np.zeros(1, np.float32)}], limit=1)
    assert next(iter(results.values())) == 1


def test_local_functions_travel_with_their_calls() -> None:
    function = helper.make_function(
        "local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 24)]
    )
    graph = helper.make_graph(
        [helper.make_node("Twice", ["x"], ["y"], domain="local")], "g", [floats("x", 2)], [floats("y", 2)]
    )
    opsets = [*OPSETS, helper.make_opsetid("local", 1)]
    proto = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=11)
    [results] = evaluate(ir.from_proto(proto), [{"x": np.ones(2, np.float32)}])
    np.testing.assert_array_equal(results["y"], [2, 2])


def test_external_data_of_any_size(tmp_path: Path) -> None:
    proto, feed = encoder_proto(), ids_feed(2, 3)
    expected = whole(proto, feed)
    ir.save(ir.from_proto(proto), tmp_path / "model.onnx", external_data="weights.bin", size_threshold_bytes=0)
    [outputs] = evaluate(ir.load(tmp_path / "model.onnx"), [feed])
    assert outputs["pooled"].tobytes() == expected["pooled"].tobytes()


def test_four_bit_and_string_weights() -> None:
    packed = helper.make_tensor("w", TensorProto.INT4, [3], [-8, 7, 1])
    words = helper.make_tensor("words", TensorProto.STRING, [2], [b"a", b"b"])
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["y"]),
        helper.make_node("Mul", ["y", "x"], ["z"]),
        helper.make_node("Gather", ["words", "at"], ["picked"]),
    ]
    outputs = [floats("z", 3), helper.make_tensor_value_info("picked", TensorProto.STRING, [1])]
    inputs = [floats("x", 3), helper.make_tensor_value_info("at", TensorProto.INT64, [1])]
    graph = model(nodes, inputs, outputs, [packed, words, numpy_helper.from_array(np.float32(0.5), "scale")])
    [results] = evaluate(graph, [{"x": np.ones(3, np.float32), "at": np.array([1])}])
    np.testing.assert_array_equal(results["z"], [-4, 3.5, 0.5])
    assert results["picked"].tolist() == ["b"]


def test_a_node_before_its_producer_is_refused() -> None:
    proto = encoder_proto()
    graph = ir.from_proto(proto).graph
    graph.append(graph.node(0))
    with pytest.raises(InputError, match="topological order"):
        plan(graph, 1)


def test_a_failing_node_is_reported_with_shapes() -> None:
    feed = {**ids_feed(2, 3), "attention_mask": np.ones((2, 5), np.int64)}
    with pytest.raises(InputError, match=r"'keep' \(Mul\).*with .*\[2, 3, 16\]"):
        evaluate(ir.from_proto(encoder_proto()), [feed], limit=1)


MEMORY_SCRIPT = """
import sys
import numpy as np, onnx_ir as ir
from onnx import TensorProto, helper
from pathlib import Path
from effc.ir.weights import file_tensor
from effc.verify.bench_worker import peak_resident
from effc.verify.streaming import evaluate
sys.path.insert(0, sys.argv[2])
from verify_models import OPSETS, linear

SIZE, LAYERS = 8192, int(sys.argv[3])
path, nodes = Path(sys.argv[1]), []
for layer in range(LAYERS):
    nodes += linear(f"h{layer}", f"w{layer}", f"h{layer + 1}")
info = helper.make_tensor_value_info
graph = helper.make_graph(
    nodes, "big", [info("h0", TensorProto.FLOAT, ["n", SIZE])], [info(f"h{LAYERS}", TensorProto.FLOAT, ["n", SIZE])],
    [TensorProto(name=f"w{i}", data_type=TensorProto.BFLOAT16, dims=[1, 1], raw_data=bytes(2)) for i in range(LAYERS)],
)
model = ir.from_proto(helper.make_model(graph, opset_imports=OPSETS, ir_version=11))
nbytes = 2 * SIZE * SIZE
for layer in range(LAYERS):
    value = model.graph.initializers[f"w{layer}"]
    value.const_value = file_tensor(path, layer * nbytes, ir.DataType.BFLOAT16, (SIZE, SIZE), value.name)
    value.shape = ir.Shape((SIZE, SIZE))
before = peak_resident()
[outputs] = evaluate(model, [{"h0": np.ones((2, SIZE), np.float32)}], limit=256 << 20)
print(peak_resident() - before, outputs[f"h{LAYERS}"].shape)
"""


def streamed_growth(tmp_path: Path, layers: int) -> int:
    """Bytes by which the peak memory of a fresh process grows while it evaluates layers of 134 MB."""
    weights = tmp_path / "weights.bin"
    with weights.open("wb") as file:
        file.truncate(layers * 2 * 8192 * 8192)
    arguments = [sys.executable, "-c", MEMORY_SCRIPT, str(weights), str(Path(__file__).parent), str(layers)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    answer = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    return int(answer.stdout.split()[0])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """24 layers of 134 MB, 3.2 GB in all, stay below three times the limit."""
    growth = streamed_growth(tmp_path, 24)
    assert growth < 3 * (256 << 20)
    assert growth < 1.15 * streamed_growth(tmp_path, 3)
