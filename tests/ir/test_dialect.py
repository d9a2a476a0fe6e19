"""The reference bodies of the dialect, run by onnxruntime, against NumPy."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from effc.errors import InputError
from effc.ir.dialect import infer_dialect_types
from effc.ir.dialect.coded_gather import coded_gather
from effc.ir.dialect.coded_matmul import coded_matmul
from effc.ir.dialect.decode_weight import decode_weight
from effc.ir.dialect.inline import inline_dialect
from effc.ir.dialect.stored_weight import StoredWeight
from effc.kernels import codec

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
FORMS = [("bfloat16", "raw"), ("float16", "raw"), ("bfloat16", "rank4"), ("float32", "rank4")]
SHAPES = [(1, 1), (3, 127), (2, 128), (5, 129), (7, 640)]


def _operand(array: np.ndarray, layout: str) -> StoredWeight:
    coded = codec.encode(array, layout)
    values = []
    for index, part in enumerate(coded.tensors):
        tensor = ir.tensor(part)
        values.append(
            ir.Value(
                name=f"w.{index}", type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor
            )
        )
    return StoredWeight(layout, ir.DataType.from_numpy(array.dtype), *array.shape, tuple(values))


def _run(make: Callable[[ir.Value, StoredWeight], ir.Node], weight: StoredWeight, feed: np.ndarray) -> np.ndarray:
    given = ir.Value(
        name="x",
        type=ir.TensorType(ir.DataType.from_numpy(feed.dtype)),
        shape=ir.Shape([f"d{axis}" for axis in range(feed.ndim)]),
    )
    node = make(given, weight)
    node.outputs[0].name = "y"
    graph = ir.Graph([given], [node.outputs[0]], nodes=[node], initializers=weight.tensors, opset_imports={"": 24})
    model = ir.Model(graph, ir_version=11)
    assert inline_dialect(model) == 1
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(None, {"x": feed})[0]


def _weight(shape: tuple[int, int], dtype: str) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(DTYPES[dtype])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "layout"), FORMS)
def test_product_and_lookup(shape: tuple[int, int], dtype: str, layout: str) -> None:
    array = _weight(shape, dtype)
    x = np.random.default_rng(2).standard_normal((2, 3, shape[1])).astype(np.float32)
    expected = x.astype(np.float64) @ array.astype(np.float64).T
    bound = shape[1] * np.finfo(np.float32).eps * (np.abs(x).astype(np.float64) @ np.abs(array).astype(np.float64).T)
    assert np.all(np.abs(_run(coded_matmul, _operand(array, layout), x) - expected) <= bound + 1e-30)
    indices = np.array([[0, shape[0] - 1], [-1, 0]])
    found = _run(coded_gather, _operand(array, layout), indices)
    np.testing.assert_array_equal(found, array.astype(np.float32)[indices])


def test_every_bfloat16_pattern_decodes_to_itself() -> None:
    words = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    weight = _operand(words.view(ml_dtypes.bfloat16), "rank4")
    rows = _run(coded_gather, weight, np.arange(256))
    np.testing.assert_array_equal(rows.view(np.uint32), words.astype(np.uint32) << 16)


def test_finite_float32_decodes_exactly() -> None:
    bits = np.random.default_rng(3).integers(0, 2**32, (64, 200), dtype=np.uint32)
    bits[(bits >> 23 & 255) == 255] &= 0x7F7FFFFF
    array = bits.view(np.float32)
    rows = _run(coded_gather, _operand(array, "rank4"), np.arange(64))
    np.testing.assert_array_equal(rows.view(np.uint32), bits)


def test_layouts_without_a_body_say_which_have_one() -> None:
    weight = _operand(_weight((4, 64), "bfloat16"), "huffman")
    with pytest.raises(InputError, match="Write the engine with the layouts `raw` or `rank4`"):
        _run(coded_matmul, weight, np.zeros((1, 64), np.float32))


def test_inference_gives_types_and_refuses_bad_attributes() -> None:
    weight = _operand(_weight((4, 64), "bfloat16"), "raw")
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 64]))
    node = coded_matmul(x, weight)
    assert str(node.outputs[0].shape) == "[batch,4]"
    assert decode_weight(weight).outputs[0].shape == ir.Shape([4, 64])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=weight.tensors, opset_imports={"": 24, "effc": 1})
    node.attributes.add(ir.AttrString("rows", "four"))
    with pytest.raises(InputError, match="'rows' of CodedMatMul is STRING, it must be INT"):
        infer_dialect_types(graph)
    node.attributes.add(ir.AttrInt64("rows", 4))
    node.attributes.add(ir.AttrInt64("rwos", 4))
    with pytest.raises(InputError, match="has no attribute 'rwos'"):
        infer_dialect_types(graph)
