"""What a run will need, estimated before the heavy work, and refused early when it is not there."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from effc.errors import OutputError
from effc.ir.program import Program

BASE_BYTES = 900 << 20
"""Resident memory of the libraries and a graph without weights."""
LARGEST_COPIES = 12
"""Copies of the largest stored weight that a step may hold at once: read, widened, coded, checked."""
FIXED_DISK = 256 << 20


@dataclass(frozen=True)
class Plan:
    """Needs of a run.

    Attributes:
        weight_bytes: Bytes of the weights in the source.
        peak_bytes: Estimate of the peak resident memory.
        disk_bytes: Upper bound of the disk space for cache and engine.
    """

    weight_bytes: int
    peak_bytes: int
    disk_bytes: int

    def text(self) -> str:
        """One line for the user."""
        return (
            f"weights {self.weight_bytes / 1e6:.0f} MB; needs up to {self.peak_bytes / 1e9:.1f} GB of memory "
            f"and {self.disk_bytes / 1e9:.1f} GB of disk"
        )


def plan_run(program: Program) -> Plan:
    """Estimate memory and disk from the sizes of the weights; none is read."""
    sizes = [value.const_value.nbytes for value in program.graph.initializers.values() if value.const_value is not None]
    total = program.weight_bytes()
    return Plan(total, BASE_BYTES + LARGEST_COPIES * max(sizes, default=0), 2 * total + FIXED_DISK)


def require_space(plan: Plan, output: Path) -> None:
    """Refuse when the disk clearly cannot hold the engine.

    Raises:
        OutputError: Less than half the weights' bytes are free; no coding reaches that.
    """
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < plan.weight_bytes // 2:
        raise OutputError(
            f"{output}: the disk has {free / 1e9:.2f} GB left, the engine needs {plan.weight_bytes / 1e9:.2f} GB. "
            "Free space or name another place. Nothing was written."
        )
