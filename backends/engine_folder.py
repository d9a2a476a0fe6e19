"""Writes an engine folder as a whole: beside its final name, then renamed, so a crash leaves the old one or none."""

from __future__ import annotations

import contextlib
import errno
import json
import lzma
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from effc.errors import InputError, OutputError
from effc.ir.program import Program
from effc.runtime.bundle import MANIFEST, Manifest, sha256_file

COMPRESS_FROM = 4 << 20
"""Text assets of at least this many bytes are stored LZMA-compressed, as NAME.xz."""


@contextlib.contextmanager
def new_engine_folder(output: Path) -> Iterator[Path]:
    """A fresh folder that becomes `output` when the block ends without an error.

    Args:
        output: Final place. May be absent, an empty folder or an engine folder, which is then replaced.

    Raises:
        OutputError: `output` is something else, its parent cannot be written, or the disk is full.
    """
    check_replaceable(output)
    partial = _partial_folder(output)
    try:
        yield partial
        _replace(partial, output)
    except OSError as error:
        raise OutputError(f"{output}: {_reason(error)}. Nothing was written.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(output: Path) -> None:
    """Refuse a place where no engine can be written.

    Raises:
        OutputError: It is a link, a file, below a file, or a folder with other files in it.
    """
    above = next(parent for parent in output.absolute().parents if parent.exists())
    if not above.is_dir():
        raise OutputError(f"{output}: {above} is not a folder. Name another place.")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OutputError(f"{output}: exists and is not a folder. Name another place.")
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise OutputError(f"{output}: is a folder with other files in it. Name a new folder, or an engine to replace.")


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


def write_assets(program: Program, folder: Path) -> None:
    """Copy the files that travel with the engine; large text files are compressed.

    `tokenizer.json` is stored without insignificant white space.

    Raises:
        InputError: `tokenizer.json` is not JSON.
    """
    for name, content in program.source.assets.items():
        data = content.read_bytes() if isinstance(content, Path) else content
        if name == "tokenizer.json":
            data = _minified(data, str(content) if isinstance(content, Path) else name)
        if len(data) >= COMPRESS_FROM:
            (folder / f"{name}.xz").write_bytes(lzma.compress(data, preset=1))
        else:
            (folder / name).write_bytes(data)


def _minified(data: bytes, where: str) -> bytes:
    try:
        return json.dumps(json.loads(data), separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON ({error}). Download it again.") from error


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file of the folder into the manifest and write `effc.json`, synced to disk.

    Returns:
        The manifest with `files` and `bytes.engine` filled in.
    """
    files: dict[str, dict[str, int | str]] = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    total = sum(path.stat().st_size for path in folder.iterdir())
    manifest = replace(manifest, files=files, bytes={**manifest.bytes, "engine": total})
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    return manifest
