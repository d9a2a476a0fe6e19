"""`effc generate`: text from an engine."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from effc.cli.options import engine_argument, json_option, sampling_options, threads_option
from effc.cli.output import print_json
from effc.cli.texts import read_text
from effc.errors import UsageError


@click.command("generate")
@engine_argument
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Prompt; give it again for a batch.")
@click.option(
    "--prompt-file", type=click.File("r", encoding="utf-8"), help="Read one prompt from a file; `-` is stdin."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@sampling_options
@click.option("--stream", is_flag=True, help="Print the text as it is made (one prompt).")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option(
    "--prefix",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Start where `effc prefix` ended: the prompt is what follows its text.",
)
@click.option(
    "--filter-prompt/--no-filter-prompt",
    default=True,
    show_default=True,
    help="Shorten long prompts where the engine has a filter.",
)
@threads_option
@json_option
def command(
    engine: Path,
    prompts: tuple[str, ...],
    prompt_file: Any,
    max_new_tokens: int,
    stop: tuple[str, ...],
    stream: bool,
    chat: bool,
    prefix: Path | None,
    filter_prompt: bool,
    threads: int | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate text with ENGINE."""
    texts = [*prompts, *([read_text(prompt_file)] if prompt_file is not None else [])]
    if not texts:
        raise UsageError("generate needs a prompt. Give --prompt TEXT or --prompt-file FILE.")
    if stream and (as_json or len(texts) > 1):
        raise UsageError("--stream prints one text as it grows: use it with one prompt and without --json.")
    from effc.runtime.session import load

    with load(engine, threads=threads) as opened:
        results = opened.generate(
            texts,
            max_new_tokens=max_new_tokens,
            stop=stop,
            stream=_print_piece if stream else None,
            chat=chat,
            prefix=prefix,
            filter_prompt=filter_prompt,
            **sampling,
        )
    if as_json:
        print_json({"results": [{"prompt": text, **asdict(result)} for text, result in zip(texts, results)]})
    elif stream:
        click.echo("")
    else:
        for result in results:
            click.echo(result.text)


def _print_piece(_row: int, text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()
