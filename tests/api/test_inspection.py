"""What is said about weights and sites, against figures computed by hand."""

import json
from pathlib import Path

import jsonschema
import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from effc.inspection import inspect_engine, inspect_model
from effc.ir.program import Program, Source, Task
from effc.runtime.bundle import Manifest, Port

SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schemas"
RANDOM = np.random.default_rng(1)


def check(facts, schema: str):
    jsonschema.validate(json.loads(json.dumps(facts)), json.loads((SCHEMAS / f"{schema}.json").read_text()))
    return facts


def initializer(name: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
    tensor = ir.tensor(array, dtype=dtype, name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(dtype), shape=ir.Shape(array.shape))


def program(weight: np.ndarray, dtype: ir.DataType) -> Program:
    """`y = LayerNorm(x @ weight.T + bias)`, the weight stored [n, k] in its own dtype."""
    n, k = weight.shape
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "seq", k]))
    stored = [
        initializer("w", weight, dtype),
        initializer("b", np.ones(n, np.float32), ir.DataType.FLOAT),
        initializer("g", np.ones(n, np.float32), ir.DataType.FLOAT),
        initializer("unused_ids", np.arange(5), ir.DataType.INT64),
    ]
    w, b, g, _ = stored
    cast = ir.node("Cast", [w], {"to": ir.DataType.FLOAT.value})
    turned = ir.node("Transpose", [cast.outputs[0]], {"perm": [1, 0]})
    product = ir.node("MatMul", [x, turned.outputs[0]])
    added = ir.node("Add", [product.outputs[0], b])
    norm = ir.node("LayerNormalization", [added.outputs[0], g], {"axis": -1, "epsilon": 1e-5})
    out = norm.outputs[0]
    out.name, out.type, out.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "seq", n])
    nodes = [cast, turned, product, added, norm]
    graph = ir.Graph([x], [out], nodes=nodes, initializers=stored, opset_imports={"": 24}, name="g")
    return Program(ir.Model(graph, ir_version=11), Task.ENCODER, Source("memory", "test"))


def entropy(exponents: np.ndarray) -> float:
    counts = np.bincount(exponents.ravel())
    share = counts[counts > 0] / exponents.size
    return float(-(share * np.log2(share)).sum())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (129, 257)])
def test_bits_of_a_bfloat16_weight(shape) -> None:
    weight = RANDOM.normal(size=shape).astype(ml_dtypes.bfloat16)
    facts = check(inspect_model(program(weight, ir.DataType.BFLOAT16)), "inspect")
    row = next(row for row in facts["weights"]["tensors"] if row["shape"] == list(shape) and row["dtype"] == "bfloat16")
    assert row["bytes"] == 2 * weight.size
    exponents = (weight.view(np.uint16).astype(np.int64) >> 7) & 0xFF
    assert row["entropy_bits"] == pytest.approx(8 + entropy(exponents), abs=1e-9)
    assert row["entropy_bits"] <= row["storage_bits"] <= 16 or weight.size < 64
    assert row["runtime_bits"] <= 16


def test_a_widened_bfloat16_weight_is_seen_for_what_it_is() -> None:
    narrow = RANDOM.normal(size=(64, 64)).astype(ml_dtypes.bfloat16)
    wide = narrow.astype(np.float32)
    facts = inspect_model(program(wide, ir.DataType.FLOAT))
    row = next(row for row in facts["weights"]["tensors"] if sorted(row["shape"]) == [64, 64])
    exponents = (narrow.view(np.uint16).astype(np.int64) >> 7) & 0xFF
    assert row["dtype"] == "float"
    assert row["entropy_bits"] == pytest.approx(8 + entropy(exponents), abs=1e-9)
    assert row["storage_bits"] < 16


def test_sites_are_found_and_described() -> None:
    facts = check(inspect_model(program(np.ones((6, 4), np.float32), ir.DataType.FLOAT)), "inspect")
    (linear,) = facts["sites"]["linear"]
    assert (linear["n"], linear["k"], linear["bias"], linear["tied"]) == (6, 4, True, False)
    (norm,) = facts["sites"]["norm"]
    assert (norm["kind"], norm["width"]) == ("layer", 6)
    assert facts["sites"]["attention"] == facts["sites"]["embedding"] == []
    assert facts["cost"]["items"]["flops"] >= 2 * 128 * 6 * 4


def test_progress_ends_below_the_total() -> None:
    seen = []
    inspect_model(program(np.ones((6, 4), np.float32), ir.DataType.FLOAT), lambda *step: seen.append(step))
    weights = [(done, total) for stage, done, total in seen if stage == "weights"]
    assert weights[0][0] == 0
    assert all(done < total for done, total in weights)


def test_an_engine_is_its_manifest_with_files_by_size() -> None:
    port = Port("x", "float32", ["batch", 3])
    manifest = Manifest(
        effc_version="1", task="encoder", target="ort-cpu", portable=True, needs_kernels=False, model="model.onnx",
        inputs=[port], outputs=[port], cache=None, pipeline="canonicalize", passes=[], source={}, config={},
        bytes={"engine": 5}, versions={}, opset=24, ir_version=11, files={"model.onnx": {"bytes": 5, "sha256": "0"}},
    )  # fmt: skip
    facts = check(inspect_engine(manifest), "inspect-engine")
    assert facts["files"] == {"model.onnx": 5}
    assert facts["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 3]}]
