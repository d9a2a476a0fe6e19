"""Opens engine folders and runs them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnxruntime as ort

from effc.errors import EngineError, MissingDependencyError, UsageError
from effc.runtime.assets import Assets
from effc.runtime.bundle import CacheLayout, CachePort, Manifest, Port, check_files, read_manifest
from effc.runtime.continuation import Generation
from effc.runtime.dialogue import Dialogue
from effc.runtime.embed import embed
from effc.runtime.generate import generate
from effc.runtime.kv_state import NUM_LOGITS, KvState, port_shape
from effc.runtime.prefix import Prefix, open_prefix, start_from
from effc.runtime.prefix_inputs import empty_inputs, prefix_ports
from effc.runtime.prompt_filter import PromptFilter
from effc.runtime.shared_weights import SharedWeights
from effc.runtime.tensors import check_feeds, storage_dtype, to_numpy, to_ort
from effc.runtime.threads import default_threads, most_threads
from effc.runtime.tokenizer import Tokenizer
from effc.runtime.write_prefix import write_prefix

PROVIDERS = {
    "ort-cpu": ("CPUExecutionProvider",),
    "ort-cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
}
"""Target name -> the execution providers its engines run on."""
FATAL = 4
"""onnxruntime's log severity that prints nothing we do not raise ourselves."""
FOLDING_LIMIT = 1 << 20
"""Bytes of a folded constant that may be computed at load where weights are to stay mapped."""


def load(
    folder: str | Path,
    *,
    threads: int | None = None,
    check: bool = True,
    providers: Sequence[str] | None = None,
    prepack: bool | None = None,
) -> Engine:
    """Open an engine folder.

    Args:
        folder: The folder `effc optimize` wrote.
        threads: Threads of one run; None for the physical cores this process may use.
        check: Compare every file with its SHA-256 in the manifest. Off, only the manifest is checked.
        providers: onnxruntime execution providers; None for those of the engine's target.
        prepack: Whether onnxruntime may transpose and copy constant matrices into its packed layout, which costs load
            time and turns mapped weights into private memory, and makes products of many rows faster. None: as the
            manifest's `config.prepack` says, else no for causal language models, yes for the rest.

    Raises:
        EngineError: The folder is damaged, of a newer format, or onnxruntime refuses its graph.
        MissingDependencyError: The kernels or an execution provider are missing.
        UsageError: `threads` is below 1 or far above the processors of this machine.
    """
    folder = Path(folder)
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}; give at least 1, or leave it out.")
    if threads is not None and threads > most_threads():
        raise UsageError(f"threads is {threads}; give at most {most_threads()} on this machine, or leave it out.")
    manifest = read_manifest(folder)
    if check:
        check_files(folder, manifest)
    chosen = _providers(folder, manifest, providers)
    shared = SharedWeights.of(folder, manifest)
    library = _kernel_library(folder) if manifest.needs_kernels else None
    options = partial(_session_options, threads or default_threads(), _prepack(manifest, prepack), library, shared)
    session = _open(folder / manifest.model, manifest, options(), chosen)
    _check_interface(folder / manifest.model, manifest, session)
    prompt_filter = _prompt_filter(folder, manifest, options(), chosen)
    return Engine(folder, manifest, session, prompt_filter=prompt_filter, shared=shared)


def _providers(folder: Path, manifest: Manifest, requested: Sequence[str] | None) -> list[str]:
    chosen = list(requested or PROVIDERS.get(manifest.target, ()))
    if not chosen:
        raise EngineError(
            f"{folder}: was built for {manifest.target!r}, which onnxruntime does not run. "
            f"Run it with that target's own tools, or build it for {' or '.join(PROVIDERS)}."
        )
    missing = [name for name in chosen if name not in ort.get_available_providers()]
    if missing:
        raise MissingDependencyError(
            f"{folder}: needs {', '.join(missing)}, and this onnxruntime has only "
            f"{', '.join(ort.get_available_providers())}. Install the onnxruntime package that has it."
        )
    return chosen


def _prepack(manifest: Manifest, requested: bool | None) -> bool:
    if requested is not None:
        return requested
    return bool(manifest.config.get("prepack", manifest.task != "causal-lm"))


def _session_options(threads: int, prepack: bool, library: str | None, shared: SharedWeights) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = FATAL
    # It would remember a plan of memory for every shape of the inputs, and that of a mask is new in every step.
    options.enable_mem_pattern = False
    if not prepack:
        # Both would copy external weights, which are then used where they are mapped. The product of a constant's
        # transpose becomes one with a transposed operand, which is no slower.
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(FOLDING_LIMIT))
    if library is not None:
        options.register_custom_ops_library(library)
    shared.add_to(options)
    return options


def _kernel_library(folder: Path) -> str:
    advice = "Install effc with its kernels, or build the engine again with --portable."
    try:
        path = Path(importlib.import_module("effc.kernels").library_path())
    except (ImportError, AttributeError, MissingDependencyError) as error:
        message = f"{folder}: needs effc's kernels, which are missing ({error}). {advice}"
        raise MissingDependencyError(message) from error
    if not path.is_file():
        raise MissingDependencyError(f"{folder}: needs effc's kernels, but {path} does not exist. {advice}")
    return str(path)


