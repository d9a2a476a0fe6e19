"""`effc passes`: what there is, and the page of one pass."""

from __future__ import annotations

import click

from effc.cli.options import json_option
from effc.cli.output import print_json, print_table


@click.command("passes")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the passes, or show the documentation and the options of the pass NAME."""
    from effc.catalogue import describe_pass, list_passes

    if name is None:
        listed = list_passes()
        if as_json:
            print_json({"passes": listed})
        else:
            print_table(
                ("pass", "contract", "summary"),
                [(row["name"], row["contract"] or "–", row["summary"]) for row in listed],
            )
        return
    page = describe_pass(name)
    if as_json:
        print_json(page)
        return
    click.echo(f"{page['name']} ({page['contract']})\n\n{page['doc']}\n")
    if not page["options"]:
        click.echo("It has no options.")
        return
    rows = [
        (item["name"], item["type"], item["default"], item["range"] or "–", item["doc"]) for item in page["options"]
    ]
    print_table(("option", "type", "default", "range", "meaning"), rows)
