"""GGUF tensors as lazy weights: blocks are dequantised a few rows at a time when a weight is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from effc.frontends import conversions
from effc.frontends.environment import require
from effc.frontends.gguf_header import GgufHeader, GgufTensor
from effc.ir.weights import computed_tensor, file_tensor

ROWS_AT_ONCE = 1 << 22
"""Values dequantised at once: 16 MiB of float32."""
PLAIN = {0: ir.DataType.FLOAT, 1: ir.DataType.FLOAT16, 30: ir.DataType.BFLOAT16, 28: ir.DataType.DOUBLE}
_EXPERTS = re.compile(r"_exps\.weight$|^output\.weight$")
"""Tensors that transformers' processors turn into torch tensors, which take no bfloat16 arrays."""


def lazy(path: Path, tensor: GgufTensor, dtype: ir.DataType) -> ir.LazyTensor:
    """The tensor as a weight: plain float types as they are, blocks dequantised and rounded to `dtype`.

    Rounding is to nearest even. Dequantised values are computed in float32 by the `gguf` package.
    """
    if tensor.kind in PLAIN:
        return file_tensor(path, tensor.offset, PLAIN[tensor.kind], tensor.shape, tensor.name)
    return computed_tensor(lambda: dequantise(path, tensor, dtype), dtype, tensor.shape, tensor.name)


def dequantise(path: Path, tensor: GgufTensor, dtype: ir.DataType) -> np.ndarray:
    """All values of a block-quantised tensor in `dtype`, never holding more than a few rows in float32."""
    gguf = require("gguf", "Reading GGUF")
    kind = gguf.GGMLQuantizationType(tensor.kind)
    rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
    row_bytes, width = tensor.nbytes // rows, tensor.shape[-1]
    result = np.empty((rows, width), dtype=dtype.numpy())
    step = max(1, ROWS_AT_ONCE // width)
    with path.open("rb") as file:
        file.seek(tensor.offset)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            raw = np.fromfile(file, dtype=np.uint8, count=count * row_bytes).reshape(count, row_bytes)
            result[start : start + count] = gguf.dequantize(raw, kind)
    return result.reshape(tensor.shape)


def module_tensors(header: GgufHeader, model: Any, config: Any, dtype: ir.DataType) -> dict[str, ir.TensorProtocol]:
    """The file's tensors under the names and in the layout of the transformers module, by transformers' rules.

    Args:
        header: The checked header.
        model: The module.
        config: Its configuration.
        dtype: What quantised blocks are stored as.
    """
    from transformers.integrations.gguf import get_gguf_conversion_mapping, is_gguf_arch_supported

    stored = {tensor.name: lazy(header.path, tensor, dtype) for tensor in header.tensors}
    if is_gguf_arch_supported(header.architecture):
        return conversions.to_module(model, stored, get_gguf_conversion_mapping(header.architecture, config))
    return _processed(header, model, config, dtype)


def _processed(header: GgufHeader, model: Any, config: Any, dtype: ir.DataType) -> dict[str, ir.TensorProtocol]:
    from transformers import modeling_gguf_pytorch_utils as rules

    processor = rules.TENSOR_PROCESSORS.get(header.architecture, rules.TensorProcessor)(config=config.to_dict())
    names = rules.get_gguf_hf_weights_map(model, processor)
    known = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sources: dict[str, list[GgufTensor]] = {}
    for tensor in header.tensors:
        target = _target(tensor.name, names)
        if target in known:
            sources.setdefault(target, []).append(tensor)
    return {
        target: _Processed(header.path, target, tensors, processor, names, dtype).lazy(known[target])
        for target, tensors in sources.items()
    }


def _target(name: str, names: Mapping[str, str]) -> str:
    for key in (name, name.removesuffix(".weight")):
        if key in names:
            return names[key]
    return "lm_head.weight" if name == "output.weight" else ""


class _Processed:
    """One parameter made from GGUF tensors by a transformers tensor processor."""

    def __init__(
        self,
        path: Path,
        target: str,
        sources: list[GgufTensor],
        processor: Any,
        names: Mapping[str, str],
        dtype: ir.DataType,
    ) -> None:
        self.path = path
        self.target = target
        self.sources = sources
        self.processor = processor
        self.names = names
        self.blocks = dtype

    def lazy(self, shape: tuple[int, ...]) -> ir.LazyTensor:
        """The parameter, computed when asked for."""
        return computed_tensor(self.compute, self.dtype(), shape, self.target)

    def dtype(self) -> ir.DataType:
        """Vectors are float32, because processors do arithmetic on them; matrices keep a plain type."""
        kinds = {source.kind for source in self.sources}
        if all(len(source.shape) == 1 for source in self.sources):
            return ir.DataType.FLOAT
        return PLAIN.get(kinds.pop(), self.blocks) if len(kinds) == 1 else self.blocks

    def compute(self) -> np.ndarray:
        """Dequantise the sources and run the processor."""
        parsed: dict[str, Any] = {"tensors": {}}
        for source in self.sources:
            arithmetic = len(source.shape) == 1 or _EXPERTS.search(source.name)
            values = lazy(self.path, source, ir.DataType.FLOAT if arithmetic else self.dtype()).numpy()
            if arithmetic:
                values = values.astype(np.float32)
            result = self.processor.process(
                weights=values, name=source.name, tensor_key_mapping=self.names, parsed_parameters=parsed
            )
            if result.name is not None:
                return result.weights.astype(self.dtype().numpy())
        return conversions.to_numpy(parsed["tensors"][self.target]).astype(self.dtype().numpy())