def _open(path: Path, manifest: Manifest, options: ort.SessionOptions, providers: list[str]) -> ort.InferenceSession:
    if not path.is_file():
        raise EngineError(f"{path}: is missing. Copy or build the engine again.")
    try:
        return ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's errors have no common base of their own
        built = manifest.versions.get("onnxruntime", "an unknown version")
        raise EngineError(
            f"{path}: onnxruntime {ort.__version__} refuses it: {error}. It was built for onnxruntime {built}, "
            f"opset {manifest.opset}. Upgrade onnxruntime, or build the engine again."
        ) from error


def _prompt_filter(
    folder: Path, manifest: Manifest, options: ort.SessionOptions, providers: list[str]
) -> PromptFilter | None:
    """The engine's filter, when it has one."""
    if manifest.prompt_filter is None:
        return None
    # Its threads are not to wait busily while the model runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = _open(folder / manifest.prompt_filter.model, manifest, options, providers)
    return PromptFilter(folder, manifest, session)


def _check_interface(path: Path, manifest: Manifest, session: ort.InferenceSession) -> None:
    cache = manifest.cache.ports if manifest.cache else []
    inputs = {port.name for port in manifest.inputs} | {port.input for port in cache}
    inputs |= {port.name for port in prefix_ports(manifest.cache)} if manifest.cache else set()
    outputs = {port.name for port in manifest.outputs} | {port.output for port in cache}
    for kind, listed, actual in (
        ("inputs", inputs, session.get_inputs()),
        ("outputs", outputs, session.get_outputs()),
    ):
        difference = ", ".join(sorted(listed ^ {value.name for value in actual}))
        if difference:
            raise EngineError(f"{path}: its {kind} differ from the manifest ({difference}). Build the engine again.")


