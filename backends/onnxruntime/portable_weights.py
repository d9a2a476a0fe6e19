"""Gives coded weights a layout whose op has a body in standard ONNX, for engines without our kernels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effc.ir.dialect.stored_weight import StoredWeight, reads_stored_weight, replace_weight, stored_weight
from effc.ir.weights import computed_tensor
from effc.kernels import codec


def use_portable_layouts(graph: ir.Graph) -> None:
    """Turn every `huffman` and `rank3` weight into `rank4`, or into `raw` for fp16, bit for bit."""
    done: set[ir.Value] = set()
    for node in list(graph.all_nodes()):
        if not reads_stored_weight(node):
            continue
        weight = stored_weight(node)
        if weight.layout in ("huffman", "rank3") and weight.tensors[0] not in done:
            done.add(weight.tensors[0])
            replace_weight(graph, weight, _portable(weight))


def _portable(weight: StoredWeight) -> StoredWeight:
    layout: codec.Layout = "raw" if weight.dtype == ir.DataType.FLOAT16 else "rank4"
    dtype = codec.dtype_name(weight.dtype.numpy())

    def tensors() -> tuple[np.ndarray, ...]:
        return codec.transcode(weight.read(), layout).tensors

    # Only the sizes are kept; each tensor is transcoded again when it is written.
    sizes = [(part.dtype, part.shape) for part in tensors()]
    values = []
    for index, (name, (numpy_dtype, part_shape)) in enumerate(
        zip(codec.tensor_names(layout, dtype), sizes, strict=True)
    ):
        element = ir.DataType.from_numpy(numpy_dtype)
        tensor = computed_tensor(lambda index=index: tensors()[index], element, part_shape, f"{weight.name}.{name}")  # type: ignore[misc]
        values.append(
            ir.Value(name=tensor.name, type=ir.TensorType(element), shape=ir.Shape(part_shape), const_value=tensor)
        )
    return StoredWeight(layout, weight.dtype, weight.rows, weight.columns, tuple(values))
