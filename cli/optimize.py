"""`effc optimize`: a model in, an engine folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from effc.cli.options import budget_option, json_option, model_argument, model_options, quiet_option
from effc.cli.output import megabytes, number, print_json, print_table, reporting
from effc.errors import UsageError
from effc.passes.recipes import Recipe, preset, preset_names, read_recipe

DEFAULT_TARGET = "ort-cpu"
REASONS_SHOWN = 5


EXAMPLES = """\b
Examples:
  effc optimize MODEL -o ENGINE --preset lossless
  effc optimize MODEL -o ENGINE --passes "lossless-weights{min-saving=0.1}"
  effc optimize MODEL --passes lossless-weights --dry-run
"""


@click.command("optimize", epilog=EXAMPLES)
@model_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Engine folder to write.")
@click.option("--passes", metavar="TEXT", help="Pipeline text, for example `lossless-weights`. See `effc passes`.")
@click.option("--preset", "preset_name", metavar="NAME", help=f"A recipe of ours: {', '.join(preset_names())}.")
@click.option("--recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A recipe file (TOML).")
@click.option("--target", metavar="NAME", help=f"Where it will run; `effc doctor` lists. Default: {DEFAULT_TARGET}.")
@click.option("--portable", is_flag=True, help="Write standard ONNX ops only: runs without our kernels, slower.")
@budget_option
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Real inputs for passes that measure on them: text, .jsonl (`text`, `prompt`, `input_ids`), .npz.",
)
@click.option(
    "--calibrate-tokens",
    type=click.IntRange(min=1),
    default=16384,
    show_default=True,
    help="Most tokens of that file to use, in windows of 512.",
)
@click.option("--allow-noop", is_flag=True, help="Accept a pass that changes nothing; without it that is an error.")
@click.option("--dry-run", is_flag=True, help="Report the sites every pass would change; write nothing.")
@model_options
@click.option(
    "--dump",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write the graph after each pass, as text.",
)
@json_option
@quiet_option
def command(
    model: str,
    output: Path | None,
    passes: str | None,
    preset_name: str | None,
    recipe: Path | None,
    target: str | None,
    portable: bool,
    budget: str | None,
    calibrate: Path | None,
    calibrate_tokens: int,
    allow_noop: bool,
    dry_run: bool,
    task: str | None,
    dtype: str | None,
    twin: bool,
    dump: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compile MODEL into an engine folder, and check every pass's promise on the way.

    MODEL is a Hugging Face folder, a GGUF file, a `.pt2` program or an ONNX file.
    """
    if output is None and not dry_run:
        raise UsageError("optimize needs a place for the engine. Name one with -o DIR, or ask for --dry-run.")
    plan = _chosen_recipe(passes, preset_name, recipe)
    from effc.compiler import optimize

    with reporting(quiet=quiet) as reporter:
        result = optimize(
            model,
            output,
            passes=plan.passes,
            target=target or plan.target or DEFAULT_TARGET,
            portable=portable,
            allow_noop=allow_noop,
            dry_run=dry_run,
            twin=twin,
            task=task,
            dtype=dtype,
            dump=dump,
            budget=budget or plan.budget,
            calibrate=calibrate,
            calibrate_tokens=calibrate_tokens,
            progress=reporter.progress,
            announce=reporter.announce,
        )
    if as_json:
        print_json(result.summary)
    else:
        _print_summary(result.summary)


def _chosen_recipe(passes: str | None, preset_name: str | None, path: Path | None) -> Recipe:
    given = [
        flag
        for flag, value in (("--passes", passes), ("--preset", preset_name), ("--recipe", path))
        if value is not None
    ]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} both name a pipeline. Give one of them.")
    if preset_name is not None:
        return preset(preset_name)
    if path is not None:
        return read_recipe(path)
    return Recipe(passes or "")


def _print_summary(summary: dict[str, Any]) -> None:
    print_table(
        ("pass", "contract", ">rewritten", ">left alone", "measured", ">seconds"), map(_pass_row, summary["passes"])
    )
    _print_reasons(summary["passes"])
    size = summary["bytes"]
    click.echo("")
    click.echo(f"task      {summary['task']}")
    click.echo(f"pipeline  {summary['pipeline']}")
    if summary["engine"] is None:
        click.echo("dry run   nothing was written")
        return
    click.echo(f"engine    {summary['engine']} ({summary['target']})")
    click.echo(f"weights   {megabytes(size['source'])} in the source, {megabytes(size['weights_stored'])} on disk, "
               f"{megabytes(size['weights_memory'])} in memory")  # fmt: skip
    click.echo(f"cost      {summary['seconds']:.1f} s, peak memory {megabytes(summary['peak_rss'])}")


def _pass_row(record: dict[str, Any]) -> tuple[str, ...]:
    changed = record.get("would_rewrite") or record["rewritten"]
    return (
        record["name"],
        record["contract"],
        str(len(changed)) if isinstance(changed, list) else str(changed),
        str(len(record["left"])),
        _measured_text(record["measured"]),
        f"{record['seconds']:.1f}",
    )


def _measured_text(measured: dict[str, Any]) -> str:
    if measured.get("bitwise"):
        return "same bits"
    if measured.get("max_abs") is None:
        return "–"
    return f"max abs {number(measured['max_abs'])}, max rel {number(measured.get('max_rel'))}"


def _print_reasons(records: list[dict[str, Any]]) -> None:
    for record in records:
        left = record["left"]
        for item in left[:REASONS_SHOWN]:
            click.echo(f"  {record['name']} left {item['site']} alone: {item['reason']}")
        if len(left) > REASONS_SHOWN:
            click.echo(f"  … and {len(left) - REASONS_SHOWN} more (all of them: --json, or the report of the engine)")
