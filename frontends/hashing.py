"""One content hash for a model: configuration, and name, size and bytes of every weight file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

CHUNK = 1 << 22


def content_hash(config: bytes, files: Iterable[tuple[str, Path]]) -> str:
    """SHA-256 over the configuration and the files, each read once in chunks, hexadecimal."""
    digest = hashlib.sha256(len(config).to_bytes(8, "little") + config)
    buffer = bytearray(CHUNK)
    for name, path in files:
        digest.update(f"\0{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def start_content_hash(config: bytes, files: Iterable[tuple[str, Path]]) -> Future[str]:
    """Begin hashing in a thread; hashing releases the interpreter, so tracing goes on meanwhile."""
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="effc-hash")
    future = executor.submit(content_hash, config, list(files))
    executor.shutdown(wait=False)
    return future
