"""Compares the outputs of two runs of a model, output by output, where they have a meaning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from effc.verify.inputs import FeedShape, valid_positions
from effc.verify.metrics import Difference, compare, finite, kl_divergence, merge


@dataclass(frozen=True)
class OutputDifferences:
    """Differences by output.

    Attributes:
        by_output: Output name -> difference.
        missing: Outputs of the reference that are gone, or have another shape or dtype.
        not_compared: Cache outputs whose form changed.
        kl: Mean KL divergence of the logits in nats, weighted by `kl_rows`; None where it was not asked for.
        kl_rows: Positions behind `kl`.
    """

    by_output: Mapping[str, Difference]
    missing: tuple[str, ...] = ()
    not_compared: tuple[str, ...] = ()
    kl: float | None = None
    kl_rows: int = 0

    @classmethod
    def merge(cls, items: Iterable[OutputDifferences]) -> OutputDifferences:
        """The worst of each output over several runs."""
        found = list(items)
        names = dict.fromkeys(name for item in found for name in item.by_output)
        rows = sum(item.kl_rows for item in found)
        total = sum(item.kl * item.kl_rows for item in found if item.kl is not None and item.kl_rows)
        return cls(
            {name: merge(item.by_output[name] for item in found if name in item.by_output) for name in names},
            tuple(dict.fromkeys(name for item in found for name in item.missing)),
            tuple(dict.fromkeys(name for item in found for name in item.not_compared)),
            total / rows if rows else None,
            rows,
        )

    def overall(self) -> Difference:
        """The worst over all outputs."""
        return merge(self.by_output.values())

    def to_json(self) -> dict[str, Any]:
        """`bitwise`, `max_abs`, `max_rel`, `top1`, and `kl` where it was asked for."""
        figures = self.overall().to_json()
        if self.kl_rows:
            figures["kl"] = finite(self.kl)
        return figures


def compare_outputs(
    reference: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    shape: FeedShape,
    mask: np.ndarray,
    *,
    kl: bool = False,
) -> OutputDifferences:
    """Compare every output of the reference with its namesake; caches of codes by their bits only.

    Args:
        reference: Output name -> array.
        outputs: The same of the other run.
        shape: At which both ran.
        mask: Int64 [batch, past + seq]; at padded positions only `bitwise` is measured.
        kl: Measure the KL divergence of `logits`.
    """
    differences: dict[str, Difference] = {}
    missing: list[str] = []
    not_compared: list[str] = []
    for name, expected in reference.items():
        value = outputs.get(name)
        if value is None or value.shape != expected.shape or value.dtype != expected.dtype:
            (not_compared if name.startswith("present") else missing).append(name)
            continue
        valid = valid_positions(name, expected, shape, mask)
        if _is_coded_cache(name, expected):
            valid = np.zeros(expected.shape, bool)
        differences[name] = compare(expected, value, valid=valid, classes=name == "logits")
    divergence, rows = _logits_kl(reference, outputs, shape, mask) if kl and "logits" in differences else (None, 0)
    return OutputDifferences(differences, tuple(missing), tuple(not_compared), divergence, rows)


def _is_coded_cache(name: str, array: np.ndarray) -> bool:
    """Whether an output is a cache of codes: rounding elsewhere moves one by a step, which says nothing by itself."""
    return name.startswith("present") and array.dtype.kind in "iu"


def _logits_kl(
    reference: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], shape: FeedShape, mask: np.ndarray
) -> tuple[float | None, int]:
    expected, value = reference["logits"], outputs["logits"]
    valid = valid_positions("logits", expected, shape, mask)
    if valid is not None:
        expected, value = expected[valid], value[valid]
    vocab = expected.shape[-1]
    divergences = kl_divergence(expected.reshape(-1, vocab), value.reshape(-1, vocab))
    return (float(divergences.mean()), len(divergences)) if len(divergences) else (None, 0)
