import os

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from effc.errors import InputError, UsageError
from effc.frontends import import_model
from effc.frontends.port_names import CachePort, parse_cache_name
from effc.ir.program import Task


def save(model, folder, external="w.bin"):
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    ir.save(model, path, external_data=external)
    return path


def change_external(path, **entries):
    """Overwrite entries of the first external tensor."""
    proto = onnx.load(str(path), load_external_data=False)
    tensor = proto.graph.initializer[0]
    old = {entry.key: entry.value for entry in tensor.external_data}
    del tensor.external_data[:]
    for key, value in {**old, **entries}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def test_external_data_is_read_lazily_and_equal(onnx_model, tmp_path, run):
    model = onnx_model()
    weight = model.graph.initializers["w"].const_value.numpy()
    program = import_model(save(model, tmp_path))
    tensor = program.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    assert tensor.numpy().tobytes() == weight.tobytes()
    x = np.random.default_rng(1).standard_normal((3, 64), dtype=np.float32)
    np.testing.assert_allclose(run(program, {"x": x})["y"], np.maximum(x @ weight, 0), rtol=1e-4, atol=1e-4)
    assert program.task is Task.GENERIC
    assert str(program.graph.inputs[0].shape) == "[n,64]"
    assert any(note.startswith("Compared with the original") for note in program.source.notes)


def test_the_hash_covers_external_data(onnx_model, tmp_path):
    path = save(onnx_model(), tmp_path)
    before = import_model(path, check=False).source.content_hash
    data = bytearray((tmp_path / "w.bin").read_bytes())
    data[0] ^= 1
    (tmp_path / "w.bin").write_bytes(data)
    assert import_model(path, check=False).source.content_hash != before


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/passwd", "a/../../secret.bin", "..\\secret.bin", "C:\\x", ""]
)
def test_a_location_outside_the_folder_is_refused(onnx_model, tmp_path, location):
    (tmp_path / "secret.bin").write_bytes(b"0" * (64 * 64 * 4))
    path = save(onnx_model(), tmp_path / "model")
    change_external(path, location=location)
    with pytest.raises(InputError, match="outside the model's folder"):
        import_model(path)


def test_a_link_out_of_the_folder_is_refused(onnx_model, tmp_path):
    path = save(onnx_model(), tmp_path / "model")
    (tmp_path / "model" / "w.bin").rename(tmp_path / "elsewhere.bin")
    os.symlink("../elsewhere.bin", tmp_path / "model" / "w.bin")
    with pytest.raises(InputError, match="link out of the folder"):
        import_model(path)


def test_the_cache_layout_of_the_hub_is_followed(onnx_model, tmp_path):
    path = save(onnx_model(), tmp_path / "model")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for index, name in enumerate(("model.onnx", "w.bin")):
        (path.parent / name).rename(blobs / str(index))
        os.symlink(f"../../blobs/{index}", snapshot / name)
    program = import_model(snapshot / "model.onnx")
    assert program.graph.initializers["w"].const_value.numpy().shape == (64, 64)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"offset": "4096", "length": None}, "which has 16384"),
        ({"offset": str(1 << 60)}, "which has 16384"),
        ({"length": "4"}, "but claims 4"),
        ({"location": "gone.bin"}, "which is missing"),
        ({"location": "."}, "which is missing|outside"),
    ],
)
def test_external_data_that_does_not_fit_is_refused(onnx_model, tmp_path, entries, words):
    path = save(onnx_model(), tmp_path)
    change_external(path, **entries)
    with pytest.raises(InputError, match=words):
        import_model(path)


def test_a_truncated_data_file_is_refused(onnx_model, tmp_path):
    path = save(onnx_model(), tmp_path)
    os.truncate(tmp_path / "w.bin", 100)
    with pytest.raises(InputError, match="truncated"):
        import_model(path)


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x08\x0a", b"\xff" * 100])
def test_what_is_no_onnx_model_is_refused(tmp_path, data):
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"model\.onnx"):
        import_model(path)


def test_an_invalid_graph_is_refused_in_words(tmp_path):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("NoSuchOp", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "model.onnx")
    with pytest.raises(InputError, match="checker refuses"):
        import_model(tmp_path / "model.onnx")


def test_a_sparse_model_above_two_gigabytes_imports_in_little_memory(tmp_path):
    resource = pytest.importorskip("resource")
    size = 1 << 15
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", size])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", size])],
        ),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=10,
    )
    tensor = proto.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[size, size])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(4 * size * size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    program = import_model(tmp_path / "model.onnx")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10
    assert program.weight_bytes() == 4 * size * size
    assert any("Not compared" in note for note in program.source.notes)


def test_large_constants_become_weights(tmp_path, run):
    values = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(values)),
            helper.make_node("Constant", [], ["small"], value=numpy_helper.from_array(np.float32([2]))),
            helper.make_node("MatMul", ["x", "c"], ["p"]),
            helper.make_node("Mul", ["p", "small"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
    )
    program = import_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    assert list(program.graph.initializers) == ["c"]
    x = np.ones((2, 64), np.float32)
    np.testing.assert_allclose(run(program, {"x": x})["y"], 2 * x @ values, rtol=1e-6)
    assert "Converted from opset 21 to 24." in program.source.notes


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 21, 23])
def test_older_opsets_are_converted(opset, run):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 64), dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["p"]),
            helper.make_node("Softmax", ["p"], ["q"], axis=1),
            helper.make_node("Flatten", ["q"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(weight, "w")],
    )
    program = import_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))
    assert program.model.opset_imports[""] == 24
    assert program.graph.initializers["w"].const_value.numpy().tobytes() == weight.tobytes()
    logits = np.eye(64, dtype=np.float32)[:3] @ weight
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(run(program, {"x": np.eye(64, dtype=np.float32)[:3]})["y"], expected, rtol=1e-5)


