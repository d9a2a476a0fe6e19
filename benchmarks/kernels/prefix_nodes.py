"""Nodes that read a part of a prefix, and the bytes that a step of them needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from cached_attention import DTYPES, SIZE, Case, Variant, cached_node_runner, dense_caches, new_tokens
from clustered_keys import OBSERVED, clustered_keys, thresholds, tokens_read

CLUSTER_TOKENS = (10, 5, 20)  # the default of a prefix first
CHUNK, RANK, OUTLIERS, LOCAL = 8, 160, 48, 4
Runner = Callable[[], float]


def clustered(
    case: Case, variant: Variant, budget: int, threads: int, nodes: int, cluster_tokens: int
) -> tuple[Runner, float]:
    """Steps that read clusters of a prefix, and the bytes that they need."""
    queries = new_tokens(case)["query"].reshape(case.kv_heads, -1, SIZE)
    keys, clusters = clustered_keys(case.kv_heads, case.total, SIZE, cluster_tokens)
    limits = thresholds(clusters, queries, SIZE**-0.5, budget / (case.total - OBSERVED))
    tokens, centroids = tokens_read(clusters, limits, queries, SIZE**-0.5)
    dtype = DTYPES[variant.type]
    caches = {"k0": keys.astype(dtype), "v0": dense_caches(case, dtype)["v0"]}
    caches["q0"] = np.zeros((1, case.heads, OBSERVED, SIZE), np.float32)
    selection = {"selection": "clusters", "select_recent": OBSERVED}
    variant = replace(variant, attributes=variant.attributes | selection)
    constants = clusters | {"thresholds": limits}
    read = (tokens + case.kv_heads * (OBSERVED + 1)) * 2 * SIZE * dtype.itemsize
    needed = read + 4 * SIZE * (centroids + clusters["parents"].size // SIZE)
    return cached_node_runner(case, variant, _numbered(caches, nodes), nodes, threads, constants), nodes * needed


def low_rank(case: Case, variant: Variant, budget: int, threads: int, nodes: int) -> tuple[Runner, float]:
    """Steps that rebuild keys of a prefix, rotated as those of the new token are, and the bytes that they need."""
    rng, dtype = np.random.default_rng(6), DTYPES[variant.type]
    chunks = case.total // CHUNK - LOCAL
    count, heads = chunks * CHUNK, case.kv_heads
    outliers = np.array([[np.sort(rng.permutation(chunks)[:OUTLIERS]) for _ in range(heads)]], np.int32)
    shapes = {
        "tokens": (1, count, RANK),
        "basis": (1, heads, SIZE, RANK),
        "values": (1, heads, count, SIZE),
        "landmarks": (1, heads, chunks, SIZE),
        "outlier_keys": (1, heads, OUTLIERS, CHUNK, SIZE),
    }
    prefix = {name: 0.1 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    prefix = {name: array.astype(dtype) for name, array in prefix.items()}
    turns = np.arange(case.total)[:, None] / 1e4 ** np.linspace(0, 1, SIZE // 2)
    tables = {name: function(turns).astype(np.float32)[None] for name, function in (("cos", np.cos), ("sin", np.sin))}
    constants = {f"far_{name}": table for name, table in tables.items()}
    constants |= {name: prefix[name] for name in ("tokens", "basis", "values", "landmarks")}
    constants |= {"outliers": outliers, "outlier_keys": prefix["outlier_keys"]}
    selection = {"selection": "lowrank", "select_block": CHUNK, "select_budget": budget}
    rotation = {"rotary": "half", "rotary_size": SIZE}
    variant = replace(variant, attributes=variant.attributes | selection | rotation)
    caches = {name: array for name, array in dense_caches(case, dtype).items() if name in ("k0", "v0")}
    angles = {name: table[:, -1:] for name, table in tables.items()}
    dense = OUTLIERS * CHUNK + case.total - count
    elements = heads * (chunks * SIZE + SIZE * RANK + budget * (RANK + SIZE) + dense * 2 * SIZE)
    needed = nodes * (elements * dtype.itemsize + heads * budget * SIZE * 4)
    return cached_node_runner(case, variant, _numbered(caches, nodes), nodes, threads, constants, angles), needed


def _numbered(caches: dict[str, np.ndarray], nodes: int) -> dict[str, np.ndarray]:
    return {f"{key[:-1]}{i}": array for i in range(nodes) for key, array in caches.items()}
