"""What the pipeline calls around each pass: timing, dumps, memory, progress. Passes contain none of it."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effc.errors import OutputError
from effc.ir.program import Program
from effc.ir.text import program_text
from effc.passes.base import Pass, PassReport


class Instrument:
    """Base of all instruments: both hooks do nothing.

    `after` may return JSON-ready figures; the pipeline merges those of all instruments into the
    `measured` part of the pass record.
    """

    def before(self, one: Pass, program: Program) -> None:
        """Called with the program the pass is about to change."""

    def after(self, one: Pass, program: Program, report: PassReport) -> Mapping[str, Any]:
        """Called with the program the pass has changed."""
        return {}


class DumpStages(Instrument):
    """Writes the graph as ONNX text after each pass: `000_source.txt`, `001_canonicalize.txt`, …"""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and any(not item.name[:3].isdigit() for item in folder.iterdir()):
            raise OutputError(f"{folder}: holds other files than stage dumps. Name an empty or new folder.")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.count = 0

    def before(self, one: Pass, program: Program) -> None:
        """Write the source before the first pass."""
        if self.count == 0:
            self._write("source", program)

    def after(self, one: Pass, program: Program, report: PassReport) -> Mapping[str, Any]:
        """Write the stage the pass left."""
        self._write(one.name, program)
        return {}

    def _write(self, name: str, program: Program) -> None:
        (self.folder / f"{self.count:03d}_{name}.txt").write_text(program_text(program))
        self.count += 1


class PeakMemory(Instrument):
    """Records the peak resident memory of the process after each pass, in bytes."""

    def after(self, one: Pass, program: Program, report: PassReport) -> Mapping[str, Any]:
        """Read the high-water mark."""
        return {"peak_rss": peak_rss()}


def peak_rss() -> int:
    """High-water mark of this process's resident memory, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stopwatch:
    """Wall-clock seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds so far, to the millisecond."""
        return round(time.perf_counter() - self.start, 3)
