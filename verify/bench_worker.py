"""The process that runs one engine for `bench_engine`: `python -m effc.verify.bench_worker ENGINE`.

Takes one JSON object a line on stdin, answers one a line on what was stdout; anything else that is printed goes
to stderr. It imports the runtime only, so its memory is that of a user who runs the engine.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from effc.errors import EffcError
from effc.runtime.batch import prompt_chunk
from effc.runtime.kv_state import KvState
from effc.runtime.limits import position_limit, text_config
from effc.runtime.session import Engine, load
from effc.verify.inputs import FeedShape, make_feed, manifest_interface
from effc.verify.steps import token_feed

SEED = 0


class Worker:
    """One engine and what is asked of it. Every method is a request; its arguments are the request's fields."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The engine; `load` comes first."""
        assert self._engine is not None
        return self._engine

    def load(self, threads: int | None) -> dict[str, Any]:
        """Open the engine as a user does, hashes checked; `seconds`, `task`."""
        begun = time.perf_counter()
        self._engine = load(self.folder, threads=threads)
        return {"seconds": time.perf_counter() - begun, "task": self.engine.task}

    def generate(self, batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """Read a prompt of fixed ids, then append fixed ids one by one: `prefill` and `decode` seconds.

        An engine that shortens prompts does so first, in the time of the prefill.
        """
        ids = self._ids(batch, prompt_tokens + new_tokens)
        begun = time.perf_counter()
        prompts = np.array([self.engine.shortened(row) for row in ids[:, :prompt_tokens].tolist()])
        width = prompts.shape[1]
        state = self.engine.new_state(batch, max_length=width + new_tokens)
        chunk = prompt_chunk(self.engine, batch, width)
        for start in range(0, width, chunk):
            end = min(start + chunk, width)
            self._run(state, prompts[:, start:end], ["logits"] if end == width else [])
        read = time.perf_counter()
        for place in range(prompt_tokens, prompt_tokens + new_tokens):
            self._run(state, ids[:, place : place + 1], ["logits"])
        return {"prefill": read - begun, "decode": time.perf_counter() - read}

    def items(self, batch: int, seq: int, runs: int) -> dict[str, Any]:
        """Run the whole graph `runs` times on one feed: `seconds`, and the `batch` that was run."""
        config = self.engine.manifest.config
        shape = FeedShape(batch, min(seq, position_limit(config) or seq))
        feed = make_feed(replace(manifest_interface(self.engine.manifest), config=config), shape, seed=SEED)
        begun = time.perf_counter()
        for _ in range(runs):
            self.engine.run(feed)
        return {"seconds": time.perf_counter() - begun}

    def memory(self) -> dict[str, Any]:
        """Peak resident memory of this process so far, bytes; and the CPU `seconds` it has used."""
        return {"peak_rss": peak_resident(), "cpu": time.process_time()}

    def _run(self, state: KvState, ids: np.ndarray, outputs: list[str]) -> None:
        state.run(token_feed(self.engine, ids, state.length), outputs, num_logits=1)

    def _ids(self, batch: int, count: int) -> np.ndarray:
        vocabulary = int(text_config(self.engine.manifest.config).get("vocab_size") or 32)
        return np.random.default_rng(SEED).integers(0, vocabulary, (batch, count))


def peak_resident() -> int:
    """High-water mark of resident memory, bytes.

    `VmHWM` where there is one: `ru_maxrss` starts at what the parent had before it executed this program.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def runs_for(seconds: float, least: float = 0.2) -> int:
    """How often to repeat a run of `seconds` so that it lasts at least `least` seconds; at most 1000 times."""
    return max(1, min(1000, math.ceil(least / max(seconds, 1e-6))))


def serve(folder: Path) -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(folder)
    for line in sys.stdin:
        request = json.loads(line)
        action: Callable[..., dict[str, Any]] = getattr(worker, request.pop("do"))
        try:
            answer = action(**request)
        except EffcError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
