"""Time to read a long prompt whole, beside that of filtering it and reading what stays, and what operations predict.

Run: `python benchmarks/prompt_filter.py [ENGINE] [--tokens 16384] [--threads 1] [--rounds 1]`

ENGINE was made with the pass `prompt-filter`. Without one, a Llama of 150 million random parameters is made, every
layer with full attention. Seconds are those the processor spent, so that other programs count less; operations of
attention are those of the pairs a query sees.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

import effc
from effc.ir.analysis.cached_attention import attention_form, is_cached_attention
from effc.ir.analysis.cost import node_cost
from effc.runtime.batch import prompt_chunk
from effc.runtime.limits import text_config
from effc.runtime.session import Engine
from effc.verify.steps import token_feed


def random_engine(folder: Path, tokens: int) -> Path:
    """An engine of a Llama with random weights that filters prompts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=2 * tokens, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "model")
    effc.optimize(folder / "model", folder / "engine", passes="lossless-weights,prompt-filter", check=False)
    return folder / "engine"


def operations(graph: ir.Graph, tokens: int) -> int:
    """Floating-point operations of a run on an empty cache that asks for the logits of the last token."""
    sizes = {"batch": 1, "seq": tokens, "past": 0, "total": tokens, "logits": 1}
    total = 0
    for node in graph:
        if not is_cached_attention(node):
            total += node_cost(node, sizes).flops
            continue
        form = attention_form(node)
        window = min(form.window or tokens, tokens)
        pairs = window * (window + 1) // 2 + (tokens - window) * window
        total += pairs * form.heads * (2 * form.head_size + 5 + 2 * form.value_size)
    return total


def predicted(folder: Path, tokens: int, keep: int) -> dict[str, int]:
    """Operations of each stage."""
    model, scorer = (ir.load(folder / name).graph for name in ("model.onnx", "prompt_filter.onnx"))
    return {
        "whole": operations(model, tokens),
        "filter": operations(scorer, tokens),
        "rest": operations(model, keep),
    }


def prefill(engine: Engine, ids: list[int]) -> None:
    """Read a prompt up to its first logits, as generation does."""
    state = engine.new_state(1, max_length=len(ids))
    chunk = prompt_chunk(engine, 1, len(ids))
    for start in range(0, len(ids), chunk):
        end = min(start + chunk, len(ids))
        feed = token_feed(engine, np.array([ids[start:end]]), start)
        state.run(feed, ["logits"] if end == len(ids) else [], num_logits=1)


def seconds(action: Callable[[], object]) -> tuple[float, float]:
    """Processor and wall-clock seconds of an action."""
    begun, wall = time.process_time(), time.perf_counter()
    action()
    return time.process_time() - begun, time.perf_counter() - wall


def measure(engine: Engine, tokens: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Medians of each stage, which take turns."""
    vocabulary = int(text_config(engine.manifest.config)["vocab_size"])
    ids = np.random.default_rng(0).integers(0, vocabulary, tokens).tolist()
    kept = engine.shortened(ids[: len(ids) // 8])
    prefill(engine, kept)
    actions: dict[str, Callable[[], object]] = {
        "filter": lambda: engine.shortened(ids),
        "rest": lambda: prefill(engine, kept),
        "whole": lambda: prefill(engine, ids),
    }
    found = {name: [seconds(action) for _ in range(rounds)] for name, action in actions.items()}
    return {name: tuple(map(statistics.median, zip(*runs))) for name, runs in found.items()}  # type: ignore[misc]


def report(folder: Path, tokens: int, threads: int, rounds: int) -> None:
    """Print one table."""
    with effc.load(folder, threads=threads, check=False) as engine:
        entry = engine.manifest.prompt_filter
        if entry is None:
            raise SystemExit(f"{folder}: has no filter. Make the engine with the pass prompt-filter.")
        print(f"layer {entry.layer} of {entry.layers}, {entry.keep} of {tokens} tokens stay, {threads} threads")
        work, found = predicted(folder, tokens, entry.keep), measure(engine, tokens, rounds)
    for name in ("whole", "filter", "rest"):
        cpu, wall = found[name]
        rate = work[name] / cpu / 1e9
        print(f"{name:>7} {work[name] / 1e12:8.3f} Tflop {cpu:8.2f} s cpu {wall:8.2f} s wall {rate:7.1f} Gflop/s")
    ratios = [
        (side["filter"] + side["rest"]) / side["whole"]
        for side in (work, {name: one[0] for name, one in found.items()})
    ]
    print(f"filter and rest over whole: predicted {ratios[0]:.3f}, measured {ratios[1]:.3f}")


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = arguments.engine or random_engine(Path(folder), arguments.tokens)
        report(engine, arguments.tokens, arguments.threads, arguments.rounds)


if __name__ == "__main__":
    main()