class Engine:
    """An open engine. Close it, or use it in a `with` block, to release its memory at once.

    Attributes:
        folder: Where it lies.
        manifest: Its manifest.
        assets: Its text files.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        session: ort.InferenceSession,
        *,
        prompt_filter: PromptFilter | None = None,
        shared: SharedWeights | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.assets = Assets(folder, manifest.files)
        self._session: ort.InferenceSession | None = session
        self._prompt_filter = prompt_filter
        self._shared = shared

    @property
    def task(self) -> str:
        """`causal-lm`, `encoder`, `vision`, `vision-language` or `generic`."""
        return self.manifest.task

    @property
    def session(self) -> ort.InferenceSession:
        """The onnxruntime session.

        Raises:
            UsageError: The engine was closed.
        """
        if self._session is None:
            raise UsageError(f"{self.folder}: the engine was closed. Load it again.")
        return self._session

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder has a tokenizer."""
        return self.assets.path("tokenizer.json").name in self.manifest.files

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read on first use.

        Raises:
            EngineError: The folder has none, or it is damaged.
        """
        return Tokenizer(self.assets)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph once.

        Args:
            feeds: Input name -> array, exactly as the manifest describes. The inputs of the cache may all be left
                out: the run then starts from an empty cache. Fed, their length is `total - seq`; an in-place
                cache may be longer. Element types numpy lacks are fed as unsigned integers of their size or as
                ml_dtypes arrays. What only a prefix brings is always empty here.

        Returns:
            Output name -> array. The cache's outputs are among them when its inputs were fed.

        Raises:
            UsageError: The feeds do not fit; found before anything runs.
            EngineError: onnxruntime refused the run.
        """
        session = self.session
        cache = self.manifest.cache.ports if self.manifest.cache else []
        fed = [port for port in cache if port.input in feeds]
        ports = [*self.manifest.inputs, *(_as_port(port) for port in (cache if fed else []))]
        symbols = check_feeds(ports, feeds)
        if self.manifest.cache:
            _check_lengths(self.manifest.cache.mode, symbols, bool(fed))
        values = {port.name: to_ort(np.ascontiguousarray(feeds[port.name]), port.dtype) for port in ports}
        if not fed:
            values.update(_empty_cache(cache, symbols))
        if self.manifest.cache:
            values.update(_no_prefix(self.manifest.cache))
        wanted = {port.name: port.dtype for port in self.manifest.outputs}
        wanted.update({port.output: port.dtype for port in fed})
        try:
            results = session.run_with_ort_values(list(wanted), values)
        except Exception as error:  # onnxruntime's errors have no common base of their own
            raise EngineError(f"{self.folder}: the engine failed while running: {error}") from error
        return {name: to_numpy(value, dtype) for (name, dtype), value in zip(wanted.items(), results)}

    @property
    def chooses_logits(self) -> bool:
        """Whether the engine computes only the logits that are asked for."""
        return any(port.name == NUM_LOGITS for port in self.manifest.optional_inputs)

    def shortened(self, ids: Sequence[int], prefix: Prefix | None = None) -> list[int]:
        """The tokens of a prompt that the model is to read: all, or those that the engine's filter keeps.

        Args:
            ids: The prompt.
            prefix: What it follows; the filter scores the prompt as it stands there.

        Raises:
            UsageError: The engine was closed, or the prefix is of another one.
            EngineError: The filter failed while running.
        """
        prompt_filter = self._prompt_filter if self.session else None
        if prefix is not None:
            start_from(self, prefix, chat=prefix.manifest.chat)
        return list(ids) if prompt_filter is None else prompt_filter.shortened(ids, prefix)

    def cache_layout(self) -> CacheLayout:
        """How it carries its cache.

        Raises:
            EngineError: It has none.
        """
        if self.manifest.cache is None:
            raise EngineError(
                f"{self.folder}: carries no cache, so it cannot generate. Build it from a model exported with a cache."
            )
        return self.manifest.cache

    def new_state(self, batch: int, *, max_length: int | None = None) -> KvState:
        """An empty cache for a batch, to run the engine step by step.

        Args:
            batch: Rows.
            max_length: Most tokens it will hold, padding included; None for no bound.

        Raises:
            EngineError: The engine carries no cache.
        """
        layout = self.cache_layout()
        device = "cuda" if "CUDAExecutionProvider" in self.session.get_providers() else "cpu"
        return KvState(self.session, layout, self.manifest.inputs, batch, max_length=max_length, device=device)

    def embed(self, texts: Sequence[str], batch_size: int = 32, normalize: bool | None = None) -> np.ndarray:
        """One vector per text; see `effc.runtime.embed.embed`."""
        return embed(self, texts, batch_size=batch_size, normalize=normalize)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        stream: Callable[[int, str], None] | None = None,
        chat: bool = False,
        prefill_chunk: int | None = None,
        prefix: str | Path | Prefix | None = None,
        filter_prompt: bool = True,
    ) -> list[Generation]:
        """Continue prompts; see `effc.runtime.generate.generate`."""
        return generate(
            self,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            stream=stream,
            chat=chat,
            prefill_chunk=prefill_chunk,
            prefix=prefix,
            filter_prompt=filter_prompt,
        )

    def dialogue(
        self,
        *,
        decay: float = 0.9,
        chat: bool = False,
        system: str | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Dialogue:
        """A dialogue whose turns go on from one cache; see `effc.runtime.dialogue.Dialogue`."""
        return Dialogue(
            self,
            decay=decay,
            chat=chat,
            system=system,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )

    def write_prefix(
        self,
        prefix: str | Sequence[int],
        output: str | Path,
        *,
        chat: bool = False,
        keep: float | None = None,
        cluster_tokens: int | None = None,
        rank: int | None = None,
        outliers: int | None = None,
        prefill_chunk: int | None = None,
    ) -> dict[str, Any]:
        """Compute the beginning of prompts once; see `effc.runtime.write_prefix.write_prefix`."""
        return write_prefix(
            self,
            prefix,
            output,
            chat=chat,
            keep=keep,
            cluster_tokens=cluster_tokens,
            rank=rank,
            outliers=outliers,
            prefill_chunk=prefill_chunk,
        )

    def open_prefix(self, folder: str | Path, *, check: bool = True) -> Prefix:
        """Map a prefix, to start from it several times; see `effc.runtime.prefix.open_prefix`."""
        return open_prefix(self, folder, check=check)

    def close(self) -> None:
        """Release the sessions; using the engine afterwards is an error, closing it again is not."""
        self._session = self._prompt_filter = None
        self._shared = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_port(port: CachePort) -> Port:
    return Port(port.input, port.dtype, port.shape)


def _check_lengths(mode: str, symbols: Mapping[str, int], fed: bool) -> None:
    """`total = past + seq`; an in-place buffer may be longer than what it holds."""
    if "total" not in symbols or "seq" not in symbols:
        return
    past = symbols["total"] - symbols["seq"]
    given = symbols.get("past", 0 if not fed else past)
    if past < 0 or (given < past if mode == "in-place" else given != past):
        raise UsageError(
            f"the attention mask covers {symbols['total']} tokens, but {symbols['seq']} are new and {given} are "
            "cached. Feed a mask of past + seq tokens."
        )
    for symbol, pages in symbols.items():
        page = int(symbol.partition("//")[2] or 0)
        if page and pages < past // page:
            raise UsageError(
                f"{past} tokens are cached, which may fill {past // page} pages of {page}, but the cache has room for "
                f"{pages}. Feed the cache that the last run gave."
            )


def _no_prefix(layout: CacheLayout) -> dict[str, ort.OrtValue]:
    empty = empty_inputs(layout)
    return {port.name: to_ort(empty[port.name], port.dtype) for port in prefix_ports(layout)}


def _empty_cache(cache: Sequence[CachePort], symbols: Mapping[str, int]) -> dict[str, ort.OrtValue]:
    batch = symbols.get("batch", 1)
    return {
        port.input: to_ort(np.zeros(port_shape(port, batch, 0), storage_dtype(port.dtype)), port.dtype)
        for port in cache
    }
