"""Perplexity and pass keys of engines that read or keep a part of their cache, beside one that reads all of it.

Run: `python benchmarks/selection_quality.py MODEL [--cache-pass "kv-cache{scheme=dense}"] [--lengths 2048,4096,8192]
[--samples 2] [--tokens 4096] [--head 256] [--folder DIR] ROW ...`

A row is the text of passes such as `sparse-attention{share=0.25}`. An option `budget=1/4` is a quarter of the prompt's
tokens, so that there is an engine for each length. Behind `@` stand options of `effc prefix`, for selections that it
makes: `sparse-attention{scheme=clusters}@keep=0.25`; the prefix is the prompt without its last 16 tokens.

Prompts are those of `effc verify --passkey`, their last 16 tokens and the answer read one by one; of rows that drop
tokens or read prompts in a way of their own, the answer only. Perplexity is of Python's help topics, read token by
token after the first `--head`, as decoding does; where there is a prefix, these are it. Beside each figure stands the
share of the cached tokens that those steps read: the mean over steps, key heads and the layers that without the passes
read everything. Engines are made in DIR (kept, and used again).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from selection_reading import Answers, ask, log_probabilities, prompts
from selection_rows import ALL, Engines, Row

from effc.verify.text import text_ids


def share_read(reads: Mapping[str, Sequence[float]], dense: Mapping[str, Sequence[float]]) -> str:
    """Mean share that nodes read which read everything in the dense engine, in percent; a dash without steps."""
    nodes = [node for node, shares in dense.items() if min(shares) == 1 and node in reads]
    return f"{100 * np.mean([np.mean(reads[node]) for node in nodes]):.1f} %" if nodes else "-"


def pass_keys(engines: Engines, rows: Sequence[Row], length: int, samples: int) -> dict[Row, str]:
    """Right answers of each row, with mean ln p and the share that was read."""
    found = {row: Answers() for row in rows}
    opened = {row: engines.of(row, length) for row in rows}
    for count, prompt in enumerate(prompts(opened[rows[0]], length, samples), 1):
        ask(opened, [prompt], found)
        print(length, count, [sum(found[row].right) for row in rows], file=sys.stderr, flush=True)
    cells = {}
    for row, one in found.items():
        read = share_read(one.reads, found[rows[0]].reads)
        cells[row] = f"{sum(one.right)} of {len(one.right)} ({np.mean(one.log_probability):.3f}), {read}"
    return cells


def perplexities(engines: Engines, rows: Sequence[Row], tokens: int, head: int) -> dict[Row, str]:
    """Of each row the share that was read, perplexity over that of the first, the same likeliest token, and KL."""
    ids = text_ids(None, tokens, engines.of(rows[0], tokens).tokenizer.encode, {})
    targets = np.array(ids[head + 1 :])
    dense, dense_reads, cells = np.zeros((0, 0)), {}, {}
    for row in rows:
        engine = engines.of(row, tokens)
        if engine.manifest.prompt_filter is not None:
            cells[row] = "- | - | - | -"  # it reads no text token by token
            continue
        reads: dict[str, list[float]] = {}
        found = log_probabilities(row, engine, ids, head, reads)
        if not len(dense):
            dense, dense_reads = found, reads
        places = np.arange(len(targets))
        ratio = float(np.exp((dense[places, targets] - found[places, targets]).mean()))
        same = float((found.argmax(1) == dense.argmax(1)).mean())
        divergence = float((np.exp(dense) * (dense - found)).sum(1).mean())
        cells[row] = f"{share_read(reads, dense_reads)} | {ratio:.4f} | {100 * same:.1f} % | {divergence:.4f}"
        print(row.text, cells[row], file=sys.stderr, flush=True)
    return cells


def main() -> None:
    """Make the engines, measure them and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", nargs="+", metavar="ROW")
    parser.add_argument("--cache-pass", default="kv-cache{scheme=dense}")
    parser.add_argument("--lengths", default="2048,4096,8192", help="of prompts; empty: no pass keys")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="of text; 0: no perplexity")
    parser.add_argument("--head", type=int, default=256, help="of them that are read at once")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    engines = Engines(args.model, args.cache_pass, args.folder or Path(tempfile.mkdtemp()))
    rows = [Row(text) for text in (ALL, *args.rows)]
    columns: dict[str, dict[Row, str]] = {}
    if args.tokens:
        columns["read | perplexity / all | same top-1 | KL, nats"] = perplexities(engines, rows, args.tokens, args.head)
    for length in map(int, filter(None, args.lengths.split(","))):
        columns[f"pass keys at {length} (ln p), read"] = pass_keys(engines, rows, length, args.samples)
    print(f"| row | {' | '.join(columns)} |")
    for row in rows:
        print(f"| {row.text} | {' | '.join(column[row] for column in columns.values())} |")


if __name__ == "__main__":
    main()
