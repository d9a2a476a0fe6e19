"""The transformers configuration of a GGUF file, made from its checked header alone.

transformers derives a configuration by reading the whole file through the `gguf` package, vocabulary included, which
takes hundreds of megabytes. It gets a stub instead: the same metadata without the long arrays, the same tensor names
with one value each.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

from effc.errors import InputError
from effc.frontends.environment import require
from effc.frontends.gguf_header import ARRAY, FORMATS, STRING, GgufHeader

ALIGNMENT = 32


def load_config(header: GgufHeader) -> Any:
    """The configuration object that the file's metadata stands for.

    Raises:
        InputError: transformers does not know the architecture, or the metadata is incomplete.
    """
    require("gguf", "Reading GGUF")
    require("transformers", "Reading GGUF")
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        with tempfile.TemporaryDirectory(prefix="effc-gguf-") as folder:
            (Path(folder) / "stub.gguf").write_bytes(stub(header))
            config = AutoConfig.from_pretrained(
                folder, gguf_file="stub.gguf", trust_remote_code=False, local_files_only=True
            )
    except Exception as error:
        raise InputError(
            f"{header.path}: transformers cannot configure the GGUF architecture {header.architecture!r} "
            f"({type(error).__name__}: {str(error)[:200]}). Import the original Hugging Face model instead."
        ) from error
    _set_vocabulary(header, config)
    if not getattr(config, "architectures", None):
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
        config.architectures = [name] if isinstance(name, str) else None
    return config


def _set_vocabulary(header: GgufHeader, config: Any) -> None:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if tokens is not None else header.long_arrays.get("tokenizer.ggml.tokens")
    if count is not None and f"{header.architecture}.vocab_size" not in header.metadata:
        config.vocab_size = count


def stub(header: GgufHeader) -> bytes:
    """A small GGUF file with the header's short metadata, its own alignment, and the tensor names."""
    pairs = [(key, kind, value) for key, (kind, value) in header.typed.items() if key != "general.alignment"]
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(header.tensors), len(pairs))]
    for key, kind, value in pairs:
        parts += [_text(key), struct.pack("<I", kind), _value(kind, value)]
    for index, tensor in enumerate(header.tensors):
        # One float32 value each: names are all that is looked at.
        parts += [_text(tensor.name), struct.pack("<IQIQ", 1, 1, 0, ALIGNMENT * index)]
    text = b"".join(parts)
    return text + bytes(-len(text) % ALIGNMENT + ALIGNMENT * len(header.tensors))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _text(value)
    if kind != ARRAY:
        return struct.pack(f"<{FORMATS[kind]}", value)
    element, items = value
    return struct.pack("<IQ", element, len(items)) + b"".join(_value(element, item) for item in items)
