"""What passes see of calibration data: named values of a program, one window of real input after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from effc.ir.program import Program


class Calibration(Protocol):
    """Real inputs the user gave with `--calibrate`, and a way to run a program on them.

    A pass that reads it declares `uses_calibration`. What it measures is worth keeping in `effc.ir.store` under a
    key that holds `digest` and the hash of the model.
    """

    @property
    def digest(self) -> str:
        """SHA-256 over the inputs that are run and their division into windows, hexadecimal."""

    def observe(self, program: Program, names: Sequence[str]) -> Iterator[Mapping[str, np.ndarray]]:
        """Run the program on every window and give the named values.

        Windows are rows of batch 1 without padding that start from an empty cache. They are of unequal lengths. The
        program is not changed, and only what the names depend on is computed. Memory is bounded: weights are read
        segment by segment, and the values of a few windows are held at once.

        Args:
            program: The program in its present form.
            names: Graph outputs or inner values.

        Yields:
            Name -> array for one window, in the order of the data.

        Raises:
            InputError: The data do not fit the program's inputs, the graph cannot be run, or it has no such value.
        """
