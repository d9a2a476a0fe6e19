"""Speed of attention over quantized pages beside the memory limit, for each instruction set.

Run: `python benchmarks/kernels/kv_page.py [--head-size 128] [--page 128] [--queries 1 4 8] [--pages 8192]`

One core. Times are microseconds a page of one key head, scores and values together, over pages that overflow the
caches: CPU time, best of the rounds. They stand beside the time in which memory delivers the page, and the same tokens
as float32, at the bandwidth read in the same run.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import numpy as np

from effc import kernels
from effc.kernels import kv_page

DISTINCT = 512  # pages that are encoded; the others are copies
BITS = (2, 4, 8, 16)


def seconds(function: Callable[[], object], rounds: int) -> float:
    """CPU time of a call, the best of the rounds: other work on the machine disturbs it least."""
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return min(times)


def measure(args: argparse.Namespace, bits: int, bandwidth: float) -> str:
    """One line of the table for the active instruction set."""
    one_group = (args.key_scheme == "balanced", args.value_scheme == "separable")
    spec = kv_page.PageSpec(
        args.head_size,
        args.head_size,
        args.page,
        (bits, bits),
        (bits, bits),
        key_scheme=args.key_scheme,
        value_scheme=args.value_scheme,
        key_group=0 if one_group[0] else args.group,
        value_group=0 if one_group[1] else args.group,
    )
    rng = np.random.default_rng(0)
    shape = (DISTINCT, args.page, args.head_size)
    keys, values = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    query_max = np.ones(args.head_size, np.float32)
    made = kv_page.encode(spec, keys, values, query_max=query_max)
    elements = 2 * keys.size
    encode = elements / seconds(lambda: kv_page.encode(spec, keys, values, query_max=query_max), args.rounds)
    decode = elements / seconds(lambda: kv_page.decode(spec, made), args.rounds)
    pages = np.tile(made, (args.pages // DISTINCT, 1))
    limit = made.shape[1] / bandwidth * 1e6
    fp32 = 8 * args.page * args.head_size / bandwidth * 1e6
    line = f"  {bits:2} bit  encode {encode / 1e6:5.0f} M/s  decode {decode / 1e6:5.0f} M/s  page {limit:5.2f} us"
    for queries in args.queries:
        q = rng.standard_normal((queries, args.head_size), dtype=np.float32)
        call = functools.partial(kv_page.linear_attention, spec, pages, q)
        time_ = seconds(call, args.rounds) / len(pages) * 1e6
        line += f" | {queries} q {time_:5.2f} us {limit / time_:4.0%} {fp32 / time_:4.1f}x"
    return line


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--page", type=int, default=128)
    parser.add_argument("--group", type=int, default=0)
    parser.add_argument("--key-scheme", choices=["channel", "balanced"], default="channel")
    parser.add_argument("--value-scheme", choices=["token", "separable"], default="token")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--pages", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--isas", nargs="+", default=kernels.available_isas())
    args = parser.parse_args()
    for isa in args.isas:
        kernels.select_isa(isa)
        bandwidth = kernels.read_bandwidth(1 << 28, 1)
        print(
            f"{isa}: pages of {args.page} x {args.head_size}, read {bandwidth / 1e9:.1f} GB/s; queries: time, share of "
            "the memory limit, times faster than reading fp32"
        )
        for bits in BITS:
            print(measure(args, bits, bandwidth), flush=True)


if __name__ == "__main__":
    main()
