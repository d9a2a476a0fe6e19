"""Sentences of no consequence, varied and repeatable, to hide something in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

PEOPLE = (
    "The baker", "An old sailor", "My neighbour", "The young teacher", "A tall gardener", "The clockmaker",
    "Her cousin", "The postman", "A retired judge", "The violinist", "Our landlady", "The ferryman",
    "A quiet student", "The beekeeper", "His grandmother", "The night guard", "A travelling painter",
    "The librarian", "One of the fishermen", "The tailor", "A woman in a blue coat", "The stationmaster",
)  # fmt: skip
DEEDS = (
    "carried a basket of apples", "mended the broken fence", "watched the rain", "told a long story about the war",
    "polished the brass lamp", "waited for the last train", "counted the geese", "wrote a letter to a friend",
    "forgot an umbrella", "repaired the wooden bridge", "listened to the radio", "sold three loaves of rye bread",
    "painted the garden gate", "looked for a lost glove", "planted a row of beans", "cleaned the tall windows",
    "read the morning paper", "sharpened the kitchen knives", "fed the cats", "hummed an old tune",
    "argued about the weather", "lit the stove", "sorted a box of buttons", "cut the long grass",
)  # fmt: skip
PLACES = (
    "behind the mill", "at the edge of the village", "near the harbour", "in the narrow kitchen", "under the chestnut",
    "on the church steps", "beside the canal", "in front of the town hall", "across the square", "by the stone well",
    "at the back of the shop", "along the coast road", "above the bakery", "in the orchard", "outside the theatre",
    "close to the old quarry", "at the foot of the hill", "on the south platform",
)  # fmt: skip
TIMES = (
    "before breakfast", "on a cold Monday", "during the holidays", "late in the evening", "after the storm",
    "at noon", "in the first week of spring", "while the bells rang", "shortly before dawn", "for most of the day",
    "when the market closed", "in the middle of winter", "on the way home", "until the lamps went out",
)  # fmt: skip
REMARKS = (
    "Nobody thought it strange.", "The wind had turned by then.", "It took longer than expected.",
    "That was the custom there.", "A dog barked twice.", "The tea was cold already.", "Few people noticed.",
    "Everything smelled of wet leaves.", "The road was empty.", "There was plenty of time.",
)  # fmt: skip


def sentences(seed: int | Sequence[int]) -> Iterator[str]:
    """Endless sentences without any digit; the same seed gives the same ones."""
    draw = np.random.default_rng(seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(draw.integers(len(words)))]

    while True:
        form = int(draw.integers(5))
        if form == 0:
            yield pick(REMARKS)
        elif form == 1:
            start = pick(TIMES)
            who = pick(PEOPLE)
            yield f"{start[0].upper()}{start[1:]}, {who[0].lower()}{who[1:]} {pick(DEEDS)} {pick(PLACES)}."
        elif form == 2:
            yield f"{pick(PEOPLE)} {pick(DEEDS)} {pick(PLACES)} and {pick(DEEDS)}."
        else:
            yield f"{pick(PEOPLE)} {pick(DEEDS)} {pick(PLACES)} {pick(TIMES)}."
