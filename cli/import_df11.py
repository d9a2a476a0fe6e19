"""`effc import-df11`: a DFloat11 checkpoint back to the bf16 checkpoint it stands for."""

from __future__ import annotations

from pathlib import Path

import click

from effc.cli.options import output_options
from effc.cli.output import megabytes, print_json, reporting


@click.command("import-df11")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder to write.")
@output_options
def command(folder: Path, output: Path, as_json: bool, quiet: bool) -> None:
    """Decode the DFloat11 checkpoint in FOLDER to the Hugging Face folder it was made from, bit for bit.

    The result is a MODEL like any other, for `effc optimize`.
    """
    with reporting(quiet=quiet) as reporter:
        from effc.frontends.dfloat11 import import_dfloat11

        result = import_dfloat11(folder, output, lambda group, _done, _total: reporter.progress(group, 0, 0))
    if as_json:
        print_json(result)
        return
    size = result["bytes"]
    click.echo(
        f"{result['folder']}: {result['weights']} weights of {result['groups']} groups decoded, "
        f"{megabytes(size['coded'])} to {megabytes(size['decoded'])}"
    )
