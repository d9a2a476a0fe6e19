"""`effc bench`: how fast an engine is, alone or interleaved with another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from effc.cli.models import engine_folder
from effc.cli.options import against_option, engine_argument, model_options, output_options, threads_option
from effc.cli.output import megabytes, number, print_json, print_table, reporting

RATES = {
    "decode_tokens_per_s": "decode, tokens/s",
    "prefill_tokens_per_s": "prefill, tokens/s",
    "items_per_s": "items/s",
    "load_s": "load, s",
}
SIZES = {"peak_rss": "peak memory", "bytes": "engine folder"}


@click.command("bench")
@engine_argument
@against_option(
    "Measure this one too, interleaved in the same run; a MODEL runs as its plain fp32 export.", required=False
)
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Length of the prompt."
)
@click.option("--new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens to decode.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at once.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Runs; the median counts.")
@threads_option
@model_options
@output_options
def command(
    engine: Path,
    against: str | None,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    repeats: int,
    threads: int | None,
    task: str | None,
    dtype: str | None,
    twin: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure the speed of ENGINE: tokens per second, load time, memory, bytes.

    `--task`, `--dtype` and `--twin` say how a MODEL given to `--against` is read.
    """
    with reporting(quiet=quiet) as reporter:
        other = None if against is None else engine_folder(against, reporter, task=task, dtype=dtype, twin=twin)
        from effc.verify.benchmark import bench_engine

        result = bench_engine(
            engine,
            other,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            threads=threads,
            repeats=repeats,
            progress=lambda text: reporter.progress(text, 0, 0),
        )
    if as_json:
        print_json(result)
    else:
        _print_result(result)


def _print_result(result: dict[str, Any]) -> None:
    sides = [name for name in ("engine", "against", "ratio") if result.get(name)]
    rows = []
    for key, label in (RATES | SIZES).items():
        cells = [_cell(result[side].get(key), size=key in SIZES and side != "ratio") for side in sides]
        if any(cell != "–" for cell in cells):
            rows.append((label, *cells))
    print_table(("", *(f">{side}" for side in sides)), rows)


def _cell(value: Any, *, size: bool) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        spread = f" ({number(value['min'])}–{number(value['max'])})" if "min" in value else ""
        return number(value["median"]) + spread
    return megabytes(value) if size else number(value)
