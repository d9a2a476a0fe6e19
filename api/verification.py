"""Whether an engine keeps what it was built under: the comparison behind `effc verify`, and its verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from effc.errors import ContractError
from effc.passes.base import Contract
from effc.runtime.bundle import Manifest
from effc.runtime.session import Engine, load
from effc.verify.budget import parse_budget
from effc.verify.evaluation import enforce_budget, verify_engine
from effc.verify.tolerance import equivalence_tolerance


def verify(
    engine: Path,
    reference: Path,
    *,
    text: str | Path | None = None,
    tokens: int = 8192,
    context: int = 512,
    threads: int | None = None,
    budget: str | None = None,
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
        threads: Threads of both engines; None for the physical cores.
        budget: Limits such as `max-rel=0.05,top1=0.98`, for any engine.

    Returns:
        What `effc.verify.evaluation.verify_engine` measures, with `contract` (the weakest of the engine's passes),
        `allowed` (the bound of `max_rel`, or None), `holds`, and `reason`, empty when it holds.

    Raises:
        UsageError: Wrong figures, or engines of different tasks.
        InputError: An engine or the text cannot be read.
    """
    limits = None if budget is None else parse_budget(budget)
    with load(engine, threads=threads) as ours, load(reference, threads=threads) as source:
        result = verify_engine(ours, source, text=text, tokens=tokens, context=context)
        contract = weakest_contract(ours.manifest)
        allowed = None if contract == Contract.APPROXIMATE else max(_rounding(ours), _rounding(source))
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
    return {**result, "contract": str(contract), "allowed": allowed, "holds": not reasons, "reason": "; ".join(reasons)}


def weakest_contract(manifest: Manifest) -> Contract:
    """The least that any pass of the engine promised."""
    promised = {record["contract"] for record in manifest.passes}
    order = (Contract.APPROXIMATE, Contract.EQUIVALENT, Contract.EXACT)
    return next((one for one in order if one in promised), Contract.EXACT)


def _rounding(engine: Engine) -> float:
    """`max_rel` that rounding alone may cause in this engine's graph; weights stay in their file."""
    return equivalence_tolerance(ir.load(engine.folder / engine.manifest.model).graph).max_rel
