"""Writes a folder as a whole: beside its final name, then renamed, so a crash leaves the old one or none."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from effc.errors import OutputError


@contextlib.contextmanager
def new_folder(output: Path, marker: str, what: str) -> Iterator[Path]:
    """A fresh folder that becomes `output` when the block ends without an error.

    Args:
        output: Final place. May be absent, an empty folder or a folder with the file `marker`, which is then replaced.
        marker: File by which a folder of this kind is known.
        what: What such a folder is, for messages: `an engine`.

    Raises:
        OutputError: `output` is something else, its parent cannot be written, or the disk is full.
    """
    check_replaceable(output, marker, what)
    partial = _partial_folder(output)
    try:
        yield partial
        _replace(partial, output)
    except OSError as error:
        raise OutputError(f"{output}: {_reason(error)}. Nothing was written.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(output: Path, marker: str, what: str) -> None:
    """Refuse a place where no such folder can be written.

    Raises:
        OutputError: It is a link, a file, below a file, or a folder with other files in it.
    """
    above = next(parent for parent in output.absolute().parents if parent.exists())
    if not above.is_dir():
        raise OutputError(f"{output}: {above} is not a folder. Name another place.")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OutputError(f"{output}: exists and is not a folder. Name another place.")
    if output.is_dir() and any(output.iterdir()) and not (output / marker).is_file():
        raise OutputError(f"{output}: is a folder with other files in it. Name a new folder, or {what} to replace.")


def write_synced(path: Path, text: str) -> None:
    """Write UTF-8 text and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _partial_folder(output: Path) -> Path:
    parent = output.absolute().parent
    prefix = f".{output.name}.partial-"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for stale in parent.glob(prefix + "*"):
            if not _owner_alive(stale):
                shutil.rmtree(stale, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f"{prefix}{os.getpid()}-"))
        folder.chmod(0o755)
        return folder
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({_reason(error)}). Name another place.") from error


def _owner_alive(partial: Path) -> bool:
    pid = partial.name.rpartition(".partial-")[2].partition("-")[0]
    return pid.isdigit() and Path(f"/proc/{pid}").exists()


def _replace(partial: Path, output: Path) -> None:
    old = partial.with_name(partial.name + ".old")
    if output.exists():
        os.rename(output, old)
    try:
        os.rename(partial, output)
    except OSError:
        if old.exists():
            os.rename(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "no space is left on the disk"
    return error.strerror or str(error)
