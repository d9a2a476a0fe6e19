"""`effc embed`: one vector per line of text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from effc.cli.options import engine_argument, json_option, threads_option
from effc.cli.output import note, print_json
from effc.errors import InputError, UsageError


@click.command("embed")
@engine_argument
@click.argument("file", type=click.File("r", encoding="utf-8"))
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE.npy", help="Write a float32 array.")
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Texts at once.")
@click.option(
    "--normalize/--no-normalize", default=None, help="Scale vectors to length 1. Default: as the model's own files say."
)
@threads_option
@json_option
def command(
    engine: Path,
    file: Any,
    output: Path | None,
    batch: int,
    normalize: bool | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Embed every line of FILE (`-` is stdin) with ENGINE; prints one line of numbers per text."""
    if output is not None and as_json:
        raise UsageError("--output and --json both say where the vectors go. Give one of them.")
    texts = _lines(file)
    from effc.runtime.session import load

    with load(engine, threads=threads) as opened:
        vectors = opened.embed(texts, batch_size=batch, normalize=normalize)
    if output is not None:
        _write_array(output, vectors)
        note(f"{output}: {len(vectors)} vectors of {vectors.shape[1]} numbers")
    elif as_json:
        print_json({"embeddings": vectors.tolist()})
    else:
        for vector in vectors:
            click.echo(" ".join(f"{number:.7g}" for number in vector))


def _lines(file: Any) -> list[str]:
    try:
        texts = [line.rstrip("\r\n") for line in file]
    except UnicodeDecodeError as error:
        raise InputError(f"{file.name}: is not UTF-8 text ({error}). Convert it first.") from error
    if not texts:
        raise InputError(f"{file.name}: is empty, there is nothing to embed.")
    return texts


def _write_array(path: Path, vectors: Any) -> None:
    """Write beside and rename, so that a full disk leaves no half array."""
    import numpy as np

    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            np.save(file, vectors)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
