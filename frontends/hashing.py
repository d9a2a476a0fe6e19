"""One content hash for a model: configuration or graph, and name, size and bytes of every weight file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

import onnx_ir as ir

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
    future: Future[str] = Future()
    listed = list(files)

    def work() -> None:
        try:
            future.set_result(content_hash(config, listed))
        except Exception as error:
            future.set_exception(error)

    # A daemon: after a failed import the process must not wait for the hash of a large checkpoint.
    Thread(target=work, name="effc-hash", daemon=True).start()
    return future


def model_hash(model: ir.Model) -> str:
    """SHA-256 over the nodes, ports and weights of a model in memory, hexadecimal."""
    digest = hashlib.sha256()
    for value in (*model.graph.inputs, *model.graph.outputs):
        digest.update(f"{value.name}:{value.type}{value.shape}\n".encode())
    for node in model.graph.all_nodes():
        ports = [value.name if value is not None else "" for value in (*node.inputs, *node.outputs)]
        digest.update(f"{node.domain}::{node.op_type} {ports} {sorted(node.attributes)}\n".encode())
        for _, attribute in sorted(node.attributes.items()):
            if attribute.type is ir.AttributeType.TENSOR:
                digest.update(attribute.as_tensor().tobytes())
            elif attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                digest.update(repr(attribute.value).encode())
    for name, value in sorted(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None:
            digest.update(f"{name}:{tensor.dtype.name}{list(tensor.shape)}\n".encode())
            digest.update(tensor.tobytes())
    return digest.hexdigest()
