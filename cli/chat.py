"""`effc chat`: a dialogue with an engine, on a terminal or line by line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from effc.cli.options import engine_argument, sampling_options, threads_option
from effc.cli.output import note, print_json_line
from effc.errors import InputError

if TYPE_CHECKING:
    from effc.runtime.dialogue import Dialogue

PROMPT = "> "


@click.command("chat")
@engine_argument
@click.option("--system", metavar="TEXT", help="System message of the dialogue.")
@click.option(
    "--template/--no-template",
    default=None,
    help="Put turns into the model's chat template, or take all as one text. Default: where the engine has one.",
)
@click.option(
    "--decay",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    help="What a turn leaves of older surprise, where the engine keeps tokens by it.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@sampling_options
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout for each turn, on one line.")
def command(
    engine: Path,
    system: str | None,
    template: bool | None,
    decay: float,
    max_new_tokens: int,
    stop: tuple[str, ...],
    threads: int | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Talk with ENGINE: every line is a turn, to the end of the input.

    An engine made with --passes 'sparse-attention{scheme=retain}' goes on for ever; any other ends with the model's
    longest text.
    """
    from effc.runtime.session import load

    with load(engine, threads=threads) as opened:
        chat = opened.tokenizer.has_chat_template if template is None else template
        dialogue = opened.dialogue(decay=decay, chat=chat, system=system, **sampling)
        for line in _lines():
            _turn(dialogue, line, {"max_new_tokens": max_new_tokens, "stop": stop}, as_json)


def _turn(dialogue: Dialogue, line: str, options: dict[str, Any], as_json: bool) -> None:
    if as_json:
        answer = dialogue.say(line, **options)
        print_json_line({"prompt": line, **asdict(answer), "dialogue_tokens": dialogue.length})
        sys.stdout.flush()
    else:
        dialogue.say(line, stream=_print_piece, **options)
        click.echo("")


def _print_piece(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def _lines() -> Iterator[str]:
    """Turns as they come; empty lines are none."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            click.echo(PROMPT, nl=False, err=True)
        try:
            line = sys.stdin.buffer.readline().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"the input is not UTF-8 text ({error}). Convert it first.") from error
        if not line:
            if terminal:
                note("")
            return
        if text := line.strip():
            yield text
