"""The budget of approximate passes: `max-rel=0.05,top1=0.98,kl=0.01,perplexity=1.02`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from effc.errors import UsageError


@dataclass(frozen=True)
class Budget:
    """Limits of an approximation; None sets no limit.

    Attributes:
        max_abs: Largest absolute difference of an output.
        max_rel: The same relative to the root mean square of the output.
        top1: Least share of positions whose most likely token (or class) stays.
        kl: Largest mean KL divergence of the distributions, nats.
        perplexity: Largest ratio of perplexities, engine over source; checked on engines, not after passes.
    """

    max_abs: float | None = None
    max_rel: float | None = None
    top1: float | None = None
    kl: float | None = None
    perplexity: float | None = None

    def broken(self, figures: Mapping[str, Any]) -> list[str]:
        """Limits the figures do not keep, one sentence each. A figure that is null (infinite) breaks its limit.

        Args:
            figures: JSON figures `max_abs`, `max_rel`, `top1`, `kl`, `perplexity` (a ratio); those that are absent are
                not checked.
        """
        sentences = []
        for item in fields(self):
            limit = getattr(self, item.name)
            if limit is None or item.name not in figures:
                continue
            figure, name = figures[item.name], item.name.replace("_", "-")
            if item.name == "top1":
                if figure is not None and figure < limit:
                    sentences.append(f"{name} is {figure:.4g}, the budget asks for at least {limit:.4g}")
            elif figure is None or figure > limit:
                shown = "infinite" if figure is None else f"{figure:.4g}"
                sentences.append(f"{name} is {shown}, the budget allows {limit:.4g}")
        return sentences

    def to_json(self) -> dict[str, float]:
        """The limits that are set."""
        return {item.name: getattr(self, item.name) for item in fields(self) if getattr(self, item.name) is not None}


def parse_budget(text: str) -> Budget:
    """Parse `name=number` pairs separated by commas.

    Raises:
        UsageError: Unknown name, or a number out of range; lists the names.
    """
    names = {item.name.replace("_", "-"): item.name for item in fields(Budget)}
    limits: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, number = (word.strip() for word in part.partition("="))
        if name not in names or not equals:
            raise UsageError(f"budget {part!r}: expected NAME=NUMBER with a name of: {', '.join(names)}.")
        limits[names[name]] = _limit(name, number)
    return Budget(**limits)


def _limit(name: str, number: str) -> float:
    low, high = (0.0, 1.0) if name == "top1" else (0.0, float("inf"))
    try:
        limit = float(number)
    except ValueError:
        limit = float("nan")
    if not low <= limit <= high:
        raise UsageError(f"budget {name}={number}: expected a number from {low:g} to {high:g}.")
    return limit
