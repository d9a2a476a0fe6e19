"""The inputs of an engine that bring what a prefix holds beside its cache: clusters, or a product for its keys."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from effc.errors import EngineError, UsageError
from effc.runtime.bundle import CacheLayout, Port
from effc.runtime.tensors import check_feeds, storage_dtype

TOKENS = 0
"""Among the inputs of `CacheLayout.low_rank`, the one whose second axis counts the tokens that it stands for."""


def prefix_ports(layout: CacheLayout) -> list[Port]:
    """The inputs, each once."""
    inputs = [layer.inputs for layer in layout.clusters] + [layer.inputs for layer in layout.low_rank]
    return list({port.name: port for ports in inputs for port in ports}.values())


def empty_inputs(layout: CacheLayout) -> dict[str, np.ndarray]:
    """What is fed without a prefix, so that everything is read."""
    return {port.name: empty_input(port) for port in prefix_ports(layout)}


def empty_input(port: Port) -> np.ndarray:
    """What one of these inputs is fed then."""
    return np.zeros([size if isinstance(size, int) else 0 for size in port.shape], storage_dtype(port.dtype))


def check_inputs(layout: CacheLayout, inputs: Mapping[str, np.ndarray]) -> None:
    """Compare what a prefix holds for these inputs with what the engine takes.

    Raises:
        EngineError: One is missing, unknown, or has another dtype or shape.
    """
    try:
        check_feeds(prefix_ports(layout), inputs)
    except UsageError as error:
        raise EngineError(f"its clusters or matrices are not those of the engine: {error}") from error


def tokens_elsewhere(layout: CacheLayout, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Cache input name -> how many of the first tokens it has no place for, since inputs stand for them."""
    return {
        name: inputs[layer.inputs[TOKENS].name].shape[1]
        for layer in layout.low_rank
        for name in (layer.key, layer.value)
        if layer.inputs[TOKENS].name in inputs
    }
