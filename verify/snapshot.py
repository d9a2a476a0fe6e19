"""A program as it was at one moment: its graph, and its outputs at the shapes that were asked for."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from effc.ir.program import Program
from effc.verify.inputs import FeedShape, attention_mask, make_feed, program_interface
from effc.verify.streaming import DEFAULT_LIMIT, Observer, evaluate


class Snapshot:
    """A copy of a program's graph, which shares the weights, with outputs computed when required.

    Args:
        program: The program; later edits of it do not reach the snapshot.
        seed: Of random inputs.
        limit: Bytes of weights held at once while it runs.
    """

    def __init__(self, program: Program, *, seed: int = 0, limit: int = DEFAULT_LIMIT) -> None:
        self.model = program.model.clone()
        self.interface = program_interface(program)
        self.seed = seed
        self.limit = limit
        self._outputs: dict[FeedShape, dict[str, np.ndarray]] = {}

    def require(self, shapes: Iterable[FeedShape]) -> None:
        """Compute the outputs at these shapes, all in one reading of the weights.

        Raises:
            InputError: The graph cannot be run.
        """
        missing = [shape for shape in shapes if shape not in self._outputs]
        if missing:
            self._outputs.update(zip(missing, evaluate(self.model, self._feeds(missing), limit=self.limit)))

    def at(self, shape: FeedShape) -> dict[str, np.ndarray]:
        """Output name -> array at one shape."""
        self.require([shape])
        return self._outputs[shape]

    def mask(self, shape: FeedShape) -> np.ndarray:
        """Int64 [batch, past + seq]: 1 at tokens, 0 at padding."""
        return attention_mask(self.interface, shape)

    def observe(self, shape: FeedShape, observer: Observer) -> None:
        """Show every inner value at one shape to the observer."""
        evaluate(self.model, self._feeds([shape]), limit=self.limit, observe=observer)

    def _feeds(self, shapes: Iterable[FeedShape]) -> list[dict[str, np.ndarray]]:
        return [make_feed(self.interface, shape, seed=self.seed) for shape in shapes]
