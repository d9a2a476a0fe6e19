"""Inputs and outputs of graphs from other exporters: what task they show, and their names in effc's spelling."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from effc.frontends.sizes import BATCH, PAST, SEQ, TOTAL
from effc.ir.program import Task

HIDDEN = ("last_hidden_state", "token_embeddings", "sentence_embedding", "encoder_hidden_states")
_CACHE = re.compile(r"past|present|cache|(^|[._])kv([._]|$)", re.IGNORECASE)
_PAIR_WORDS = re.compile(r"(past|present)?_?key_?values?(?=[._])|(past|present)_key_value", re.IGNORECASE)
_TOKENS = re.compile(r"[a-z]+|\d+")
_PARTS = {"key": "key", "keys": "key", "k": "key", "value": "value", "values": "value", "v": "value"}
_CROSS = {"encoder", "cross"}
_AXES = {
    "input_ids": {0: BATCH, 1: SEQ},
    "inputs_embeds": {0: BATCH, 1: SEQ},
    "position_ids": {0: BATCH, 1: SEQ},
    "token_type_ids": {0: BATCH, 1: SEQ},
    "pixel_values": {0: BATCH},
    "input_features": {0: BATCH},
}


@dataclass(frozen=True)
class CachePort:
    """One cache tensor: layer number and `key` or `value`."""

    layer: int
    part: str


def parse_cache_name(name: str) -> CachePort | None:
    """Layer and part a name such as `past_key_values.3.key`, `past_key_in3` or `present.3.value` states."""
    if not _CACHE.search(name):
        return None
    words = _TOKENS.findall(_PAIR_WORDS.sub("cache", name).lower())
    numbers = [int(word) for word in words if word.isdigit()]
    parts = [_PARTS[word] for word in words if word in _PARTS]
    if len(numbers) != 1 or len(parts) != 1 or _CROSS & set(words):
        return None
    return CachePort(numbers[0], parts[0])


def normalise_cache(graph: ir.Graph) -> tuple[str, ...]:
    """Rename cache inputs to `past_key_values.N.key`, outputs to `present.N.key`, where it is unambiguous.

    Unambiguous: inputs and outputs name the same layers 0 to n-1, each with one rank-4 key and value.

    Returns:
        Notes on what was renamed or why not.
    """
    past, present = _cache_ports(graph.inputs), _cache_ports(graph.outputs)
    suspects = [value.name for value in graph.inputs if _CACHE.search(value.name or "")]
    if not suspects:
        return ()
    layers = {port.layer for port in past}
    complete = len(past) == 2 * len(layers) == len(suspects) and layers == set(range(len(layers)))
    if not complete or set(past) != set(present):
        return (f"Cache-like inputs ({', '.join(map(str, suspects[:3]))}, …) keep their names: they are ambiguous.",)
    renamed = False
    for prefix, ports in (("past_key_values", past), ("present", present)):
        for port, value in ports.items():
            name = f"{prefix}.{port.layer}.{port.part}"
            renamed |= value.name != name
            value.name = name
    return (f"Cache inputs such as {suspects[0]} were renamed to past_key_values.N.key / .value.",) if renamed else ()


def _cache_ports(values: Iterable[ir.Value]) -> dict[CachePort, ir.Value]:
    ports: dict[CachePort, ir.Value] = {}
    repeated: set[CachePort] = set()
    for value in values:
        port = parse_cache_name(value.name or "")
        if port is None or value.shape is None or len(value.shape) != 4:
            continue
        if port in ports:
            repeated.add(port)
        ports[port] = value
    return {port: value for port, value in ports.items() if port not in repeated}


def infer_task(graph: ir.Graph) -> Task:
    """The task that the names of inputs and outputs show."""
    inputs = {value.name or "" for value in graph.inputs}
    outputs = {value.name or "" for value in graph.outputs}
    cached = any(name.startswith("past_key_values.") for name in inputs)
    if cached and "logits" in outputs:
        return Task.CAUSAL_LM
    if "pixel_values" in inputs and "input_ids" not in inputs:
        return Task.VISION
    if "input_ids" in inputs and not any(map(_CACHE.search, inputs)) and outputs & {*HIDDEN, "logits"}:
        return Task.ENCODER
    return Task.GENERIC


def size_names(graph: ir.Graph, task: Task) -> tuple[Mapping[int, str], ...]:
    """For each input, axis -> size name, for the axes that are symbolic and whose meaning the names show."""
    cached = task is Task.CAUSAL_LM
    return tuple(_axes(value, cached) for value in graph.inputs)


def _axes(value: ir.Value, cached: bool) -> dict[int, str]:
    name, shape = value.name or "", value.shape
    if shape is None:
        return {}
    if name == "attention_mask" and len(shape) == 2:
        axes = {0: BATCH, 1: TOTAL if cached else SEQ}
    elif name.startswith("past_key_values.") and cached:
        axes = {0: BATCH, 2: PAST}
    else:
        axes = _AXES.get(name, {})
    return {axis: size for axis, size in axes.items() if axis < len(shape) and not isinstance(shape[axis], int)}
