"""`effc doctor`: what works on this machine, and what to install for the rest."""

from __future__ import annotations

from typing import Any

import click

from effc.cli.options import json_option
from effc.cli.output import print_json, print_table


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Say what works on this machine, what is missing, and how to install it."""
    from effc.environment import environment

    facts = environment()
    if as_json:
        print_json(facts)
    else:
        _print_facts(facts)


def _print_facts(facts: dict[str, Any]) -> None:
    click.echo(f"effc         {facts['version']}")
    click.echo(f"python       {facts['python']} on {facts['platform']}, {facts['cores']} cores")
    click.echo(f"kernels      {facts['kernels'] or 'none'}")
    click.echo(f"isa          {facts['isa'] or 'none'} (built and runnable here: {', '.join(facts['isas']) or 'none'})")
    click.echo(f"onnxruntime  {facts['onnxruntime'] or 'none'}")
    click.echo(f"gpu          {', '.join(facts['gpu']) or 'none'}")
    click.echo(
        "packages     " + ", ".join(f"{name} {found or '(missing)'}" for name, found in facts["packages"].items())
    )
    click.echo("")
    rows = [
        (name, "yes" if status["available"] else "no", status["reason"] or "–")
        for name, status in facts["targets"].items()
    ]
    print_table(("target", "available", "reason"), rows)
    click.echo("")
    if not facts["missing"]:
        click.echo("Nothing is missing.")
    for item in facts["missing"]:
        click.echo(f"missing: {item['what']} ({item['why']})\n  {item['install']}")
