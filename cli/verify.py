"""`effc verify`: how far an engine is from its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from effc.cli.models import engine_folder
from effc.cli.options import (
    against_option,
    budget_option,
    engine_argument,
    model_options,
    output_options,
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
@budget_option
@threads_option
@model_options
@output_options
def command(
    engine: Path,
    against: str,
    text: Path | None,
    tokens: int,
    context: int,
    budget: str | None,
    threads: int | None,
    task: str | None,
    dtype: str | None,
    twin: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare ENGINE with the model it was made from: outputs, next tokens, perplexity, many shapes.

    The exit code is 1 when an engine of exact and equivalent passes differs by more than rounding, or when the
    budget is missed.
    """
    with reporting(quiet=quiet) as reporter:
        folder = engine_folder(against, reporter, task=task, dtype=dtype, twin=twin)
        from effc.verification import verify

        reporter.progress("compare", 0, 0)
        result = verify(engine, folder, text=text, tokens=tokens, context=context, threads=threads, budget=budget)
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
