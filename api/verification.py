"""Whether an engine keeps what it was built under: the comparison behind `effc verify`, and its verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir

from effc.errors import ContractError, OutputError, UsageError
from effc.passes.base import Contract
from effc.runtime.bundle import MANIFEST, Manifest
from effc.runtime.session import Engine, load
from effc.verify.budget import Budget, parse_budget
from effc.verify.evaluation import enforce_budget, verify_engine
from effc.verify.long_context import check_lengths, measure_contexts
from effc.verify.passkey import check_passkey, measure_passkey
from effc.verify.passkey_prompt import DEPTHS, PasskeyTask
from effc.verify.report import write_report
from effc.verify.steps import CHUNK
from effc.verify.text import common_tokenizer, text_ids
from effc.verify.token_reads import measure_reads
from effc.verify.tolerance import equivalence_tolerance


def verify(
    engine: Path,
    reference: Path,
    *,
    text: str | Path | None = None,
    tokens: int = 8192,
    context: int = 512,
    contexts: Sequence[int] = (),
    passkey: Sequence[int] = (),
    passkey_depths: Sequence[int] = DEPTHS,
    passkey_samples: int = 4,
    passkey_keys: int = 1,
    reads: int | None = None,
    chunk: int = CHUNK,
    threads: int | None = None,
    budget: str | None = None,
    report: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare an engine with a reference engine and judge the difference.

    An engine whose passes are all exact or equivalent must agree with the reference up to rounding (see
    `effc.verify.tolerance`). One with an approximate pass is judged by the budget, and without one not at all.

    Args:
        engine: Engine folder.
        reference: Engine folder of what it is compared with, usually the plain export of its source.
        text: Text or a file, for perplexity; None for the topics of Python's own help.
        tokens: Most tokens of text to use.
        context: Tokens in one window.
        contexts: Further context lengths to measure perplexity at, all over the same tokens.
        passkey: Lengths of prompts to hide a pass key in.
        passkey_depths: Where in the filler it is stated, percent.
        passkey_samples: Prompts for each length and depth.
        passkey_keys: Keys stated in a prompt, of which one is asked for; more make it harder.
        reads: Tokens of text after which to look which tokens the engine reads.
        chunk: Tokens of text read in one run; those of later runs read earlier ones from the cache.
        threads: Threads of both engines; None for the physical cores.
        budget: Limits such as `max-rel=0.05,top1=0.98`, for any engine; that of perplexity holds at every context.
        report: HTML page to write, with the content of the engine's own `report.html` and what was measured.
        progress: Called with a line before each step, and zeros.

    Returns:
        What `effc.verify.evaluation.verify_engine` measures; `contexts` of `effc.verify.long_context.measure_contexts`;
        `passkey` of `effc.verify.passkey.measure_passkey` and `reads` of `effc.verify.token_reads.measure_reads`, None
        when they were not asked for; `contract` (the weakest of
        the engine's passes), `allowed` (the bound of `max_rel`, or None), `holds`, and `reason`, empty when it holds.

    Raises:
        UsageError: Wrong figures, engines of different tasks, or a report inside an engine folder.
        InputError: An engine or the text cannot be read.
        OutputError: The report cannot be written.
    """
    limits = None if budget is None else parse_budget(budget)
    task = PasskeyTask(passkey, passkey_depths, passkey_samples, passkey_keys) if passkey else None
    page = None if report is None else _report_place(Path(report))
    say = progress or (lambda stage, done, total: None)
    with load(engine, threads=threads) as ours, load(reference, threads=threads) as source:
        if task is not None:
            check_passkey(task, ours, source)
        if reads is not None:
            check_lengths("reads", [reads], ours, ours)
        by_length = measure_contexts(ours, source, contexts, text=text, tokens=tokens, chunk=chunk, progress=progress)
        say("compare outputs and perplexity", 0, 0)
        result = verify_engine(ours, source, text=text, tokens=tokens, context=context, chunk=chunk)
        result["contexts"] = by_length
        result["passkey"] = (
            None if task is None else measure_passkey(ours, source, task, chunk=chunk, progress=progress)
        )
        result["reads"] = None
        if reads is not None:
            result["reads"] = measure_reads(ours, _text_of(reads, text, ours, source), chunk=chunk, progress=progress)
        result.update(_verdict(result, ours, source, limits))
        if page is not None:
            write_report(asdict(ours.manifest), page, verify=result)
    return result


def _text_of(tokens: int, text: str | Path | None, engine: Engine, reference: Engine) -> list[int]:
    """The first tokens of the text, all that were asked for."""
    config = {**engine.manifest.config, **reference.manifest.config}
    ids = text_ids(text, tokens, common_tokenizer(engine, reference), config)
    if len(ids) < tokens:
        raise UsageError(f"reads {tokens}: the text has {len(ids)} tokens. Give a longer text with --text.")
    return ids


def _verdict(result: dict[str, Any], engine: Engine, reference: Engine, limits: Budget | None) -> dict[str, Any]:
    contract = weakest_contract(engine.manifest)
    allowed = None if contract == Contract.APPROXIMATE else max(_rounding(engine), _rounding(reference))
    reasons = []
    if allowed is not None and (result["max_rel"] is None or result["max_rel"] > allowed):
        reasons.append(
            f"outputs differ by more than rounding: max_rel is {result['max_rel']}, {allowed:.3g} is allowed"
        )
    if limits is not None:
        try:
            enforce_budget(result, limits)
        except ContractError as error:
            reasons.append(str(error))
    return {"contract": str(contract), "allowed": allowed, "holds": not reasons, "reason": "; ".join(reasons)}


def _report_place(path: Path) -> Path:
    """The page to write, refused where it cannot be before anything is measured."""
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"{path}: cannot be written. Name a file in a folder that exists.")
    if (path.parent / MANIFEST).is_file():
        raise UsageError(f"{path}: lies in an engine folder, whose files are sealed by hashes. Name another place.")
    return path


def weakest_contract(manifest: Manifest) -> Contract:
    """The least that any pass of the engine promised."""
    promised = {record["contract"] for record in manifest.passes}
    order = (Contract.APPROXIMATE, Contract.EQUIVALENT, Contract.EXACT)
    return next((one for one in order if one in promised), Contract.EXACT)


def _rounding(engine: Engine) -> float:
    """`max_rel` that rounding alone may cause in this engine's graph; weights stay in their file."""
    return equivalence_tolerance(ir.load(engine.folder / engine.manifest.model).graph).max_rel
