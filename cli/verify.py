"""`effc verify`: how far an engine is from its model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from effc.cli.models import engine_folder
from effc.cli.options import (
    against_option,
    budget_option,
    contexts_option,
    engine_argument,
    model_options,
    output_options,
    passkey_options,
    threads_option,
)
from effc.cli.output import number, print_json, print_table, reporting
from effc.errors import ContractError


@click.command("verify")
@engine_argument
@against_option("The model the engine was made from, or another engine.", required=True)
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Text to measure on.")
@click.option(
    "--tokens", type=click.IntRange(min=2), default=8192, show_default=True, help="Tokens of the text to use."
)
@click.option("--context", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens per window.")
@contexts_option
@passkey_options
@click.option(
    "--reads",
    type=click.IntRange(min=2),
    metavar="TOKENS",
    help="Look which of so many tokens of the text decoding reads.",
)
@click.option(
    "--chunk",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Tokens of text read in one run; later runs read earlier tokens from the cache.",
)
@budget_option
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write an HTML page: the engine's report with what was measured here.",
)
@threads_option
@model_options
@output_options
def command(
    engine: Path,
    against: str,
    text: Path | None,
    tokens: int,
    context: int,
    contexts: Sequence[int],
    passkey: Sequence[int],
    passkey_depths: Sequence[int],
    passkey_samples: int,
    passkey_keys: int,
    reads: int | None,
    chunk: int,
    budget: str | None,
    report: Path | None,
    threads: int | None,
    task: str | None,
    dtype: str | None,
    twin: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare ENGINE with the model it was made from: outputs, next tokens, perplexity, many shapes.

    For long contexts, --contexts measures perplexity at several lengths over one text, and --passkey asks for numbers
    hidden at several depths of prompts of several lengths. --reads shows which cached tokens a sparse engine reads.

    The exit code is 1 when an engine of exact and equivalent passes differs by more than rounding, or when the
    budget is missed.
    """
    with reporting(quiet=quiet) as reporter:
        folder = engine_folder(against, reporter, task=task, dtype=dtype, twin=twin)
        from effc.verification import verify

        result = verify(
            engine,
            folder,
            text=text,
            tokens=tokens,
            context=context,
            contexts=contexts,
            passkey=passkey,
            passkey_depths=passkey_depths,
            passkey_samples=passkey_samples,
            passkey_keys=passkey_keys,
            reads=reads,
            chunk=chunk,
            threads=threads,
            budget=budget,
            report=report,
            progress=reporter.progress,
        )
    if as_json:
        print_json(result)
    else:
        _print_result(result)
    if not result["holds"]:
        raise ContractError(f"{engine}: does not keep its contract: {result['reason']}.")


def _print_result(result: dict[str, Any]) -> None:
    click.echo(f"contract    {result['contract']}, {'kept' if result['holds'] else 'broken'}")
    click.echo(f"same bits   {'yes' if result['bitwise'] else 'no'}")
    click.echo(f"max abs     {number(result['max_abs'])}")
    click.echo(f"max rel     {number(result['max_rel'])}")
    click.echo(f"top-1 same  {number(result.get('top1'), 5)}")
    if perplexity := result.get("perplexity"):
        click.echo(f"perplexity  {number(perplexity['source'], 6)} source, {number(perplexity['engine'], 6)} engine, "
                   f"ratio {number(perplexity['ratio'], 7)}")  # fmt: skip
    click.echo("")
    rows = [
        (*(str(shape.get(axis, "–")) for axis in ("batch", "seq", "past")), number(shape["max_abs"]))
        for shape in result["shapes"]
    ]
    print_table((">batch", ">seq", ">past", ">max abs"), rows)
    if contexts := result.get("contexts"):
        _print_contexts(contexts)
    if passkey := result.get("passkey"):
        _print_passkey(passkey)
    if reads := result.get("reads"):
        _print_reads(reads)


def _print_contexts(contexts: Sequence[dict[str, Any]]) -> None:
    rows = [
        (str(row["context"]), str(row["tokens"]), *(number(row[name], 6) for name in ("source", "engine", "ratio")))
        for row in contexts
    ]
    click.echo("\nperplexity by context length, over the same tokens")
    print_table((">context", ">tokens", ">source", ">engine", ">ratio"), rows)


def _print_passkey(found: dict[str, Any]) -> None:
    for side in ("source", "engine"):
        log_probabilities = found["log_probability"][side]
        rows = [
            (str(length), *(f"{_percent(share)} ({_log(log)})" for share, log in zip(shares, logs, strict=True)))
            for length, shares, logs in zip(found["lengths"], found[side], log_probabilities, strict=True)
        ]
        score = _percent(found["score"][side])
        click.echo(f"\npass keys found by the {side}: {score} (in brackets: mean ln p of the right tokens)")
        print_table((">tokens", *(f">{depth} % deep" for depth in found["depths"])), rows)


def _print_reads(found: dict[str, Any]) -> None:
    rows = [
        (layer["node"], *(_percent(layer[name]) for name in ("least", "most")), " ".join(map(_percent, layer["heads"])))
        for layer in found["layers"]
    ]
    click.echo(f"\nshare of {found['tokens']} tokens that {found['steps']} steps of decoding read")
    print_table(("node", ">least", ">most", "key heads"), rows)


def _log(log_probability: float | None) -> str:
    return "–" if log_probability is None else f"{log_probability:.2f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"
