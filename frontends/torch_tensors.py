"""torch tensors in memory as lazy weights of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from effc.frontends.binding import Weights
from effc.frontends.conversions import ir_dtype, to_numpy
from effc.ir.weights import computed_tensor


def lazy(name: str, tensor: Any) -> ir.LazyTensor:
    """A weight that views a torch tensor when it is asked for; the tensor must not change afterwards."""
    return computed_tensor(lambda: to_numpy(tensor), ir_dtype(tensor), tuple(tensor.shape), name)


def weights_of(state: Mapping[str, Any]) -> Weights:
    """All tensors of a state dict; names that share one tensor are ties."""
    tensors: dict[str, ir.TensorProtocol] = {}
    ties: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and first.setdefault(identity, name) != name:
            ties[name] = first[identity]
        else:
            tensors[name] = lazy(name, tensor)
    return Weights(tensors, ties)
