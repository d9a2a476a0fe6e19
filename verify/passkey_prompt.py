"""Prompts that hide a pass key in filler and ask for it (after Mohtashami and Jaggi 2023, section 4.2)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from effc.errors import UsageError
from effc.verify.filler import sentences

HEAD = "There is important information hidden in the text below. Find it and remember it.\n\n"
NEEDLE = "The pass key of the {colour} door is {key}. Remember it: {key} opens the {colour} door."
QUESTION = "\n\nWhat is the pass key of the {colour} door? The pass key of the {colour} door is "
COLOURS = (
    "red", "green", "blue", "white", "black", "yellow", "brown", "grey", "purple", "orange", "pink", "golden",
    "silver", "violet", "crimson", "turquoise",
)  # fmt: skip
DEPTHS = (0, 25, 50, 75, 100)

Encode = Callable[[str], Sequence[int]]
"""Text -> ids without special tokens."""


@dataclass(frozen=True)
class PasskeyTask:
    """What to ask.

    Attributes:
        lengths: Most tokens of a prompt with its answer.
        depths: Where the key is stated, in percent of the filler's sentences.
        samples: Prompts per length and depth, each with other filler and another key.
        keys: Doors whose keys are stated: the one that is asked for, the others anywhere. More make it harder.
        seed: Of filler, keys and places.

    Raises:
        UsageError: A figure is out of range.
    """

    lengths: Sequence[int]
    depths: Sequence[int] = DEPTHS
    samples: int = 4
    keys: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or not self.depths:
            raise UsageError("the pass key task needs at least one length and one depth.")
        for depth in self.depths:
            if not 0 <= depth <= 100:
                raise UsageError(f"pass key depth {depth}: give percent, from 0 to 100.")
        if self.samples < 1:
            raise UsageError(f"pass key samples is {self.samples}; give at least 1.")
        if not 1 <= self.keys <= len(COLOURS):
            raise UsageError(f"pass key keys is {self.keys}; give 1 to {len(COLOURS)}.")
        if self.seed < 0:
            raise UsageError(f"pass key seed is {self.seed}; give at least 0.")


@dataclass(frozen=True)
class Prompt:
    """Token ids up to the answer, and those of the right answer."""

    ids: list[int]
    answer: list[int]


def make_prompt(encode: Encode, bos: int | None, task: PasskeyTask, length: int, depth: int, sample: int) -> Prompt:
    """A prompt of at most `length` tokens, answer included: with one more sentence of filler it would be longer.

    A sample has the same filler, keys and places of the other keys at every length and depth.

    Raises:
        UsageError: The question alone is longer than that.
    """
    draft = _Draft.of(task, depth, sample)
    begin = [] if bos is None else [bos]

    def tokens(count: int) -> int:
        return len(begin) + len(encode(draft.text(count) + draft.keys[0]))

    if tokens(0) > length:
        raise UsageError(f"a pass key prompt takes at least {tokens(0)} tokens here, {length} were asked for.")
    # A sentence of the filler has more than four tokens on average.
    text = draft.text(bisect_right(range(1 + length // 4), length, key=tokens) - 1)
    ids, others = encode(text + draft.keys[0]), encode(text + _other(draft.keys[0]))
    # The answer begins where another key is spelled otherwise: a tokenizer may join digits with what precedes.
    split = next(place for place, (one, two) in enumerate(zip(ids, others)) if one != two)
    return Prompt([*begin, *ids[:split]], list(ids[split:]))


def _other(key: str) -> str:
    """A key with another digit at each place."""
    return "".join(str((int(digit) + 5) % 10) for digit in key)


@dataclass(frozen=True)
class _Draft:
    """A prompt whose amount of filler is open.

    Attributes:
        seed: Of the filler.
        doors: Colours, the one asked for first.
        keys: Five digits each, no two alike.
        places: Where each key is stated, as parts of the filler.
    """

    seed: tuple[int, int]
    doors: Sequence[str]
    keys: Sequence[str]
    places: Sequence[float]

    @classmethod
    def of(cls, task: PasskeyTask, depth: int, sample: int) -> _Draft:
        draw = np.random.default_rng([task.seed, sample])
        doors = [COLOURS[place] for place in draw.permutation(len(COLOURS))[: task.keys]]
        keys = [str(number) for number in 10_000 + draw.permutation(90_000)[: task.keys]]
        return cls((task.seed, sample), doors, keys, [depth / 100, *draw.random(task.keys - 1)])

    def text(self, count: int) -> str:
        """Everything before the answer, with so many sentences of filler."""
        body = list(islice(sentences(self.seed), count))
        placed = [(round(part * count), index) for index, part in enumerate(self.places)]
        for place, index in sorted(placed, reverse=True):
            body.insert(place, NEEDLE.format(colour=self.doors[index], key=self.keys[index]))
        return HEAD + " ".join(body) + QUESTION.format(colour=self.doors[0])
