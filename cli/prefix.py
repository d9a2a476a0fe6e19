"""`effc prefix`: the beginning of prompts, computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from effc.cli.options import engine_argument, json_option, threads_option
from effc.cli.output import megabytes, print_json
from effc.cli.texts import read_text
from effc.errors import InputError


@click.command("prefix")
@engine_argument
@click.option(
    "--text",
    "file",
    type=click.File("r", encoding="utf-8"),
    required=True,
    metavar="FILE",
    help="The text that prompts begin with; `-` is stdin.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder to write.")
@click.option("--chat", is_flag=True, help="The text is the system message of chats: use the model's chat template.")
@click.option(
    "--keep",
    type=float,
    metavar="SHARE",
    help="Share of the prefix that a step reads, with sparse-attention{scheme=clusters}; 0.25.",
)
@click.option(
    "--cluster-tokens",
    type=int,
    metavar="N",
    help="Tokens of a cluster there, the mean; more cost less, and find less surely what matters; 10.",
)
@click.option(
    "--rank",
    type=int,
    metavar="N",
    help="Columns of the matrices that replace its keys, with sparse-attention{scheme=lowrank}; 5 of 32, 64 at least.",
)
@click.option(
    "--outliers",
    type=int,
    metavar="N",
    help="Chunks of every key head that keep their keys there; one in 64, at most 48.",
)
@threads_option
@json_option
def command(
    engine: Path,
    file: Any,
    output: Path,
    chat: bool,
    keep: float | None,
    cluster_tokens: int | None,
    rank: int | None,
    outliers: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Compute the cache of a text that many prompts begin with, for `effc generate ENGINE --prefix DIR`."""
    text = read_text(file)
    if not text:
        raise InputError(f"{file.name}: is empty, there is nothing to compute.")
    from effc.runtime.session import load

    with load(engine, threads=threads) as opened:
        result = opened.write_prefix(
            text, output, chat=chat, keep=keep, cluster_tokens=cluster_tokens, rank=rank, outliers=outliers
        )
    if as_json:
        print_json(result)
    else:
        size = megabytes(result["bytes"])
        click.echo(f"{result['prefix']}: {result['tokens']} tokens, {size}, computed in {result['seconds']:.2f} s")
