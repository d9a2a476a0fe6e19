"""Option groups that several commands share; each flag is spelled and explained once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

TASKS = ("causal-lm", "encoder", "vision", "vision-language", "generic")
DTYPES = ("float32", "bfloat16", "float16")

model_argument = click.argument("model")
engine_argument = click.argument("engine", type=click.Path(path_type=Path))

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress and no notes on stderr.")
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), default=None, help="Threads to compute with. Default: the physical cores."
)
budget_option = click.option(
    "--budget", metavar="TEXT", help="Limits of approximation: `max-rel=0.05,top1=0.98,kl=0.01,perplexity=1.02`."
)
task_option = click.option(
    "--task", type=click.Choice(TASKS), default=None, help="What the model is for. Default: read from the model."
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default=None,
    help="Store float weights so. Default: as the source does; quantised GGUF blocks become bfloat16.",
)
twin_option = click.option(
    "--twin", is_flag=True, help="Use a twin of the model: same architecture, two layers, random weights."
)


def model_options(function: Command) -> Command:
    """How a MODEL is read: `--task`, `--dtype`, `--twin`."""
    for option in (twin_option, dtype_option, task_option):
        function = option(function)
    return function


def sampling_options(function: Command) -> Command:
    """How tokens are chosen, and what ends a text: the options of `Sampling`, `--seed` and `--stop`."""
    for option in reversed(
        (
            click.option(
                "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy."
            ),
            click.option(
                "--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0 keeps all tokens."
            ),
            click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True),
            click.option(
                "--repetition-penalty", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True
            ),
            click.option("--seed", type=click.IntRange(min=0), default=None, help="Makes sampling repeatable."),
            click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text; may be given again."),
        )
    ):
        function = option(function)
    return function


def output_options(function: Command) -> Command:
    """How results are shown: `--json`, `--quiet`."""
    for option in (quiet_option, json_option):
        function = option(function)
    return function


class Numbers(click.ParamType):
    """Whole numbers separated by commas, each from `least` to `most`; they become a tuple."""

    name = "numbers"

    def __init__(self, least: int, most: int | None = None) -> None:
        self.least = least
        self.most = most

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[int, ...]:
        """Parse, refuse and sort out; a number that is given twice counts once."""
        if isinstance(value, tuple):
            return value
        numbers: dict[int, None] = {}
        for word in str(value).split(","):
            number = int(word) if word.strip().isdecimal() else -1
            if number < self.least or (self.most is not None and number > self.most):
                span = f"of at least {self.least}" if self.most is None else f"from {self.least} to {self.most}"
                self.fail(
                    f"{word.strip()!r} is no whole number {span}. Separate several by commas.", parameter, context
                )
            numbers[number] = None
        return tuple(numbers)


contexts_option = click.option(
    "--contexts",
    type=Numbers(2),
    metavar="N,N,…",
    default=(),
    help="Also measure perplexity at these context lengths, over the same tokens: `512,2048,4096`.",
)


def passkey_options(function: Command) -> Command:
    """What to hide where: `--passkey`, `--passkey-depths`, `--passkey-samples`, `--passkey-keys`."""
    options = (
        click.option(
            "--passkey",
            type=Numbers(1),
            metavar="N,N,…",
            default=(),
            help="Also ask for a number hidden in prompts of these lengths in tokens: `2048,4096`.",
        ),
        click.option(
            "--passkey-depths",
            type=Numbers(0, 100),
            metavar="N,N,…",
            default="0,25,50,75,100",
            show_default=True,
            help="Where it is hidden, percent of the prompt.",
        ),
        click.option(
            "--passkey-samples",
            type=click.IntRange(min=1),
            default=4,
            show_default=True,
            help="Prompts for each length and depth.",
        ),
        click.option(
            "--passkey-keys",
            type=click.IntRange(1, 16),
            default=1,
            show_default=True,
            help="Numbers stated in a prompt; one is asked for. More make it harder.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def against_option(text: str, *, required: bool) -> Decorator:
    """`--against MODEL|ENGINE`.

    Args:
        text: Help of the option.
        required: Whether the command needs it.
    """
    return click.option("--against", required=required, metavar="MODEL|ENGINE", help=text)
