"""Speed of decoding steps that read a part of the cache, beside steps that read all of it.

Run: `python benchmarks/kernels/selections.py [--threads 2] [--rounds 9] [--heads 32/8] [--tokens 32768] [--budget 2048]
[--storages fp32 bf16 int8 int4]
[--selections pages topk clusters lowrank evict stride window]`

One new token over a full cache, in equal nodes that together overflow the caches of the processor. The variants take
turns in one process. Bytes are those that a step needs: with `pages` bounds of all blocks, keys and values of
those that are read; with `topk` all keys, and values of those that are read; with `clusters` (of synthetic keys that
lie in clusters of 5, 10 or 20) centroids of all parents, those of the clusters whose parents pass, keys and values of
those that are read; with `lowrank` (rank 160, chunks of 8, keys rotated) landmarks, coefficients and values of those
that are read, and the bases; with `evict` all that is kept, and its time is the mean of as many
steps as lie between two times that the cache is full; the window is as long as the budget.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnxruntime as ort
from cached_attention import (
    DTYPES,
    SIZE,
    STORAGES,
    Case,
    Variant,
    cached_node_runner,
    dense_caches,
    paged_caches,
)
from onnx import TensorProto
from prefix_nodes import CLUSTER_TOKENS, clustered, low_rank

from effc import kernels
from effc.ir.dialect.selections import StrideSelection

NODES = 4
SELECTIONS = ("pages", "topk", "clusters", "lowrank", "evict", "stride", "window")
OF_A_PREFIX = ("clusters", "lowrank")
SINKS, RECENT, BLOCK = 4, 32, 8
DROPPED = 128  # tokens that a full cache drops


def selected(variant: Variant, selection: str, budget: int) -> Variant:
    """The variant with a selection of blocks or tokens."""
    paged = "page" in variant.attributes
    sinks, recent, block = (
        (variant.attributes[name] for name in ("sinks", "recent", "page")) if paged else (SINKS, RECENT, BLOCK)
    )
    block = 1 if selection == "topk" else block
    attributes = {
        "selection": selection,
        "select_sinks": sinks,
        "select_recent": recent,
        "select_block": block,
        "select_reach": 0.6,
    }
    return replace(variant, attributes=variant.attributes | attributes | {"select_budget": budget})


def evicting(variant: Variant, budget: int) -> Variant:
    """The variant with a cache that drops tokens."""
    attributes = {"selection": "evict", "select_sinks": SINKS, "select_recent": RECENT, "select_pool": 15}
    places = {"ring": budget + DROPPED, "select_budget": budget, "select_block": DROPPED}
    return replace(variant, attributes=variant.attributes | attributes | places)


def striding(variant: Variant) -> Variant:
    """The variant with a fixed pattern; the budget does not matter."""
    selection = {"selection": "stride", **StrideSelection().attributes()}
    return replace(variant, attributes=variant.attributes | selection)


def windowed(variant: Variant, budget: int) -> Variant:
    """The variant with a window and sinks."""
    attributes = {"selection": "window", "select_sinks": SINKS, "select_positions": "keep"}
    return replace(variant, attributes=variant.attributes | attributes | {"ring": budget, "window": budget})


def variants_of(name: str, selections: list[str], budget: int) -> dict[str, Variant]:
    """Name -> a storage with everything read, and with each selection that it can have."""
    plain = STORAGES[name]
    found = {name: plain}
    for selection in selections:
        if selection in ("pages", "topk"):
            found[f"{name}, {selection}"] = selected(plain, selection, budget)
        elif "page" not in plain.attributes:
            dense = {"evict": evicting(plain, budget), "stride": striding(plain), "window": windowed(plain, budget)}
            found[f"{name}, {selection}"] = dense[selection]
    return found


def first_node(caches: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The caches of one node out of those of several."""
    return {name: array for name, array in caches.items() if name[1:] == "0"}


