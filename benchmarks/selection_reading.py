"""Reads prompts and texts as generation does, counts right answers and which cached tokens the steps read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from selection_rows import Row, cache_form, reads_prefix

from effc.kernels.read_log import logged_reads
from effc.runtime.batch import TokenRows, prompt_chunk
from effc.runtime.session import Engine
from effc.verify.metrics import log_sum_exp
from effc.verify.passkey import SINGLE
from effc.verify.passkey_prompt import DEPTHS, PasskeyTask, Prompt, make_prompt

PREFILL = 256
"""Tokens that a prompt without a way of its own is read in at once."""


@dataclass(frozen=True)
class Start:
    """A cache to begin with.

    Attributes:
        cache: Cache input -> tensor.
        length: Tokens in it.
        inputs: What a prefix brings beside it.
    """

    cache: Mapping[str, np.ndarray]
    length: int
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Answers:
    """What one row answers to the prompts of one length.

    Attributes:
        right: Whether greedy decoding gives the right answer.
        log_probability: Mean ln p of the answer's tokens.
        reads: Node -> the share of the cached tokens that each of its key heads read in each step of one token.
    """

    right: list[bool] = field(default_factory=list)
    log_probability: list[float] = field(default_factory=list)
    reads: dict[str, list[float]] = field(default_factory=dict)


@contextmanager
def counted(reads: dict[str, list[float]], part: float = 1) -> Iterator[None]:
    """Add what steps of one token read meanwhile, of a cache that has a part of the tokens."""
    with logged_reads() as log:
        yield
    for one in log:
        reads.setdefault(one.node, []).append(part * one.read / one.tokens)


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


def read_part(engine: Engine, ids: Sequence[int], chunk: int) -> Start:
    """The cache that tokens leave."""
    rows = TokenRows(engine, [0], len(ids))
    _read(rows, ids, [*range(0, len(ids), chunk)])
    return Start(rows.state.snapshot(), len(ids))


def prefix_of(engine: Engine, ids: Sequence[int], row: Row) -> Start:
    """A prefix as `effc prefix` makes it."""
    with tempfile.TemporaryDirectory() as folder:
        engine.write_prefix(ids, f"{folder}/prefix", **row.prefix_options)
        prefix = engine.open_prefix(f"{folder}/prefix")
        copies = {name: np.array(array) for name, array in prefix.tensors.items()}
        return Start(copies, prefix.length, {name: np.array(array) for name, array in prefix.inputs.items()})


def ask(rows: Mapping[Row, Engine], asked: Sequence[Prompt], found: Mapping[Row, Answers]) -> None:
    """Ask every row; those whose caches are alike share one reading of each prompt.

    Of a prompt, the last `SINGLE` tokens are read one by one. Rows that drop tokens, or read prompts in a way of their
    own, read all of it as generation does, and one by one the answer only.
    """
    for prompt in asked:
        start = len(prompt.ids) - SINGLE
        shared: dict[tuple[object, ...], Start] = {}
        for row, engine in rows.items():
            if row.changes_prompts:
                ids = engine.shortened(prompt.ids)
                _answer(engine, None, ids, prompt.answer, found[row], len(ids) / len(prompt.ids))
                continue
            if reads_prefix(engine):
                cache = prefix_of(engine, prompt.ids[:start], row)
            else:
                form = cache_form(engine)
                cache = shared[form] = shared.get(form) or read_part(engine, prompt.ids[:start], PREFILL)
            _answer(engine, cache, prompt.ids, prompt.answer, found[row])


def _answer(
    engine: Engine, start: Start | None, ids: Sequence[int], answer: Sequence[int], found: Answers, part: float = 1
) -> None:
    rows = TokenRows(engine, [0], len(ids) + len(answer) - 1)
    chunk = prompt_chunk(engine, 1, len(ids)) if start is None else 1
    if start is not None:
        rows.state.restore(start.cache, start.length, start.inputs)
    with counted(found.reads, part):
        logits = _read(rows, ids, range(rows.state.length, len(ids), chunk))
        scores = []
        for at, token in enumerate(answer):
            scores.append((int(logits.argmax()) == token, float(logits[token] - log_sum_exp(logits))))
            if at + 1 < len(answer):
                logits = rows.read(np.array([[token]], np.int64))[0]
    right, log_probabilities = zip(*scores)
    found.right.append(all(right))
    found.log_probability.append(float(np.mean(log_probabilities)))


def log_probabilities(
    row: Row, engine: Engine, ids: Sequence[int], head: int, reads: dict[str, list[float]]
) -> np.ndarray:
    """Of all tokens of the vocabulary after each token from the `head`-th on, read one by one: [tokens, vocabulary]."""
    rows = TokenRows(engine, [0], len(ids))
    if reads_prefix(engine):
        prefix = prefix_of(engine, ids[:head], row)
        rows.state.restore(prefix.cache, prefix.length, prefix.inputs)
    else:
        _read(rows, ids[:head], range(0, head, prompt_chunk(engine, 1, head)))
    found = []
    with counted(reads):
        for token in ids[head:-1]:
            logits = rows.read(np.array([[token]], np.int64))[0]
            found.append((logits - log_sum_exp(logits)).astype(np.float32))
    return np.array(found)


def _read(rows: TokenRows, ids: Sequence[int], starts: Iterable[int]) -> np.ndarray:
    """Logits after the last of the tokens, read in parts that begin at `starts`."""
    begins = [*starts, len(ids)]
    logits = np.empty(0)
    for begin, end in pairwise(begins):
        last = end == len(ids)
        logits = rows.read(np.array([ids[begin:end]], np.int64), wanted=last)
    return logits[0]
