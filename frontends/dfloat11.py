"""DFloat11 checkpoints: a folder becomes an ordinary bf16 Hugging Face folder, bit for bit, one group at a time.

Container: https://github.com/LeanModels/DFloat11 (arrays per group, `dfloat11_config` in config.json).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from effc.errors import InputError, OutputError
from effc.frontends.architecture import choose, load_config
from effc.frontends.dfloat11_stream import BITS_PER_THREAD, THREADS_PER_BLOCK, Group, decode_group
from effc.frontends.environment import offline_and_quiet
from effc.frontends.huggingface import read_config
from effc.frontends.safetensors_index import Checkpoint, read_checkpoint
from effc.frontends.skeleton import build

ARRAYS = ("encoded_exponent", "sign_mantissa", "luts", "gaps", "output_positions")
ARRAY_TYPES = {
    **dict.fromkeys(ARRAYS, (ir.DataType.UINT8,)),
    "output_positions": (ir.DataType.UINT32, ir.DataType.INT32, ir.DataType.UINT8),
}
INDEX = "model.safetensors.index.json"


def import_dfloat11(
    folder: Path, output: Path, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, Any]:
    """Write the bf16 checkpoint that a DFloat11 checkpoint stands for.

    Args:
        folder: The DFloat11 folder.
        output: New folder for the decoded checkpoint; must not exist or be empty.
        progress: Called with a group name, groups done, groups in all.

    Returns:
        `{"folder", "groups", "weights", "bytes": {"coded", "decoded"}}`.

    Raises:
        InputError: The checkpoint is damaged, of an unknown version, or does not fit its configuration.
        OutputError: The output cannot be written.
    """
    with offline_and_quiet():
        _, content = read_config(folder)
        patterns = _patterns(folder, content)
        checkpoint = read_checkpoint(folder)
        shapes = _shapes(folder, content)
    groups = _groups(checkpoint, patterns, folder)
    if not groups:
        raise InputError(f"{folder}: has no DFloat11 group. Import it as it is.")
    _check_output(output)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        decoded = _write_all(folder, partial, checkpoint, groups, shapes, content, progress)
        if output.is_dir():
            output.rmdir()
        partial.rename(output)
    except OSError as error:
        raise OutputError(f"{output}: {error.strerror or error}. Nothing was written.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {
        "folder": str(output),
        "groups": len(groups),
        "weights": sum(len(names) for names in groups.values()),
        "bytes": {"coded": checkpoint.nbytes, "decoded": decoded},
    }


def _patterns(folder: Path, content: Mapping[str, Any]) -> Mapping[str, list[str]]:
    """`pattern_dict` of the configuration: a pattern over module paths -> the matrices of a group, in order."""
    settings = content.get("dfloat11_config")
    where = folder / "config.json"
    if not isinstance(settings, dict) or not isinstance(settings.get("pattern_dict"), dict):
        raise InputError(f"{where}: has no `dfloat11_config` with a `pattern_dict`, so this is no DFloat11 checkpoint.")
    threads, chunk = settings.get("threads_per_block"), settings.get("bytes_per_thread")
    if threads not in ([THREADS_PER_BLOCK], THREADS_PER_BLOCK) or chunk != BITS_PER_THREAD // 8:
        raise InputError(
            f"{where}: threads_per_block={threads}, bytes_per_thread={chunk}; "
            f"effc reads [{THREADS_PER_BLOCK}] and {BITS_PER_THREAD // 8}, as every published version has."
        )
    return {pattern: _parts(where, pattern, parts) for pattern, parts in settings["pattern_dict"].items()}


def _parts(where: Path, pattern: str, parts: Any) -> list[str]:
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"{where}: {pattern!r} in `pattern_dict` is no pattern ({error}).") from error
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise InputError(f"{where}: {pattern!r} in `pattern_dict` must list names, it is {parts!r}. Download it again.")
    return parts


def _shapes(folder: Path, content: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of the architecture; the container holds none."""
    config = load_config(folder, {key: value for key, value in content.items() if key != "quantization_config"})
    model, _ = build(choose(config, None, str(folder)).model_class, config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}