def caches_of(case: Case, variant: Variant, budget: int) -> dict[str, np.ndarray]:
    """Random caches of one node, with what the selection keeps beside keys and values."""
    own = {"evict": evict_caches, "window": window_caches}.get(str(variant.attributes.get("selection")))
    if own is not None:
        return own(case, variant, budget)
    if "page" in variant.attributes:
        caches = first_node(paged_caches(case, variant))
        distinct = np.random.default_rng(2).permuted(np.arange(caches["p0"].shape[2]) % 2 == 0)
        caches["p0"][:, :, distinct, 64:] ^= 1  # pages that are not all alike
        return caches
    caches = first_node(dense_caches(case, DTYPES[variant.type]))
    if variant.attributes.get("selection") == "pages":
        keys = caches["k0"][:, :, SINKS : SINKS + (case.total - SINKS) // BLOCK * BLOCK].astype(np.float32)
        parts = keys.reshape(1, case.kv_heads, -1, BLOCK, SIZE)
        half = TensorProto.BFLOAT16 if variant.type == TensorProto.FLOAT else variant.type
        bounds = np.concatenate([parts.min(axis=3), parts.max(axis=3)], axis=3).astype(DTYPES[half])
        room = case.total // BLOCK - bounds.shape[2]
        caches["b0"] = np.pad(bounds, ((0, 0), (0, 0), (0, room), (0, 0)))
    return caches


def window_caches(case: Case, variant: Variant, budget: int) -> dict[str, np.ndarray]:
    """Random caches of one node: a full ring, and sinks."""
    ring, sinks = (
        first_node(dense_caches(replace(case, total=tokens), DTYPES[variant.type])) for tokens in (budget, SINKS)
    )
    return ring | {"c0": sinks["k0"], "d0": sinks["v0"]}


def evict_caches(case: Case, variant: Variant, budget: int) -> dict[str, np.ndarray]:
    """Random caches of one node that hold `budget` of the tokens so far."""
    rng = np.random.default_rng(3)
    caches = first_node(dense_caches(replace(case, total=budget + DROPPED), DTYPES[variant.type]))
    last = np.arange(case.total - 1 - RECENT, case.total - 1)
    kept = [np.sort(rng.choice(last[0], budget - RECENT, replace=False)) for _ in range(case.kv_heads)]
    numbers = np.array([np.concatenate([one, last]) + 1 for one in kept], np.int32)
    caches["t0"] = np.pad(numbers, ((0, 0), (0, DROPPED)))[None]
    width = case.heads // case.kv_heads * SIZE
    caches["q0"] = rng.standard_normal((1, case.kv_heads, RECENT, width), dtype=np.float32)
    return caches


def mean_of(run: Callable[[], float], count: int) -> Callable[[], float]:
    """Runs so many times, for the mean."""
    return lambda: statistics.fmean(run() for _ in range(count))


def bytes_needed(case: Case, variant: Variant, caches: dict[str, np.ndarray], budget: int) -> float:
    """Bytes a step of one node needs."""
    selection = variant.attributes.get("selection", "all")
    if selection in ("evict", "window"):
        return float(sum(caches[name].nbytes for name in ("k0", "v0")))
    if selection == "stride":
        read = StrideSelection().read_at(case.total - 1) / case.total
        return read * sum(caches[name].nbytes for name in ("k0", "v0"))
    if "page" not in variant.attributes:
        read = (budget + SINKS + RECENT + BLOCK) / case.total
        share = {"all": (1.0, 1.0), "pages": (read, read), "topk": (1.0, read)}[str(selection)]
        bounds = caches["b0"].nbytes if selection == "pages" else 0
        return bounds + share[0] * caches["k0"].nbytes + share[1] * caches["v0"].nbytes
    exact = sum(caches[name].nbytes for name in ("k0", "v0"))
    pages = variant.pages(case.total)
    read = budget / int(str(variant.attributes["page"])) / pages
    share = {"all": 1.0, "pages": read, "topk": (1 + read) / 2}[str(selection)]
    parameters = pages * case.kv_heads * (4 * SIZE + 4) if selection == "pages" else 0
    return exact + parameters + share * caches["p0"].nbytes


def measure(case: Case, storages: list[str], selections: list[str], budget: int, threads: int, rounds: int) -> None:
    """Print one table."""
    variants: dict[str, Variant] = {}
    for name in storages:
        variants |= variants_of(name, [one for one in selections if one not in OF_A_PREFIX], budget)
    runners: dict[str, Callable[[], float]] = {}
    needed = {}
    for name, variant in variants.items():
        evicts = variant.attributes.get("selection") == "evict"
        caches = caches_of(case, variant, budget)
        needed[name] = NODES * bytes_needed(case, variant, caches, budget)
        every = {f"{key[:-1]}{i}": array for i in range(NODES) for key, array in caches.items()}
        run = cached_node_runner(case, variant, every, NODES, threads)
        runners[name] = mean_of(run, DROPPED) if evicts else run
    for name in storages:
        if "page" in STORAGES[name].attributes:
            continue
        for tokens in CLUSTER_TOKENS if "clusters" in selections else ():
            one = f"{name}, of {tokens}"
            runners[one], needed[one] = clustered(case, STORAGES[name], budget, threads, NODES, tokens)
        if "lowrank" in selections:
            one = f"{name}, lowrank"
            runners[one], needed[one] = low_rank(case, STORAGES[name], budget, threads, NODES)
    times: dict[str, list[float]] = {name: [] for name in runners}
    reads = []
    for _ in range(rounds):
        reads.append(kernels.read_bandwidth(1 << 28, threads, rounds=2))
        for name, run in runners.items():
            times[name].append(run())
    heads = f"{case.heads}/{case.kv_heads} heads of {SIZE}"
    print(f"{heads}, {case.total} tokens, budget {budget}, {max(reads) / 1e9:.1f} GB/s")
    dense = statistics.median(times[storages[0]])
    for name in runners:
        median, best = statistics.median(times[name]), min(times[name])
        same = statistics.median(times[name.partition(",")[0]])
        print(
            f"  {name:14} {median * 1e6 / NODES:9.1f} us (best {best * 1e6 / NODES:9.1f})  {dense / median:6.2f} x "
            f"{storages[0]}, {same / median:6.2f} x all of the same storage, {needed[name] / NODES / 1e6:7.2f} MB, "
            f"{needed[name] / median / max(reads):4.0%} of the memory limit",
            flush=True,
        )


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--heads", nargs="+", default=["32/8", "8/2"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768])
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--storages", nargs="+", default=["fp32", "bf16", "int8", "int4"], choices=list(STORAGES))
    parser.add_argument("--selections", nargs="+", default=[*SELECTIONS], choices=SELECTIONS)
    args = parser.parse_args()
    print(f"{kernels.isa()}, {args.threads} threads, onnxruntime {ort.__version__}")
    for text in args.heads:
        heads, kv_heads = map(int, text.split("/"))
        for total in args.tokens:
            case = Case(heads, kv_heads, 1, total)
            measure(case, args.storages, args.selections, args.budget, args.threads, args.rounds)


if __name__ == "__main__":
    main()
