"""Names of layers for reports, from the names of nearby weights and nodes. Never used to match anything."""

from __future__ import annotations

import re
from collections import deque

import onnx_ir as ir

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
            name = layer_in(value.name) if value is not None and (value.is_initializer() or value.is_graph_input()) else None
            if name is not None:
                return name
            before = value.producer() if value is not None else None
            if before is not None and before not in seen:
                seen.add(before)
                queue.append(before)
    return None
