"""`optimize`: a model goes in, an engine folder comes out, and every promise on the way was measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from effc import __version__
from effc.backends import backend
from effc.backends.base import Backend, Progress
from effc.backends.engine_folder import check_replaceable, new_engine_folder, seal
from effc.backends.lowering import Lowering, StaticCacheLowering
from effc.errors import UsageError
from effc.frontends import import_model
from effc.ir.program import Program, Task
from effc.ir.store import ENGINES, Store, cache_folder, content_key
from effc.passes.base import Pass
from effc.passes.instruments import DumpStages, Instrument, PeakMemory, Stopwatch, peak_rss
from effc.passes.pipeline import expand, run_pipeline, run_step
from effc.passes.pipeline_text import format_pipeline, parse_pipeline
from effc.plan import Plan, plan_run, require_space
from effc.runtime.bundle import MANIFEST, Manifest
from effc.verify.budget import Budget, parse_budget
from effc.verify.calibration import DEFAULT_TOKENS, open_calibration
from effc.verify.calibration_files import check_file
from effc.verify.contracts import ContractCheck
from effc.verify.report import write_report
from effc.verify.weights import WeightCheck

HARD_SHAPES_UP_TO = 1 << 30
"""Models with more bytes of weights are checked at one small shape instead of several."""
SMALL_SEGMENT = 96 << 20
"""Bytes of weights such a check holds at once."""


@dataclass(frozen=True)
class OptimizeResult:
    """What `optimize` made.

    Attributes:
        program: The program after all passes, before lowering.
        folder: The engine folder; None after a dry run.
        manifest: Its manifest; None after a dry run.
        summary: The JSON object of `effc optimize --json`.
    """

    program: Program
    folder: Path | None
    manifest: Manifest | None
    summary: dict[str, Any]


def optimize(
    model: Any,
    output: str | Path | None,
    *,
    passes: str | Sequence[Pass] = "",
    target: str = "ort-cpu",
    portable: bool = False,
    allow_noop: bool = False,
    dry_run: bool = False,
    twin: bool = False,
    task: str | Task | None = None,
    dtype: str | None = None,
    example_inputs: Any = None,
    check: bool = True,
    budget: str | None = None,
    calibrate: str | Path | None = None,
    calibrate_tokens: int = DEFAULT_TOKENS,
    dump: Path | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> OptimizeResult:
    """Compile a model into an engine folder.

    Args:
        model: Path of a Hugging Face folder, GGUF, `.pt2` or ONNX file; or a torch module or exported program, an
            `onnx_ir.Model` or an `onnx.ModelProto`.
        output: The engine folder to write; an engine already there is replaced. May be None for a dry run.
        passes: Pipeline text, or pass objects.
        target: Backend name.
        portable: Write standard ops only.
        allow_noop: Accept a requested pass that changes nothing.
        dry_run: Match every pass and report the sites; change and write nothing.
        twin: Use the same architecture with two random layers.
        task: Overrides the task the frontend finds.
        dtype: Storage dtype of weights that the source holds quantised (`bfloat16`, `float32`).
        example_inputs: For a torch module: the inputs to export with.
        check: Measure every pass's contract and the decoded weights.
        budget: Limits of approximate passes, such as `max-rel=0.05,top1=0.98`.
        calibrate: Real inputs for passes that measure on them: UTF-8 text; `.jsonl` with `text`, `prompt` (and
            `completion`) or `input_ids` a line; or `.npz` with arrays named like the inputs, first axis = samples.
        calibrate_tokens: Most tokens of it to use, in windows of 512.
        dump: Folder for the graph after each pass, as text.
        progress: Called with stage, bytes done, bytes in all.
        announce: Called with one-line notes: what was decided, what will be needed.

    Raises:
        UsageError: Unknown pass, option or target; calibration data that no pass uses.
        InputError: The model or the calibration data were refused.
        ContractError: A pass broke its promise, or a requested pass changed nothing.
        OutputError: The engine cannot be written.
        MissingDependencyError: Something is not installed.
    """
    watch = Stopwatch()
    say = announce or (lambda text: None)
    step = progress or (lambda stage, done, total: None)
    requested = parse_pipeline(passes) if isinstance(passes, str) else tuple(passes)
    chosen = backend(target)
    limits = parse_budget(budget) if budget is not None else None
    if calibrate is not None:
        _check_calibration(Path(calibrate), calibrate_tokens, expand(requested))
    if output is None and not dry_run:
        raise UsageError("optimize needs an output folder. Name one with -o DIR, or ask for a dry run.")
    if output is not None and not dry_run:
        check_replaceable(Path(output))
    if isinstance(model, str | Path) and (Path(model) / MANIFEST).is_file():
        raise UsageError(f"{model}: is an engine folder already. Name the model it was made from.")
    step("import", 0, 0)
    program = import_model(
        model,
        example_inputs=example_inputs,
        task=task,
        dtype=dtype,
        twin=twin,
        check=check,
        progress=lambda stage: step(stage, 0, 0),
    )
    for note in program.source.notes:
        say(note)
    data = open_calibration(Path(calibrate), program, tokens=calibrate_tokens) if calibrate is not None else None
    if data is not None:
        program.calibration = data
        say(data.describe())
    plan = plan_run(program)
    say(plan.text())
    if dry_run:
        return OptimizeResult(program, None, None, _dry_run(program, requested, target, plan, watch))
    assert output is not None
    require_space(plan, Path(output))
    instruments = _instruments(_contract_check(plan, limits) if check else None, dump, step)
    run_pipeline(program, requested, instruments, allow_noop=allow_noop)
    canonical = program.clone()
    if not portable and chosen.static_caches(program):
        run_step(program, StaticCacheLowering(chosen), instruments)
    run_step(program, Lowering(chosen, portable), instruments)
    manifest = _write(program, Path(output), chosen, portable, step)
    Store().prune()
    summary = {**_summary(manifest, Path(output), watch), "calibration": data.to_json() if data else None}
    return OptimizeResult(canonical, Path(output), manifest, summary)


def reference_engine(
    model: Any, *, dtype: str | None = None, task: str | Task | None = None, twin: bool = False
) -> Path:
    """The source exported plainly to onnxruntime: standard ops, fp32 weights, no pass run.

    Returns:
        The engine folder, in the cache; made once per content and version of effc.
    """
    program = import_model(model, task=task, dtype=dtype, twin=twin, check=False)
    key = content_key(
        what="reference engine",
        effc=__version__,
        source=program.source.content_hash,
        task=str(program.task),
        dtype=dtype,
        twin=twin,
    )
    folder = cache_folder() / ENGINES / key
    if (folder / MANIFEST).is_file():
        os.utime(folder / MANIFEST)
        return folder
    Store().prune()
    chosen = backend("ort-cpu")
    run_step(program, Lowering(chosen, portable=True))
    _write(program, folder, chosen, True, lambda stage, done, total: None)
    return folder


def _check_calibration(path: Path, tokens: int, passes: Sequence[Pass]) -> None:
    """Refuse what would come to nothing, before the model is read."""
    if tokens < 1:
        raise UsageError(f"calibrate_tokens is {tokens}; give at least 1.")
    if not any(one.uses_calibration for one in passes):
        names = ", ".join(one.name for one in passes)
        raise UsageError(f"{path}: no pass of the pipeline uses calibration data ({names}). Leave --calibrate out.")
    check_file(path)


def _contract_check(plan: Plan, limits: Budget | None) -> ContractCheck:
    if plan.weight_bytes <= HARD_SHAPES_UP_TO:
        return ContractCheck("hard", budget=limits)
    return ContractCheck("quick", budget=limits, limit=SMALL_SEGMENT)


def _instruments(check: ContractCheck | None, dump: Path | None, step: Progress) -> list[Instrument]:
    instruments: list[Instrument] = [_Stage(step)]
    if check is not None:
        instruments += [check, WeightCheck()]
    if dump is not None:
        instruments.append(DumpStages(dump))
    return [*instruments, PeakMemory()]


class _Stage(Instrument):
    """Tells the caller which pass is running."""

    def __init__(self, step: Progress) -> None:
        self.step = step

    def before(self, one: Pass, program: Program) -> None:
        self.step(one.name, 0, 0)


def _dry_run(program: Program, requested: Sequence[Pass], target: str, plan: Plan, watch: Stopwatch) -> dict[str, Any]:
    """Run the pipeline on a copy for its matches only; weights are not coded, nothing is written."""
    records = []
    for one in expand(requested):
        match = one.match(program)
        records.append(
            {
                "name": one.name,
                "contract": str(one.contract),
                "rewritten": [],
                "would_rewrite": [site.name for site in match.sites],
                "left": [{"site": item.site, "reason": item.reason} for item in match.left],
                "measured": {},
                "seconds": 0.0,
            }
        )
        if one not in requested:
            one.apply(program, match.sites)
    return {
        "engine": None,
        "task": str(program.task),
        "target": target,
        "pipeline": format_pipeline(expand(requested)),
        "seconds": watch.seconds(),
        "peak_rss": peak_rss(),
        "bytes": {"source": plan.weight_bytes, "engine": 0, "weights_stored": 0, "weights_memory": 0},
        "plan": asdict(plan),
        "passes": records,
    }


def _write(program: Program, output: Path, chosen: Backend, portable: bool, step: Progress) -> Manifest:
    with new_engine_folder(output) as folder:
        manifest = chosen.write(program, folder, portable=portable, progress=step)
        write_report(asdict(manifest), folder / "report.html")
        step("hash", 0, 0)
        return seal(folder, manifest)


def _summary(manifest: Manifest, folder: Path, watch: Stopwatch) -> dict[str, Any]:
    return {
        "engine": str(folder),
        "task": manifest.task,
        "target": manifest.target,
        "pipeline": manifest.pipeline,
        "seconds": watch.seconds(),
        "peak_rss": peak_rss(),
        "bytes": manifest.bytes,
        "passes": manifest.passes,
    }