def test_a_newer_opset_stays_and_says_so(onnx_model):
    program = import_model(onnx_model(opset=25))
    assert program.model.opset_imports[""] == 25
    assert any("stays at opset 25" in note for note in program.source.notes)


def test_foreign_operators_are_kept_and_named(onnx_model):
    program = import_model(onnx_model(domain="my.own"))
    assert [node.op_type for node in program.graph] == ["MatMul", "Relu"]
    assert any("1 my.own::Relu" in note for note in program.source.notes)
    assert any("does not load the graph" in note for note in program.source.notes)


def test_a_model_in_memory_is_not_changed(onnx_model):
    model = onnx_model(opset=23)
    program = import_model(model)
    assert model.opset_imports[""] == 23
    assert program.source.kind == "memory"
    proto = ir.to_proto(onnx_model())
    assert import_model(proto).source.content_hash == import_model(onnx_model()).source.content_hash


def test_a_proto_with_external_data_needs_its_path(onnx_model, tmp_path):
    proto = onnx.load(str(save(onnx_model(), tmp_path)), load_external_data=False)
    with pytest.raises(InputError, match="Pass the path"):
        import_model(proto)


def test_a_graph_without_cache_is_no_causal_lm(onnx_model):
    with pytest.raises(UsageError, match="no causal-lm"):
        import_model(onnx_model(), task="causal-lm")
    with pytest.raises(UsageError, match="twin"):
        import_model(onnx_model(), twin=True)


@pytest.mark.parametrize(
    ("name", "port"),
    [
        ("past_key_values.3.key", CachePort(3, "key")),
        ("present.0.value", CachePort(0, "value")),
        ("past_key_in7", CachePort(7, "key")),
        ("past_value_out7", CachePort(7, "value")),
        ("present_key_11", CachePort(11, "key")),
        ("present_key_values.2.value", CachePort(2, "value")),
        ("past.5.key", CachePort(5, "key")),
        ("kv_cache.1.k", CachePort(1, "key")),
        ("cache_k_4", CachePort(4, "key")),
        ("past_3", None),
        ("input_ids", None),
        ("past_key_values.0.encoder.key", None),
        ("past_key_values.0.1.key", None),
        ("query_1_key", None),
    ],
)
def test_cache_names(name, port):
    assert parse_cache_name(name) == port


def decoder(names):
    """A graph that appends to two layers of cache, with the given names of inputs and outputs."""
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])
    nodes = [helper.make_node("Cast", ["input_ids"], ["logits"], to=TensorProto.FLOAT)]
    inputs, outputs = [ids], [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s"])]
    for old, new in names:
        nodes.append(helper.make_node("Concat", [old, old], [new], axis=2))
        inputs.append(helper.make_tensor_value_info(old, TensorProto.FLOAT, ["b", 2, "p", 4]))
        outputs.append(helper.make_tensor_value_info(new, TensorProto.FLOAT, ["b", 2, None, 4]))
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


def test_cache_ports_of_other_exporters_are_renamed():
    names = [(f"past_{part}_in{layer}", f"past_{part}_out{layer}") for layer in range(2) for part in ("key", "value")]
    program = import_model(decoder(names))
    assert program.task is Task.CAUSAL_LM
    assert [value.name for value in program.graph.inputs][1:3] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert [value.name for value in program.graph.outputs][1:3] == ["present.0.key", "present.0.value"]
    assert str(program.graph.inputs[1].shape) == "[batch,2,past,4]"
    assert len(program.cache_pairs()) == 4


def test_ambiguous_cache_ports_keep_their_names():
    program = import_model(decoder([("past_0", "present_0"), ("past_1", "present_1")]))
    assert program.task is Task.GENERIC
    assert any("ambiguous" in note for note in program.source.notes)


def test_matrices_can_be_stored_smaller(onnx_model, run):
    program = import_model(onnx_model(), dtype="bfloat16", check=False)
    assert program.graph.initializers["w"].dtype is ir.DataType.BFLOAT16
    assert run(program, {"x": np.ones((1, 64), np.float32)})["y"].dtype == np.float32


def product(weights, inputs=(), nodes=(), outputs=()):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in "xy")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), *nodes]
    graph = helper.make_graph(nodes, "g", [x, *inputs], [y, *outputs], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_kept(odd, run):
    weight = np.eye(8, dtype=np.float32)
    weight[3, 4] = odd
    program = import_model(product([numpy_helper.from_array(weight, "w")]))
    assert any(note.startswith("Compared with the original") for note in program.source.notes)
    x = np.ones((2, 8), np.float32)
    np.testing.assert_array_equal(run(program, {"x": x})["y"], x @ weight)


def test_a_weight_given_twice_is_refused():
    weights = [numpy_helper.from_array(np.full((8, 8), value, np.float32), "w") for value in (1, 2)]
    with pytest.raises(InputError, match="more than one weight named 'w'"):
        import_model(product(weights))


def test_a_value_computed_twice_is_named():
    again = helper.make_node("MatMul", ["x", "w"], ["y"])
    with pytest.raises(InputError, match="'y'"):
        import_model(product([numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")], nodes=[again]))


def test_text_is_not_compared():
    text = [helper.make_tensor_value_info(name, TensorProto.STRING, ["n"]) for name in ("s", "t")]
    copy = helper.make_node("Identity", ["s"], ["t"])
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")
    program = import_model(product([weight], inputs=text[:1], nodes=[copy], outputs=text[1:]))
    assert "Not compared with the original: 's' is text, and only numbers are compared." in program.source.notes
