"""The engine folder: what `effc.json` says, how a folder is read and checked.

Layout of a folder, format version 1:

    effc.json              this manifest
    model.onnx             the graph
    prompt_filter.onnx     the graph that scores the tokens of a prompt, when the engine shortens prompts
    weights.bin            external data of the graphs, every tensor aligned for mmap
    tokenizer.json, tokenizer_config.json, generation_config.json, …   when the model has them
    report.html            what was done and measured
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from effc.errors import EngineError

FORMAT = "effc-engine"
VERSION = 1
MANIFEST = "effc.json"
MANIFEST_LIMIT = 64 << 20
HASH_CHUNK = 1 << 20
TEXTS = frozenset({".json", ".xz", ".jinja", ".txt", ".html", ".model"})
"""Suffixes of files that do not decide what an engine computes from token ids."""


@dataclass(frozen=True)
class Port:
    """An input or output of the graph: name, numpy dtype name, shape of ints and symbol names."""

    name: str
    dtype: str
    shape: list[int | str]


@dataclass(frozen=True)
class CachePort:
    """One tensor of cache state.

    Attributes:
        input: Graph input that takes the past.
        output: Graph output that carries it on.
        dtype: Numpy dtype name.
        shape: Ints and symbol names. The axis called `past` (tokens) or `past // P` (whole pages of P tokens) grows
            (`growing`) or is a capacity (`in-place`). A tensor without one has all the places it will ever need.
    """

    input: str
    output: str
    dtype: str
    shape: list[int | str]


@dataclass(frozen=True)
class ClusterPorts:
    """The inputs that bring the clusters of a prefix to one attention, and what they are made of.

    Attributes:
        key: Cache input of its keys.
        value: Cache input of its values.
        queries: Cache input of its last queries.
        dtype: Numpy dtype name of the keys.
        scale: Factor on the scores.
        softcap: Softcap of the scores; 0: none.
        inputs: `centroids`, `ends`, `radii`, `parents`, `parent_ends`, `parent_radii` and `thresholds`, in this order.
            Their axes `clusters` and `parents` are 0 without a prefix. Attentions share the input of the thresholds.
    """

    key: str
    value: str
    queries: str
    dtype: str
    scale: float
    softcap: float
    inputs: list[Port]


@dataclass(frozen=True)
class SharedWeight:
    """A tensor of a weight file that others than its graph read where it lies.

    Attributes:
        name: Initializer in every graph that has it.
        dtype: Numpy dtype name.
        shape: Its shape.
        offset: Where it begins in `file`.
        file: File name.
    """

    name: str
    dtype: str
    shape: list[int]
    offset: int
    file: str


@dataclass(frozen=True)
class LowRankPorts:
    """The inputs that bring a prefix of low rank to one attention, and what it is made of.

    Attributes:
        key: Cache input of its keys.
        value: Cache input of its values.
        dtype: Numpy dtype name of the keys.
        chunk: Tokens of a chunk.
        rotary: How keys are rotated: `none`, `half` or `interleaved`.
        angles: Cosines and sines float32 [1, positions, elements / 2] that rotate them; empty with `none`.
        inputs: `tokens`, `basis`, `values`, `landmarks`, `outliers` and `outlier_keys`, in this order. Their axes
            `prefix`, `rank`, `chunks` and `outliers` are 0 without a prefix.
    """

    key: str
    value: str
    dtype: str
    chunk: int
    rotary: str
    angles: list[SharedWeight]
    inputs: list[Port]


@dataclass(frozen=True)
class CacheLayout:
    """How the engine carries its KV cache.

    Attributes:
        mode: `in-place`: input and output are bound to one buffer of any capacity along `past`, and the true
            length is `attention_mask.shape[1] - input_ids.shape[1]`; a step appends without copying.
            `growing`: the output is `past + seq` long and becomes the next input.
        ports: The tensors, in graph order.
        layers: For each attention of ours, what one row takes: `site`, `storage`, `bits` and `bits_with_parameters`
            of an element, and at `tokens` tokens `bytes`, `bytes_of_codes` and `dense_bytes` (bfloat16).
        endless: Whether no attention ever meets a position beyond a fixed one, so that any number of tokens will do.
        clusters: For each attention that reads clusters of a prefix, the inputs that bring them.
        low_rank: For each attention that reads a prefix of low rank, the inputs that bring it.
        longest_step: Most new tokens of a row in one run; None: any number.
    """

    mode: str
    ports: list[CachePort] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    endless: bool = False
    clusters: list[ClusterPorts] = field(default_factory=list)
    low_rank: list[LowRankPorts] = field(default_factory=list)
    longest_step: int | None = None


@dataclass(frozen=True)
class PromptFilter:
    """How the engine shortens prompts.

    Attributes:
        model: File name of a graph over the same weights. It takes inputs of the model and gives `prompt_scores`
            float32 [batch, seq].
        layer: Layer that scores, from 0.
        layers: Layers of the model.
        keep: Tokens that stay of a longer prompt.
        forced: Tokens at its end that stay in any case, and then its first one too; 0: none.
        weights: Coded weights of the graph.
    """

    model: str
    layer: int
    layers: int
    keep: int
    forced: int
    weights: list[SharedWeight] = field(default_factory=list)


@dataclass(frozen=True)
class Manifest:
    """The content of `effc.json`; every key is stable within a format version.

    Attributes:
        effc_version: Version that wrote the engine.
        task: `causal-lm`, `encoder`, `vision`, `vision-language` or `generic`.
        target: Backend name, `ort-cpu` for example.
        portable: Whether the graph holds standard ops only.
        needs_kernels: Whether loading needs the custom-op library.
        model: File name of the graph.
        inputs: Inputs that are not cache and must be fed.
        outputs: Outputs that are not cache.
        cache: Cache layout, or None.
        pipeline: Pipeline text that was run.
        passes: Pass records: name, options, contract, rewritten, left, details, measured, seconds.
        source: Kind, name, content hash, weight bytes and notes of the model this engine was made from.
        config: The model's own configuration; the runtime reads vocabulary size, limits and special ids.
        bytes: Sizes: `source`, `engine`, `weights_stored`, `weights_memory`.
        versions: Versions of the tools that wrote it.
        opset: Opset of the graph.
        ir_version: ONNX IR version of the graph.
        files: File name -> {`bytes`, `sha256`} of every other file in the folder.
        optional_inputs: Inputs with a default: `num_logits` int64 [1], how many of the last tokens get logits (all).
        prompt_filter: How prompts are shortened, or None.
    """

    effc_version: str
    task: str
    target: str
    portable: bool
    needs_kernels: bool
    model: str
    inputs: list[Port]
    outputs: list[Port]
    cache: CacheLayout | None
    pipeline: str
    passes: list[dict[str, Any]]
    source: dict[str, Any]
    config: dict[str, Any]
    bytes: dict[str, int]
    versions: dict[str, str]
    opset: int
    ir_version: int
    files: dict[str, dict[str, Any]]
    optional_inputs: list[Port] = field(default_factory=list)
    prompt_filter: PromptFilter | None = None

    @property
    def shared_weights(self) -> list[SharedWeight]:
        """Tensors of weight files that the runtime reads itself."""
        layers = self.cache.low_rank if self.cache is not None else []
        filtering = self.prompt_filter.weights if self.prompt_filter is not None else []
        return [*filtering, *(table for layer in layers for table in layer.angles)]

    @property
    def models(self) -> list[str]:
        """File names of its graphs."""
        return [self.model, *([self.prompt_filter.model] if self.prompt_filter is not None else [])]

    def to_json(self) -> str:
        """The manifest as the text of `effc.json`."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1, ensure_ascii=False)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check `effc.json` of an engine folder, without looking at the other files.

    Raises:
        EngineError: Not an engine folder, damaged, or written in a newer format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise EngineError(f"{folder}: is not an engine folder, it has no {MANIFEST}. Make one with `effc optimize`.")
    return _parse(path, read_versioned(path, FORMAT, VERSION, "an effc engine", "Build the engine again."))


