"""Text files that commands read."""

from __future__ import annotations

from typing import Any

from effc.errors import InputError


def read_text(file: Any) -> str:
    """All of an open text file.

    Raises:
        InputError: It is not UTF-8.
    """
    try:
        return str(file.read())
    except UnicodeDecodeError as error:
        raise InputError(f"{file.name}: is not UTF-8 text ({error}). Convert it first.") from error
