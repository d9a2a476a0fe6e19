"""Checkpoint names and layouts turned into those of the module, by transformers' own rules, without reading weights.

transformers describes what changed between the checkpoint on disk and its module (renamed prefixes, experts stored
one by one and used as one tensor) as a list of renamings and converters (`transformers.conversion_mapping`). The rules
are applied here to names and to fake tensors first; the real conversion runs when a weight is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from effc.errors import InputError
from effc.frontends.environment import require
from effc.ir.weights import computed_tensor


def to_module(
    model: Any, stored: Mapping[str, ir.TensorProtocol], rules: Sequence[Any]
) -> dict[str, ir.TensorProtocol]:
    """The checkpoint's tensors under the names and in the layout of the module.

    Args:
        model: The transformers module.
        stored: Name in the checkpoint -> lazy tensor.
        rules: Renamings and converters, in order.

    Returns:
        Parameter or buffer name -> lazy tensor. Tensors the module does not know are left out.

    Raises:
        InputError: A conversion fails on the checkpoint's shapes.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

    known = model.state_dict()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    result: dict[str, ir.TensorProtocol] = {}
    groups: dict[str, _Group] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = _rename(model, name, renamings, converters, known)
        if pattern is None:
            if target in known:
                result[target] = stored[name]
        elif target in known:
            group = groups.setdefault(target, _Group(model, target, by_pattern[pattern]))
            group.sources.append((pattern, stored[name]))
    for group in groups.values():
        result.update(group.tensors())
    return result


def _rename(model: Any, name: str, renamings: list[Any], converters: list[Any], known: Mapping[str, Any]) -> Any:
    from transformers.core_model_loading import rename_source_key

    target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
    if target not in known and name in known:
        target, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
    return target, pattern


class _Group:
    """Checkpoint tensors that one converter turns into one or more parameters."""

    def __init__(self, model: Any, target: str, rule: Any) -> None:
        self.model = model
        self.target = target
        self.rule = rule
        self.sources: list[tuple[str, ir.TensorProtocol]] = []

    def tensors(self) -> dict[str, ir.TensorProtocol]:
        """The parameters this group makes, each computed from its sources when asked."""
        torch: Any = require("torch", "Converting a checkpoint")
        try:
            shapes = self._run(
                lambda tensor: torch.empty(tuple(tensor.shape), dtype=_torch_dtype(tensor), device="meta")
            )
        except Exception as error:
            raise InputError(
                f"{self.target}: its conversion from the checkpoint fails "
                f"({type(error).__name__}: {str(error)[:300]}). The checkpoint does not fit its config.json."
            ) from error
        return {name: self._lazy(name, fake) for name, fake in shapes.items()}

    def _lazy(self, name: str, fake: Any) -> ir.LazyTensor:
        dtype = ir_dtype(fake)
        return computed_tensor(lambda: to_numpy(self._run(to_torch)[name]), dtype, tuple(fake.shape), name)

    def _run(self, load: Callable[[ir.TensorProtocol], Any]) -> dict[str, Any]:
        rule = deepcopy(self.rule)
        for pattern, tensor in self.sources:
            rule.add_tensor(self.target, tensor.name or "", pattern, lambda tensor=tensor: load(tensor))
        converted = rule.convert(self.target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


_TORCH_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.DOUBLE: "float64",
    ir.DataType.FLOAT8E4M3FN: "float8_e4m3fn",
    ir.DataType.FLOAT8E5M2: "float8_e5m2",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.INT16: "int16",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
    ir.DataType.BOOL: "bool",
}


def _torch_dtype(tensor: ir.TensorProtocol) -> Any:
    return getattr(require("torch", "Reading a tensor"), _TORCH_NAMES[tensor.dtype])


def ir_dtype(tensor: Any) -> ir.DataType:
    """The element type of a torch tensor."""
    return {name: dtype for dtype, name in _TORCH_NAMES.items()}[str(tensor.dtype).removeprefix("torch.")]


def to_torch(tensor: ir.TensorProtocol) -> Any:
    """A torch tensor with the bytes of a tensor of the graph."""
    torch: Any = require("torch", "Reading a tensor")
    array = np.ascontiguousarray(tensor.numpy())
    dtype = _torch_dtype(tensor)
    if array.ndim == 0:
        return torch.from_numpy(array.reshape(1).view(np.uint8).copy()).view(dtype).reshape(())
    if array.size == 0:
        return torch.empty(array.shape, dtype=dtype)
    data = array.view(np.uint8)
    return torch.from_numpy(data if data.flags.writeable else data.copy()).view(dtype)


def to_numpy(tensor: Any) -> np.ndarray:
    """A numpy array with the bytes of a torch tensor; bfloat16 and float8 become their ml_dtypes."""
    torch: Any = require("torch", "Reading a tensor")
    tensor = tensor.detach().contiguous()
    extra = {
        torch.bfloat16: ml_dtypes.bfloat16,
        torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
        torch.float8_e5m2: ml_dtypes.float8_e5m2,
    }
    if tensor.dtype not in extra:
        return tensor.numpy()
    width = torch.int16 if tensor.dtype == torch.bfloat16 else torch.uint8
    return tensor.view(width).numpy().view(extra[tensor.dtype])
