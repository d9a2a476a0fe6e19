"""Writes an engine folder: as a whole or not at all, its text files, its manifest."""

from __future__ import annotations

import json
import lzma
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from effc.errors import InputError
from effc.ir.program import Program
from effc.runtime.bundle import MANIFEST, Manifest, sha256_file
from effc.runtime.new_folder import check_replaceable as new_folder_check
from effc.runtime.new_folder import new_folder, write_synced

AN_ENGINE = "an engine"
COMPRESS_FROM = 4 << 20
"""Text assets of at least this many bytes are stored LZMA-compressed, as NAME.xz."""


def new_engine_folder(output: Path) -> AbstractContextManager[Path]:
    """A fresh folder that becomes the engine `output` when the block ends without an error; see `new_folder`."""
    return new_folder(output, MANIFEST, AN_ENGINE)


def check_replaceable(output: Path) -> None:
    """Refuse a place where no engine can be written; see `effc.runtime.new_folder.check_replaceable`."""
    new_folder_check(output, MANIFEST, AN_ENGINE)


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
    write_synced(folder / MANIFEST, manifest.to_json())
    return manifest
