"""`effc inspect`: what is in a model or an engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from effc.cli.models import is_engine
from effc.cli.options import model_options, output_options
from effc.cli.output import megabytes, number, print_json, print_table, reporting

PORTS = ("inputs", "optional_inputs", "outputs")
KINDS = ("attention", "linear", "embedding", "norm")


@click.command("inspect")
@click.argument("path", metavar="MODEL|ENGINE")
@model_options
@output_options
def command(path: str, task: str | None, dtype: str | None, twin: bool, as_json: bool, quiet: bool) -> None:
    """Say what is in a model, and what coding its weights would save; or what an engine is and how it was made."""
    if is_engine(path):
        from effc.inspection import inspect_engine
        from effc.runtime.bundle import read_manifest

        facts = inspect_engine(read_manifest(Path(path)))
        show = print_json if as_json else _print_engine
        show(facts)
        return
    with reporting(quiet=quiet) as reporter:
        reporter.progress("import", 0, 0)
        from effc.frontends import import_model
        from effc.inspection import inspect_model

        program = import_model(
            path, task=task, dtype=dtype, twin=twin, check=False, progress=lambda stage: reporter.progress(stage, 0, 0)
        )
        facts = inspect_model(program, reporter.progress)
    show = print_json if as_json else _print_model
    show(facts)


def _print_model(facts: Mapping[str, Any]) -> None:
    click.echo(f"task     {facts['task']}")
    click.echo("sites    " + ", ".join(f"{len(facts['sites'][kind])} {kind}" for kind in KINDS))
    for phase, cost in facts["cost"].items():
        sizes = ", ".join(f"{name} {size}" for name, size in cost["sizes"].items())
        click.echo(f"{phase:<8} {cost['flops'] / 1e9:,.2f} GFLOP, {megabytes(cost['bytes'])} moved ({sizes})")
    for item in facts["left"]:
        click.echo(f"left     {item['site']}: {item['reason']}")
    for note in facts["source"]["notes"]:
        click.echo(f"note     {note}")
    click.echo("")
    print_table(
        ("attention", ">heads", ">KV heads", ">head size", "sees", "cache"),
        map(_attention_row, facts["sites"]["attention"]),
    )
    click.echo("")
    rows = [_weight_row(weight) for weight in facts["weights"]["tensors"]]
    print_table(("weight", "shape", "dtype", ">size", ">bits of information", ">on disk", ">in memory"), rows)
    click.echo("")
    click.echo(_saving(facts["weights"]))


def _attention_row(site: Mapping[str, Any]) -> tuple[str, ...]:
    sees = "unknown (mask not understood)" if not site["mask_understood"] else "before it" if site["causal"] else "all"
    window = f", {site['window']} tokens" if site["window"] is not None else ""
    counts = (str(site[key]) for key in ("heads", "kv_heads", "head_size"))
    return site["name"], *counts, sees + window, "yes" if site["cache"] else "no"


def _weight_row(weight: Mapping[str, Any]) -> tuple[str, ...]:
    bits = (number(weight[key], 4) for key in ("entropy_bits", "storage_bits", "runtime_bits"))
    return weight["name"], "×".join(map(str, weight["shape"])), weight["dtype"], megabytes(weight["bytes"]), *bits


def _saving(weights: Mapping[str, Any]) -> str:
    def coded(key: str) -> float:
        return math.fsum(math.prod(one["shape"]) * one[key] / 8 for one in weights["tensors"])

    return (
        f"weights  {megabytes(weights['bytes'])}; coded without loss {megabytes(coded('storage_bits'))} on disk, "
        f"{megabytes(coded('runtime_bits'))} in memory"
    )


def _print_engine(facts: Mapping[str, Any]) -> None:
    size, source = facts["bytes"], facts["source"]
    click.echo(f"task      {facts['task']}")
    click.echo(f"target    {facts['target']}{', portable' if facts['portable'] else ''}")
    click.echo(f"pipeline  {facts['pipeline']}")
    click.echo(f"source    {source.get('name', '–')} ({source.get('kind', '–')})")
    click.echo(
        f"weights   {megabytes(size.get('source'))} in the source, {megabytes(size.get('weights_stored'))} on disk, "
        f"{megabytes(size.get('weights_memory'))} in memory"
    )
    click.echo(f"cache     {'none' if facts['cache'] is None else facts['cache']['mode']}")
    click.echo("")
    ports = [(port, kind.replace("_", " ")) for kind in PORTS for port in facts[kind]]
    rows = [(port["name"], kind, port["dtype"], _shape(port)) for port, kind in ports]
    print_table(("port", "kind", "dtype", "shape"), rows)
    click.echo("")
    print_table(("file", ">size"), [(name, megabytes(count)) for name, count in facts["files"].items()])


def _shape(port: Mapping[str, Any]) -> str:
    return "×".join(map(str, port["shape"])) or "scalar"
