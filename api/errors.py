"""Every error effc raises on purpose, and the exit code each one has on the command line."""

from __future__ import annotations


class EffcError(Exception):
    """Base of all errors with a message meant for the user: what, where, and what to do.

    Attributes:
        exit_code: Process exit code of the `effc` command when this error ends it.
    """

    exit_code = 1


class ContractError(EffcError):
    """A pass or an engine does not keep its promise, or misses the budget."""

    exit_code = 1


class UsageError(EffcError):
    """The request itself is wrong: unknown pass, bad option, unknown target."""

    exit_code = 2


class InputError(EffcError):
    """A file or model was refused: damaged, unsafe, of an unsupported kind."""

    exit_code = 3


class EngineError(InputError):
    """An engine folder was refused: damaged, of a newer format, or not an engine."""


class OutputError(EffcError):
    """The result could not be written: no permission, no space, not an engine folder."""

    exit_code = 3


class MissingDependencyError(EffcError):
    """Something is missing in the environment: a library, the kernels, a device."""

    exit_code = 4
