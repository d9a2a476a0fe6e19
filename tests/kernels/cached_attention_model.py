"""Tiny ONNX models with one `effc.CachedAttention`, and sessions over them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import ml_dtypes
import numpy as np
import onnx_ir
import onnxruntime as ort
from attention_oracle import Form
from onnx import TensorProto, helper

from effc import kernels
from effc.ir.dialect.cached_attention import NO_SELECTION, NO_STORAGE

TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.bool_): TensorProto.BOOL,
}
DENSE: dict[str, object] = {
    "storage": "dense",
    **{name: value for name, value in NO_STORAGE.items() if value != ()},
    "selection": "all",
    **NO_SELECTION,
}
OPTIONAL = ("bias", "cos", "sin")


@dataclass(frozen=True)
class Model:
    """A session of one node, and what it needs to run."""

    session: ort.InferenceSession
    form: Form

    def run(
        self, feeds: Mapping[str, np.ndarray], past: Sequence[np.ndarray], in_place: bool = False
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """The result and the cache; `in_place` binds each past tensor, which is changed, as its own present."""
        binding = self.session.io_binding()
        past = [np.ascontiguousarray(array) for array in past]
        bound = [to_ortvalue(array) for array in past]
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, to_ortvalue(array))
        for i, tensor in enumerate(bound):
            binding.bind_ortvalue_input(f"past{i}", tensor)
        binding.bind_output("y", "cpu")
        for i, tensor in enumerate(bound):
            if in_place:
                binding.bind_ortvalue_output(f"present{i}", tensor)
            else:
                binding.bind_output(f"present{i}", "cpu")
        self.session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        return outputs[0].numpy(), past if in_place else [from_ortvalue(value) for value in outputs[1:]]


def to_ortvalue(array: np.ndarray) -> ort.OrtValue:
    """The array itself, if its elements follow each other."""
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def from_ortvalue(value: ort.OrtValue) -> np.ndarray:
    """A copy as an array, also of bfloat16, which onnxruntime gives to nobody but through its address."""
    if value.data_type() != "tensor(bfloat16)":
        return np.array(value.numpy())
    count = int(np.prod(value.shape()))
    words = np.ctypeslib.as_array((ctypes.c_uint16 * max(count, 1)).from_address(value.data_ptr() or id(value)))
    return words[:count].copy().view(ml_dtypes.bfloat16).reshape(value.shape())


def open_model(
    form: Form,
    past: Sequence[np.ndarray],
    optional: Sequence[str] = (),
    threads: int = 2,
    storage: Mapping[str, object] = DENSE,
    constants: Mapping[str, np.ndarray] | None = None,
    scores: bool = False,
    **overrides: object,
) -> Model:
    """A session for tensors of the past like `past`; sizes that may grow are symbolic.

    Constants, and an input `scores`, come behind the cache.
    """
    attributes = {**asdict(form), **storage, **overrides}
    attributes = {name: value for name, value in attributes.items() if value is not None}
    inputs = ["query", "key", "value", "valid", *(name if name in optional else "" for name in OPTIONAL)]
    cache = range(len(past))
    node = helper.make_node(
        "CachedAttention",
        [*inputs, *(f"past{i}" for i in cache), *(constants or {}), *(["scores"] if scores else [])],
        ["y", *(f"present{i}" for i in cache)],
        name="attention",
        domain="effc",
        **attributes,
    )
    shapes = {
        "query": (TensorProto.FLOAT, ["batch", "seq", "query_width"]),
        "key": (TensorProto.FLOAT, ["batch", "seq2", "key_width"]),
        "value": (TensorProto.FLOAT, ["batch2", "seq", "value_width"]),
        "valid": (TensorProto.BOOL, ["batch3", "total"]),
        "bias": (TensorProto.FLOAT, ["b", "h", "seq", "total2"]),
        "cos": (TensorProto.FLOAT, ["a", "seq", "angles"]),
        "sin": (TensorProto.FLOAT, ["a2", "seq", "angles2"]),
    }
    given = [helper.make_tensor_value_info(name, *shapes[name]) for name in inputs if name]
    results = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "seq", form.heads * form.value_size])]
    if scores:
        given.append(helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch5", "total3"]))
    for i, tensor in enumerate(past):
        heads = [tensor.shape[1]] if tensor.ndim > 2 else []
        for to, word, size in ((given, "past", "old"), (results, "present", "new")):
            axes = ["batch4", *heads, f"{size}{i}", *tensor.shape[3:]]
            to.append(helper.make_tensor_value_info(f"{word}{i}", TYPES[tensor.dtype], axes))
    imports = [helper.make_opsetid("", 24), helper.make_opsetid("effc", 1)]
    tensors = [onnx_ir.to_proto(onnx_ir.tensor(array, name=name)) for name, array in (constants or {}).items()]
    graph = helper.make_graph([node], "test", given, results, tensors)
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(str(kernels.library_path()))
    return Model(ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]), form)