def _groups(checkpoint: Checkpoint, patterns: Mapping[str, list[str]], folder: Path) -> dict[str, list[str]]:
    """Module path of each group -> the names of its weights, in stream order."""
    groups = {}
    suffix = ".encoded_exponent"
    for name in checkpoint.tensors:
        if name.endswith(suffix):
            path = name.removesuffix(suffix)
            parts = next((value for pattern, value in patterns.items() if re.fullmatch(pattern, path)), None)
            if parts is None:
                raise InputError(f"{folder}: group {path!r} matches no entry of `pattern_dict`. Download it again.")
            groups[path] = [f"{path}.{part}.weight" for part in parts] or [f"{path}.weight"]
    return groups


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output}: exists and is not an empty folder. Name a new one.")


def _write_all(
    folder: Path,
    output: Path,
    checkpoint: Checkpoint,
    groups: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
    content: Mapping[str, Any],
    progress: Callable[[str, int, int], None] | None,
) -> int:
    """One shard a group, one for the rest, the index and the small files; returns the bytes of all weights."""
    weight_map: dict[str, str] = {}
    total = 0
    for index, (path, names) in enumerate(groups.items()):
        if progress is not None:
            progress(path, index, len(groups))
        shard = f"model-{index + 1:05d}.safetensors"
        total += _write_shard(output / shard, _decoded(checkpoint, path, names, shapes))
        weight_map.update(dict.fromkeys(names, shard))
    coded = {f"{path}.{array}" for path in groups for array in (*ARRAYS, "split_positions")}
    rest = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in coded}
    total += _write_shard(output / "model-00000.safetensors", ((name, rest[name].numpy()) for name in rest))
    weight_map.update(dict.fromkeys(rest, "model-00000.safetensors"))
    (output / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    plain = {key: value for key, value in content.items() if key not in ("dfloat11_config", "quantization_config")}
    (output / "config.json").write_text(json.dumps(plain, indent=2))
    for item in folder.iterdir():
        if item.is_file() and item.name != "config.json" and "safetensors" not in item.name:
            shutil.copyfile(item, output / item.name)
    return total


def _decoded(
    checkpoint: Checkpoint, path: str, names: list[str], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray]]:
    """The weights of one group as bf16 words."""
    missing = [array for array in ARRAYS if f"{path}.{array}" not in checkpoint.tensors]
    unknown = [name for name in names if name not in shapes]
    if missing or unknown:
        what = f"arrays {missing} are missing" if missing else f"the architecture has no weight {unknown[0]!r}"
        raise InputError(f"DFloat11 group {path!r}: {what}. The checkpoint does not fit its configuration.")
    tensors = {array: checkpoint.tensors[f"{path}.{array}"] for array in ARRAYS}
    for array, tensor in tensors.items():
        if tensor.dtype not in ARRAY_TYPES[array] or (array == "output_positions" and tensor.nbytes % 4):
            raise InputError(f"DFloat11 group {path!r}: {array} has type {tensor.dtype.name}. Download it again.")
    arrays = {array: tensor.numpy() for array, tensor in tensors.items()}
    positions = np.ascontiguousarray(arrays["output_positions"]).reshape(-1).view(np.uint32)
    words = decode_group(Group(**{**arrays, "output_positions": positions}), path)
    sizes = [prod(shapes[name]) for name in names]
    if sum(sizes) != words.size:
        raise InputError(
            f"DFloat11 group {path!r}: holds {words.size} weights, the architecture has {sum(sizes)} there. "
            "The checkpoint does not fit its configuration."
        )
    start = 0
    for name, size in zip(names, sizes, strict=True):
        yield name, words[start : start + size].reshape(shapes[name]).view(ir.DataType.BFLOAT16.numpy())
        start += size


def _write_shard(path: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> int:
    from safetensors import numpy as safetensors

    arrays = {name: np.ascontiguousarray(array) for name, array in tensors}
    safetensors.save_file(arrays, path, metadata={"format": "pt"})
    return sum(array.nbytes for array in arrays.values())
