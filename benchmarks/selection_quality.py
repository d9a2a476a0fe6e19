"""Perplexity and pass keys of engines that read or keep a part of their cache, beside one that reads all of it.

Run: `python benchmarks/selection_quality.py MODEL [--cache-pass "kv-cache{scheme=dense}"] [--lengths 2048,4096,8192]
[--samples 2] [--tokens 4096] [--folder DIR] PASS ...`

Each PASS is the text of a pass such as `sparse-attention{share=0.25}`. Engines are made in DIR (kept, and used again).
Prompts are those of `effc verify --passkey`, their last 16 tokens and the answer read one by one; engines whose caches
have the same tensors share one reading of a prompt. Perplexity is of Python's help topics, read token by token after
the first 256, as decoding does.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import effc
from effc.runtime.session import Engine
from effc.verify.metrics import log_sum_exp
from effc.verify.passkey import SINGLE
from effc.verify.passkey_prompt import DEPTHS, PasskeyTask, Prompt, make_prompt
from effc.verify.steps import token_feed
from effc.verify.text import text_ids

PREFILL, HEAD = 256, 256


@dataclass
class Found:
    """What one engine answers."""

    name: str
    engine: Engine
    keys: dict[int, list[bool]] = field(default_factory=dict)
    losses: np.ndarray = field(default_factory=lambda: np.zeros(0))
    log_probabilities: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))


def cache_form(engine: Engine) -> tuple[object, ...]:
    """Engines with the same one can start from each other's caches, which prompts fill alike."""
    return tuple((port.input, port.dtype, tuple(port.shape)) for port in engine.cache_layout().ports)


def groups(found: Sequence[Found]) -> Iterator[list[Found]]:
    """Engines with caches of one form; an engine that drops tokens is alone."""
    by_form: dict[tuple[object, ...], list[Found]] = {}
    for one in found:
        drops = any(word in one.name for word in ("evict", "window", "stride"))
        by_form.setdefault((*cache_form(one.engine), one.name if drops else ""), []).append(one)
    yield from by_form.values()


def prompts(engine: Engine, length: int, samples: int) -> Iterator[Prompt]:
    """The prompts of `effc verify` of one length."""
    tokenizer = engine.tokenizer
    begin = tokenizer.encode("")[:1]
    task = PasskeyTask((length,), DEPTHS, samples, 1)
    for depth in DEPTHS:
        for sample in range(samples):
            yield make_prompt(
                lambda text: tokenizer.encode(text, add_special_tokens=False),
                begin[0] if begin else None,
                task,
                length,
                depth,
                sample,
            )


def answered(engine: Engine, snapshot: dict[str, np.ndarray], ids: np.ndarray, start: int, prompt: Prompt) -> bool:
    """Whether greedy decoding from a cache of `start` tokens gives the right answer."""
    state = engine.new_state(1, max_length=ids.shape[1])
    state.restore(snapshot, start)
    right = True
    for at in range(start, ids.shape[1]):
        wanted = ["logits"] if at + 1 >= len(prompt.ids) else []
        outputs = state.run(token_feed(engine, ids[:, at : at + 1], at), wanted, num_logits=1)
        if wanted:
            right &= int(outputs["logits"][0, -1].argmax()) == prompt.answer[at + 1 - len(prompt.ids)]
    return right


def ask(group: Sequence[Found], length: int, samples: int) -> None:
    """All prompts of one length, read once for the group."""
    first = group[0].engine
    for prompt in prompts(first, length, samples):
        ids = np.array([[*prompt.ids, *prompt.answer[:-1]]], np.int64)
        start = len(prompt.ids) - SINGLE
        state = first.new_state(1, max_length=ids.shape[1])
        for at in range(0, start, PREFILL):
            state.run(token_feed(first, ids[:, at : min(start, at + PREFILL)], at), [], num_logits=1)
        snapshot = state.snapshot()
        for one in group:
            one.keys.setdefault(length, []).append(answered(one.engine, snapshot, ids, start, prompt))


def predict(one: Found, ids: np.ndarray) -> None:
    """Losses of the tokens after the first `HEAD`, read one by one, and the logits as log-probabilities."""
    state = one.engine.new_state(1, max_length=ids.shape[1])
    state.run(token_feed(one.engine, ids[:, :HEAD], 0), [], num_logits=1)
    rows = []
    for at in range(HEAD, ids.shape[1]):
        logits = state.run(token_feed(one.engine, ids[:, at : at + 1], at), ["logits"], num_logits=1)["logits"][0, -1]
        rows.append((logits - log_sum_exp(logits)).astype(np.float32))
    one.log_probabilities = np.array(rows[:-1])
    one.losses = -one.log_probabilities[np.arange(len(rows) - 1), ids[0, HEAD + 1 :]]


def report(one: Found, dense: Found) -> None:
    """One line of a table."""
    ratio = float(np.exp(one.losses.mean() - dense.losses.mean())) if len(one.losses) else 1.0
    same, divergence = 1.0, 0.0
    if len(one.losses):
        same = float((one.log_probabilities.argmax(1) == dense.log_probabilities.argmax(1)).mean())
        shares = np.exp(dense.log_probabilities)
        divergence = float((shares * (dense.log_probabilities - one.log_probabilities)).sum(1).mean())
    keys = " | ".join(f"{sum(found)} of {len(found)}" for found in one.keys.values())
    print(f"| {one.name} | {ratio:.4f} | {100 * same:.1f} % | {divergence:.4f} | {keys} |", flush=True)


def main() -> None:
    """Make the engines, measure them and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("passes", nargs="+", metavar="PASS")
    parser.add_argument("--cache-pass", default="kv-cache{scheme=dense}")
    parser.add_argument("--lengths", default="2048,4096,8192")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="of text; 0: no perplexity")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    lengths = [int(length) for length in args.lengths.split(",") if length]
    found = []
    for name in ("all tokens", *args.passes):
        place = folder / "".join(letter if letter.isalnum() or letter in "=.," else "-" for letter in name)
        if not (place / "effc.json").exists():
            passes = ",".join(["lossless-weights", args.cache_pass, *([] if name == "all tokens" else [name])])
            effc.optimize(args.model, place, passes=passes, check=False)
        found.append(Found(name, effc.load(place)))
    for group in groups(found):
        for length in lengths:
            ask(group, length, args.samples)
    if args.tokens:
        ids = np.array([text_ids(None, args.tokens, found[0].engine.tokenizer.encode, {})], np.int64)
        for one in found:
            predict(one, ids)
    heads = " | ".join(f"pass keys at {length}" for length in lengths)
    print(f"| pass | perplexity / all | same top-1 | KL, nats | {heads} |")
    for one in found:
        report(one, found[0])
        if one is not found[0]:
            one.log_probabilities = np.zeros((0, 0))


if __name__ == "__main__":
    main()
