"""Memory and perplexity of a model that writes far beyond the length it was trained on.

Run: `python benchmarks/endless.py MODEL [--tokens 100000] [--recent 1024] [--positions cap] [--temperature 1]
[--threads 1] [--every 10000]`

The engine reads a window and the first tokens (LM-Infinite with `cap`, StreamingLLM with `compact`). Tokens are sampled
from the model with a fixed seed; for every part of the text: the perplexity the model gives its
own tokens, the resident memory of the process, the bytes of the cache, tokens in a second, and the last words.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

import effc
from effc.runtime.session import Engine
from effc.verify.metrics import log_sum_exp
from effc.verify.steps import token_feed

START = "Once upon a time, in a small village by the sea,"
WINDOW = "sparse-attention{{scheme=window,recent={recent},sinks=10,positions={positions}}}"


def resident_bytes() -> int:
    """Memory of the process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def write(engine: Engine, tokens: int, every: int, temperature: float) -> None:
    """Generate so many tokens and print a line for every part of them."""
    rng = np.random.default_rng(0)
    ids = engine.tokenizer.encode(START)
    state, begun = engine.new_state(1), time.perf_counter()
    losses: list[float] = []
    new = np.array([ids], np.int64)
    while len(losses) < tokens:
        logits = state.run(token_feed(engine, new, state.length), ["logits"], num_logits=1)["logits"][0, -1]
        shares = np.exp((logits - logits.max()) / temperature)
        ids.append(int(rng.choice(len(shares), p=shares / shares.sum())))
        losses.append(float(log_sum_exp(logits) - logits[ids[-1]]))
        new = np.array([ids[-1:]], np.int64)
        if len(losses) % every == 0:
            perplexity = float(np.exp(np.mean(losses[-every:])))
            words = engine.tokenizer.decode(ids[-16:])
            print(
                f"{len(losses):8} tokens: perplexity of the last {every} {perplexity:.2f}, "
                f"{resident_bytes() / 1e6:.0f} MB resident, cache {sum(state.nbytes().values()) / 1e6:.1f} MB, "
                f"{len(losses) / (time.perf_counter() - begun):.1f} tokens/s, {words!r}",
                flush=True,
            )


def main() -> None:
    """Build the engine and let it write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--recent", type=int, default=1024)
    parser.add_argument("--positions", default="cap", choices=["cap", "compact"])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=10_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        window = WINDOW.format(recent=args.recent, positions=args.positions)
        effc.optimize(
            args.model,
            Path(folder) / "engine",
            passes=f"lossless-weights,kv-cache{{scheme=dense}},{window}",
            check=False,
        )
        with effc.load(Path(folder) / "engine", threads=args.threads) as engine:
            write(engine, args.tokens, args.every, args.temperature)


if __name__ == "__main__":
    main()
