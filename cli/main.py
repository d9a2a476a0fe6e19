"""The `effc` command: commands loaded when asked for, and the one place where errors become exit codes."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import click
from click.shell_completion import shell_complete

from effc import __version__
from effc.errors import EffcError, MissingDependencyError

COMMANDS = {
    "optimize": "effc.cli.optimize",
    "inspect": "effc.cli.inspect",
    "verify": "effc.cli.verify",
    "bench": "effc.cli.bench",
    "generate": "effc.cli.generate",
    "chat": "effc.cli.chat",
    "prefix": "effc.cli.prefix",
    "embed": "effc.cli.embed",
    "passes": "effc.cli.passes",
    "doctor": "effc.cli.doctor",
    "import-df11": "effc.cli.import_df11",
}
"""Command name -> module; each module names its click command `command`."""

EPILOG = """\b
Start with:
  effc inspect MODEL                                what is in it, what could be saved
  effc optimize MODEL --preset lossless -o ENGINE   make it smaller and faster, same bits
  effc verify ENGINE --against MODEL                measure the difference
  effc bench ENGINE --against MODEL                 measure the speed

\b
Exit codes:
  0    done
  1    a contract or a budget does not hold
  2    wrong usage: unknown option, pass or target
  3    input refused, or the result cannot be written
  4    something is missing in the environment
  70   an error inside effc; EFFC_DEBUG=1 shows where
  130  interrupted
  141  the reader of the output went away
"""
COMPLETION = "_EFFC_COMPLETE"
INTERRUPTED = 130
PIPE_CLOSED = 141
INTERNAL = 70


class LazyGroup(click.Group):
    """Imports a command's module when the command is named; one that fails is listed with its reason."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, loadable or not, in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or one that only says why it cannot be loaded."""
        if cmd_name not in COMMANDS:
            return None
        try:
            command: click.Command = importlib.import_module(COMMANDS[cmd_name]).command
        except Exception as error:
            # Whatever is wrong with one command must not take the others along.
            return _broken(cmd_name, str(error))
        return command


def _broken(name: str, reason: str) -> click.Command:
    def refuse(arguments: tuple[str, ...]) -> None:
        raise MissingDependencyError(f"`effc {name}` cannot be loaded: {reason}. Install what it names.")

    return click.Command(
        name,
        callback=refuse,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True, "help_option_names": []},
        short_help=f"(cannot be loaded: {reason})",
    )


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.version_option(__version__, prog_name="effc", message="%(prog)s %(version)s")
def cli() -> None:
    """Compile transformer models into engines, and prove that they still compute the right thing.

    EFFC_DEBUG=1 prints the traceback of an error, EFFC_CACHE names the cache folder, NO_COLOR=1 turns colour off.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after `effc`; those of the process by default.

    Returns:
        The exit code; every error has been worded on stderr.
    """
    try:
        code = _invoke(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
        return code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        _drop_stdout()
        return PIPE_CLOSED
    except Exception as error:
        if os.environ.get("EFFC_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        return _fail(*_worded(error))


def _invoke(arguments: list[str]) -> int:
    """What `click.Command.main` does, without its own handling of pipes and interrupts."""
    if instruction := os.environ.get(COMPLETION):
        return shell_complete(cli, {}, "effc", COMPLETION, instruction)
    try:
        with cli.make_context("effc", arguments) as context:
            cli.invoke(context)
        return 0
    except click.exceptions.Exit as end:
        return end.exit_code


def _worded(error: Exception) -> tuple[str, int]:
    if isinstance(error, EffcError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        return (
            "out of memory. Free memory, or use a smaller model or batch; "
            "`effc optimize --dry-run` says what a run needs.",
            MissingDependencyError.exit_code,
        )
    if isinstance(error, ImportError):
        return f"{error}. `effc doctor` says what is missing and how to install it.", MissingDependencyError.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        return _worded_os_error(error), 3
    return (
        f"an error inside effc: {type(error).__name__}: {error}. "
        "Run again with EFFC_DEBUG=1 to see where, and report it.",
        INTERNAL,
    )


def _worded_os_error(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    advice = {
        errno.ENOSPC: "The disk is full: free space, or name another place.",
        errno.EDQUOT: "The disk quota is used up: free space, or name another place.",
        errno.EACCES: "Change its permissions, or name another place.",
        errno.EROFS: "Name a place that can be written.",
        errno.ENOENT: "Check the path.",
        errno.EMFILE: "Raise the limit of open files (`ulimit -n`).",
    }.get(error.errno or 0, "Check the path and the disk.")
    return f"{place}{(error.strerror or 'unknown error').lower()}. {advice}"


def _fail(message: str, code: int) -> int:
    try:
        click.secho("error: ", fg="red", bold=True, nl=False, err=True, color=_stderr_colour())
        click.echo(message, err=True)
    except BrokenPipeError:
        return PIPE_CLOSED
    return code


def _stderr_colour() -> bool | None:
    return False if os.environ.get("NO_COLOR") else None


def _drop_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush stays quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
