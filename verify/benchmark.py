"""Measures how fast an engine is, alone or side by side with another."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from effc import errors
from effc.errors import EngineError, UsageError
from effc.runtime.bundle import Manifest, read_manifest
from effc.runtime.limits import token_limit
from effc.verify.bench_worker import runs_for

SETTLE = 0.2
"""Seconds between turns: onnxruntime's threads spin for some tens of milliseconds after a run."""
RATES = ("decode_tokens_per_s", "prefill_tokens_per_s", "items_per_s")


def bench_engine(
    engine_folder: Path,
    against_folder: Path | None = None,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    batch: int = 1,
    threads: int | None = None,
    repeats: int = 5,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure an engine, interleaved with another one when there is one.

    Each engine runs in a process of its own, started with nothing but the runtime, so that load time and peak
    memory are what a user gets. The processes take turns (A B A B …), one waits without work while the other
    runs, so both see the same machine.

    Args:
        engine_folder: The engine.
        against_folder: Another engine of the same task, or None.
        prompt_tokens: Tokens of the prompt, or of each item of an encoder (at most what the model takes).
        new_tokens: Tokens decoded one by one after the prompt.
        batch: Rows.
        threads: Threads of each engine; None for the runtime's own choice.
        repeats: Turns each engine gets after one that is not counted.
        progress: Called with a line before each step.

    Returns:
        The JSON object of `effc bench`: `engine` and `against` (null without one), each with `decode_tokens_per_s`,
        `prefill_tokens_per_s` (null for other tasks than causal-lm), `items_per_s` (null for causal-lm) as
        `{median, min, max}`, `load_s`, `peak_rss` and `bytes`; `ratio`: engine over against of each, medians for
        rates; `settings`.
        Tokens are counted over all rows. `load_s` includes checking the hashes; the files are in the system's
        cache. `peak_rss` covers load and all runs.

    Raises:
        UsageError: A figure out of range, or engines of different tasks.
        EngineError: An engine is damaged, or its process ended, by lack of memory for example.
    """
    folders = [Path(engine_folder), *([Path(against_folder)] if against_folder is not None else [])]
    manifests = [read_manifest(folder) for folder in folders]
    _check_request(manifests, prompt_tokens, new_tokens, batch, repeats)
    say = progress or (lambda text: None)
    with contextlib.ExitStack() as stack:
        sides = [_Side(stack.enter_context(_Process.start(folder)), folder) for folder in folders]
        for side in sides:
            say(f"loading {side.folder}")
            side.load(threads)
            side.warm_up(batch, prompt_tokens, new_tokens)
            time.sleep(SETTLE)
        runs = max(side.runs for side in sides)
        for turn in range(repeats):
            for side in sides:
                say(f"turn {turn + 1} of {repeats}: {side.folder}")
                side.take_turn(batch, prompt_tokens, new_tokens, runs)
                time.sleep(SETTLE)
        figures = [side.figures() for side in sides]
    return {
        "engine": figures[0],
        "against": figures[1] if len(figures) > 1 else None,
        "ratio": ratios(*figures) if len(figures) > 1 else None,
        "settings": {
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "batch": batch,
            "threads": threads,
            "repeats": repeats,
        },
    }


def _check_request(
    manifests: Sequence[Manifest], prompt_tokens: int, new_tokens: int, batch: int, repeats: int
) -> None:
    for name, value in (
        ("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("batch", batch), ("repeats", repeats)
    ):  # fmt: skip
        if value < 1:
            raise UsageError(f"{name} is {value}; give at least 1.")
    tasks = {manifest.task for manifest in manifests}
    if len(tasks) > 1:
        raise UsageError(f"the engines have the tasks {' and '.join(sorted(tasks))}. Compare engines of one task.")
    for manifest in manifests:
        limit = token_limit(manifest)
        if manifest.task == "causal-lm" and limit is not None and prompt_tokens + new_tokens > limit:
            raise UsageError(
                f"prompt_tokens + new_tokens is {prompt_tokens + new_tokens}, the model takes at most {limit}. "
                "Ask for fewer."
            )


class _Process:
    """A worker process that answers requests one at a time."""

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder = folder
        self.process = process

    @classmethod
    @contextlib.contextmanager
    def start(cls, folder: Path) -> Iterator[_Process]:
        """Start a worker; it ends with the block."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(
            [sys.executable, "-m", "effc.verify.bench_worker", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            encoding="utf-8",
        )
        try:
            yield cls(folder, process)
        finally:
            process.kill()
            process.communicate()

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            EffcError: What the worker raised.
            EngineError: The worker ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            cause = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise EngineError(
                f"{self.folder}: the process that measures it {cause} during {do!r}. If memory ran out, close other "
                "programs or use a smaller batch; otherwise see the lines it printed."
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["kind"], EngineError)(answer["error"])
        return answer


class _Side:
    """One engine of the comparison and what was measured of it."""

    def __init__(self, process: _Process, folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.load_s = 0.0
        self.generates = False
        self.runs = 1
        self.rates: dict[str, list[float]] = {name: [] for name in RATES}

    def load(self, threads: int | None) -> None:
        """Open the engine."""
        answer = self.process.ask("load", threads=threads)
        self.load_s, self.generates = answer["seconds"], answer["task"] == "causal-lm"

    def warm_up(self, batch: int, prompt_tokens: int, new_tokens: int) -> None:
        """One turn that is not counted; it tells how many runs of an item fill a turn."""
        if self.generates:
            self.process.ask("generate", batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
            return
        self.process.ask("items", batch=batch, seq=prompt_tokens, runs=1)
        self.runs = runs_for(self.process.ask("items", batch=batch, seq=prompt_tokens, runs=1)["seconds"])

    def take_turn(self, batch: int, prompt_tokens: int, new_tokens: int, runs: int) -> None:
        """One turn that counts."""
        if self.generates:
            answer = self.process.ask("generate", batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
            self.rates["prefill_tokens_per_s"].append(batch * prompt_tokens / answer["prefill"])
            self.rates["decode_tokens_per_s"].append(batch * new_tokens / answer["decode"])
        else:
            answer = self.process.ask("items", batch=batch, seq=prompt_tokens, runs=runs)
            self.rates["items_per_s"].append(batch * runs / answer["seconds"])

    def figures(self) -> dict[str, Any]:
        """The part of the result about this engine."""
        return {
            **{name: spread(values) for name, values in self.rates.items()},
            "load_s": self.load_s,
            "peak_rss": self.process.ask("memory")["peak_rss"],
            "bytes": folder_bytes(self.folder),
        }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, least and most; None for nothing."""
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(engine: Mapping[str, Any], against: Mapping[str, Any]) -> dict[str, float | None]:
    """Engine over against for every figure, by the medians; None where one side has none or is zero."""
    result: dict[str, float | None] = {}
    for name, figure in engine.items():
        pair = [side["median"] if isinstance(side, Mapping) else side for side in (figure, against.get(name))]
        result[name] = pair[0] / pair[1] if pair[0] is not None and pair[1] else None
    return result


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in an engine folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
