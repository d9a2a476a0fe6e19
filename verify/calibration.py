"""Calibration data of a file: windows of real input, and a program run on them in bounded memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from effc.errors import InputError
from effc.ir.program import Program
from effc.ir.rewrite.cut import cut_to
from effc.verify.calibration_windows import Window, open_windows
from effc.verify.inputs import FeedShape, Interface, make_feed
from effc.verify.snapshot import program_interface
from effc.verify.streaming import DEFAULT_LIMIT, evaluate

DEFAULT_TOKENS = 16384
WINDOW = 512
"""Most tokens of one window."""
HELD_BYTES = 128 << 20
"""Bytes of observed values that are held at once, unless one window alone has more."""


@dataclass(frozen=True)
class FileCalibration:
    """The calibration data of a file; implements `effc.ir.calibration.Calibration`.

    The file is read anew for each use, so nothing of it stays in memory.

    Attributes:
        path: The file.
        tokens: Most tokens that are used, special ones included.
        interface: What the model took when the file was opened.
        digest: SHA-256 over the windows.
        windows: Number of windows.
        used: Tokens in them; a sample without tokens counts as `WINDOW`.
    """

    path: Path
    tokens: int
    interface: Interface
    digest: str
    windows: int
    used: int

    def describe(self) -> str:
        """One line for the user."""
        return f"calibration: {self.windows} windows, {self.used} tokens of {self.path}"

    def to_json(self) -> dict[str, Any]:
        """File, windows, tokens and digest."""
        return {"file": str(self.path), "windows": self.windows, "tokens": self.used, "digest": self.digest}

    def observe(self, program: Program, names: Sequence[str]) -> Iterator[Mapping[str, np.ndarray]]:
        """Run the program on every window; see `effc.ir.calibration.Calibration.observe`."""
        model = cut_to(program.model, names)
        interface = program_interface(program)
        windows = open_windows(self.path, self.interface, self.tokens, WINDOW)
        feeds = ((window.length, _feed(interface, window)) for window in windows)
        for group in _groups(model, feeds):
            while group:
                outputs = group.pop(0)
                yield {name: outputs[name] for name in names}


def open_calibration(path: Path, program: Program, *, tokens: int = DEFAULT_TOKENS) -> FileCalibration:
    """Read a file once, check all that will be used of it, and take its digest.

    Args:
        path: UTF-8 text; `.jsonl` with one text, prompt or list of ids a line; or `.npz` with arrays named like the
            inputs, first axis = samples.
        program: The imported model: its inputs, tokenizer, vocabulary and position limit.
        tokens: Most tokens to use.

    Raises:
        InputError: The file is missing, empty, damaged or does not fit the model; says where.
    """
    interface = program_interface(program)
    digest = hashlib.sha256(json.dumps({"window": WINDOW}).encode())
    count = used = 0
    for window in open_windows(path, interface, tokens, WINDOW):
        count, used = count + 1, used + window.cost(WINDOW)
        for name, array in sorted(window.arrays.items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    if not count:
        raise InputError(f"{path}: has no data to calibrate on. Give a file with content.")
    return FileCalibration(path, tokens, interface, digest.hexdigest(), count, used)


def _feed(interface: Interface, window: Window) -> dict[str, np.ndarray]:
    """The window, an empty cache, and what follows from the tokens."""
    feed = make_feed(interface, FeedShape(1, window.length))
    feed.update({name: np.zeros_like(feed[name]) for name in interface.cache})
    absent = window.arrays.keys() - feed.keys()
    if absent:
        raise InputError(f"the program no longer takes {', '.join(sorted(absent))}, which the calibration data hold.")
    feed.update({name: array.astype(feed[name].dtype, copy=False) for name, array in window.arrays.items()})
    return feed


def _groups(
    model: ir.Model, feeds: Iterable[tuple[int, dict[str, np.ndarray]]]
) -> Iterator[list[dict[str, np.ndarray]]]:
    """Outputs of feeds of so many tokens, as many at once as fit `HELD_BYTES`: a group is one reading of the weights.

    The first feed goes alone and tells how large outputs are; those of longer ones grow with the square at most.
    """
    remaining = iter(feeds)
    first, feed = next(remaining)
    outputs = evaluate(model, [feed], limit=DEFAULT_LIMIT)
    size = sum(array.nbytes for array in outputs[0].values())
    yield outputs
    del outputs
    group: list[dict[str, np.ndarray]] = []
    held = 0.0
    for length, feed in remaining:
        expected = size * max(1.0, length / first) ** 2
        if group and held + expected > HELD_BYTES:
            yield evaluate(model, group, limit=DEFAULT_LIMIT)
            group, held = [], 0.0
        group.append(feed)
        held += expected
    if group:
        yield evaluate(model, group, limit=DEFAULT_LIMIT)
