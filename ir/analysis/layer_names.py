"""Names of layers for reports, from the names of nearby weights and nodes. Never used to match anything."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import onnx_ir as ir

_Site = TypeVar("_Site", bound=Any)

_LAYER = re.compile(r"(?:^|[./_])((?:layers?|h|blocks?|encoder|decoder|group)[./_]\d+)(?=[./_]|$)")
_CACHE = re.compile(r"^past(?:_key_values)?\.(\d+)\.")
NEARBY = 40
"""How many nodes upstream are looked at."""


def layer_in(name: str | None) -> str | None:
    """The layer part of a weight or node name: `model.layers.3.mlp.weight` -> `layers.3`."""
    cache = _CACHE.search(name or "")
    if cache:
        return f"layers.{cache.group(1)}"
    found = _LAYER.search(name or "")
    return found.group(1).replace("/", ".") if found else None


def layer_of(node: ir.Node) -> str | None:
    """The layer a node belongs to, judging by its own name and the weights it depends on nearby."""
    own = layer_in(node.name)
    if own is not None:
        return own
    queue, seen = deque([node]), {node}
    while queue and len(seen) < NEARBY:
        for value in queue.popleft().inputs:
            name = (
                layer_in(value.name)
                if value is not None and (value.is_initializer() or value.is_graph_input())
                else None
            )
            if name is not None:
                return name
            before = value.producer() if value is not None else None
            if before is not None and before not in seen:
                seen.add(before)
                queue.append(before)
    return None


def named_by_layer(sites: Sequence[_Site], kind: str) -> tuple[_Site, ...]:
    """The sites with the names `kind layers.3`, numbered where a layer has several."""
    counts: Counter[str] = Counter()
    named = []
    for site in sites:
        layer = layer_of(site.node)
        base = f"{kind} {layer}" if layer else kind
        counts[base] += 1
        named.append(replace(site, name=base if counts[base] == 1 else f"{base} #{counts[base]}"))
    return tuple(named)


def unique_names(sites: Sequence[_Site]) -> tuple[_Site, ...]:
    """The sites with repeated names numbered: `weight`, `weight #2`."""
    counts: Counter[str] = Counter()
    named = []
    for site in sites:
        counts[site.name] += 1
        named.append(site if counts[site.name] == 1 else replace(site, name=f"{site.name} #{counts[site.name]}"))
    return tuple(named)