def read_versioned(path: Path, form: str, version: int, what: str, again: str) -> dict[str, Any]:
    """The JSON object of a manifest that names its format.

    Args:
        path: The manifest, which exists.
        form: What its key `format` must say.
        version: What its key `version` must say.
        what: What it is a manifest of, for messages.
        again: How to make another, for messages.

    Raises:
        EngineError: It is damaged, of another format or version.
    """
    if path.stat().st_size > MANIFEST_LIMIT:
        raise EngineError(f"{path}: is larger than {MANIFEST_LIMIT >> 20} MiB, which no manifest is. {again}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{path}: is damaged ({error}). {again}") from error
    if not isinstance(content, dict) or content.get("format") != form:
        raise EngineError(f"{path}: is not a manifest of {what}. {again}")
    if content.get("version") != version:
        raise EngineError(
            f"{path}: has format version {content.get('version')!r}, this effc reads {version}. "
            f"Upgrade effc, or do this: {again}"
        )
    return content


LATER_KEYS = ("optional_inputs", "prompt_filter")
"""Keys that engines of this format version may lack."""


def _parse(path: Path, content: Mapping[str, Any]) -> Manifest:
    try:
        values = {item.name: content[item.name] for item in fields(Manifest) if item.name not in LATER_KEYS}
        values["inputs"] = _ports(values["inputs"])
        values["optional_inputs"] = _ports(content.get("optional_inputs", []))
        values["outputs"] = _ports(values["outputs"])
        if values["cache"] is not None:
            values["cache"] = _parse_cache(values["cache"])
        values["prompt_filter"] = _prompt_filter(content.get("prompt_filter"))
        manifest = Manifest(**values)
        for name in (*manifest.models, *manifest.files):
            check_name(path, name)
        for weight in manifest.shared_weights:
            if weight.file not in manifest.files:
                raise EngineError(f"{path}: weight {weight.name!r} lies in {weight.file!r}, which is no file of it.")
        return manifest
    except (KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{path}: a key is missing or malformed ({error}). Build the engine again.") from error


def _parse_cache(content: Mapping[str, Any]) -> CacheLayout:
    ports = [CachePort(**port) for port in content["ports"]]
    clusters = [ClusterPorts(**{**one, "inputs": _ports(one["inputs"])}) for one in content.get("clusters", [])]
    low_rank = [
        LowRankPorts(**{**one, "angles": _shared_weights(one["angles"]), "inputs": _ports(one["inputs"])})
        for one in content.get("low_rank", [])
    ]
    return CacheLayout(**{**content, "ports": ports, "clusters": clusters, "low_rank": low_rank})


def _ports(content: Sequence[Mapping[str, Any]]) -> list[Port]:
    return [Port(**port) for port in content]


def _prompt_filter(content: Mapping[str, Any] | None) -> PromptFilter | None:
    if content is None:
        return None
    found = PromptFilter(**{**content, "weights": _shared_weights(content["weights"])})
    if not 0 <= found.forced < found.keep:
        raise TypeError(f"keep is {found.keep} and forced {found.forced}")
    return found


def _shared_weights(content: Sequence[Mapping[str, Any]]) -> list[SharedWeight]:
    found = [SharedWeight(**weight) for weight in content]
    for weight in found:
        if not all(isinstance(number, int) and number >= 0 for number in (weight.offset, *weight.shape)):
            raise TypeError(f"weight {weight.name!r} has the shape {weight.shape} and the offset {weight.offset!r}")
    return found


def check_name(path: Path, name: str) -> None:
    """Refuse a file name, found in the manifest `path`, that is not one of a file right beside it.

    Raises:
        EngineError: It has a folder in it, or leaves the folder.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or len(pure.parts) != 1 or ".." in pure.parts or "\\" in name:
        raise EngineError(f"{path}: file name {name!r} leaves its folder. Do not use it.")


def numbers_hash(manifest: Manifest) -> str:
    """SHA-256 over what decides the numbers of an engine: the graph and its weights, not tokenizer, texts or report."""
    names = sorted(name for name in manifest.files if Path(name).suffix not in TEXTS)
    lines = [f"{name} {manifest.files[name].get('sha256')}\n" for name in names]
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare size and SHA-256 of every file with the manifest.

    Raises:
        EngineError: A file is missing, is a link, or has other bytes than were written.
    """
    for name in manifest.models:
        if name not in manifest.files:
            raise EngineError(f"{folder / MANIFEST}: has no hash for {name}. Build the engine again.")
    for name, expected in manifest.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise EngineError(f"{path}: is missing or not a plain file. Copy or build the engine again.")
        if path.stat().st_size != expected.get("bytes") or sha256_file(path) != expected.get("sha256"):
            raise EngineError(f"{path}: its bytes are not those that were written. Copy or build the engine again.")
