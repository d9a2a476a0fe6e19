"""One vector per text from an encoder: tokenize, run in batches of similar length, pool, normalise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from effc.errors import EngineError, UsageError
from effc.runtime import limits

if TYPE_CHECKING:
    from effc.runtime.session import Engine

POOLING_FILE = "1_Pooling_config.json"
"""Where the engine keeps the `config.json` of sentence-transformers' pooling module."""
POOLED_OUTPUT, HIDDEN_OUTPUT = "sentence_embedding", "last_hidden_state"
MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Flags of a pooling configuration, in the order sentence-transformers joins their vectors, and the modes' names."""


@dataclass(frozen=True)
class EmbeddingPlan:
    """How an engine's texts become vectors.

    Attributes:
        output: The graph output that is used.
        modes: Pooling modes, their vectors are joined; empty when the output is one vector a text already.
        normalize: Whether vectors get length 1; None when the model does not say.
        max_length: Longest input in tokens, or None.
        lower: Whether texts are lower-cased first.
    """

    output: str
    modes: tuple[str, ...]
    normalize: bool | None
    max_length: int | None
    lower: bool


def embed(engine: Engine, texts: Sequence[str], *, batch_size: int = 32, normalize: bool | None = None) -> np.ndarray:
    """Embed texts.

    Args:
        engine: An engine of task `encoder` with a tokenizer.
        texts: Any number of texts; one longer than the model's limit is cut.
        batch_size: Texts in one run. It changes the result by rounding only.
        normalize: Whether vectors get length 1; None does what the model's `modules.json` says, and
            normalises where there is none.

    Returns:
        float32[len(texts), dim], in the order of the texts; float32[0, 0] for no texts when the size is unknown.

    Raises:
        UsageError: The task does not embed, `batch_size` is below 1, or `texts` is no list of strings.
        EngineError: The engine has no tokenizer, or needs a module this runtime does not have.
    """
    _check_request(engine, texts, batch_size)
    plan = embedding_plan(engine)
    if normalize is None:
        normalize = plan.normalize is not False
    if not texts:
        return np.zeros((0, _dimension(engine, plan)), np.float32)
    prepared = [text.lower() for text in texts] if plan.lower else list(texts)
    encoded = engine.tokenizer.encode_batch(prepared, plan.max_length)
    # Similar lengths together: little padding. The longest first, so that memory is at its peak at once.
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index][0]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    vectors = np.concatenate([_embed_batch(engine, plan, [encoded[index] for index in batch]) for batch in batches])
    result = np.empty_like(vectors)
    result[order] = vectors
    return unit_length(result) if normalize else result


def _check_request(engine: Engine, texts: Sequence[str], batch_size: int) -> None:
    if engine.task != "encoder":
        raise UsageError(f"{engine.folder}: its task is {engine.task}, only encoder engines embed texts.")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; give at least 1.")
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise UsageError("texts must be a list of strings.")


def embedding_plan(engine: Engine) -> EmbeddingPlan:
    """Read the plan from the engine's files.

    Raises:
        EngineError: No output can be pooled, or a module or pooling mode is unknown.
    """
    normalize = _module_normalize(engine)
    sentence = engine.assets.json_object("sentence_bert_config.json")
    output = _output(engine)
    modes = () if output == POOLED_OUTPUT else pooling_modes(engine.assets.json_object(POOLING_FILE))
    candidates = (
        sentence.get("max_seq_length"),
        engine.tokenizer.max_length,
        limits.position_limit(engine.manifest.config),
    )
    lengths = [value for value in candidates if isinstance(value, int) and value > 0]
    return EmbeddingPlan(output, modes, normalize, min(lengths, default=None), bool(sentence.get("do_lower_case")))


def _module_normalize(engine: Engine) -> bool | None:
    modules = engine.assets.json("modules.json")
    if not isinstance(modules, list):
        return None
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise EngineError(
            f"{engine.assets.path('modules.json')}: has the module {unknown[0]}, which embed does not apply. "
            "Use `run` and apply it yourself."
        )
    return "Normalize" in kinds


def _output(engine: Engine) -> str:
    shapes = {port.name: port.shape for port in engine.manifest.outputs}
    for name in (POOLED_OUTPUT, HIDDEN_OUTPUT):
        if name in shapes:
            return name
    hidden = [name for name, shape in shapes.items() if len(shape) == 3]
    if len(hidden) != 1:
        raise EngineError(
            f"{engine.folder}: gives {', '.join(shapes)}; embedding needs {HIDDEN_OUTPUT} or {POOLED_OUTPUT}. "
            "Use `run`."
        )
    return hidden[0]


def pooling_modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Pooling modes of a sentence-transformers pooling configuration; `mean` for an empty one.

    Raises:
        EngineError: A mode is unknown.
    """
    modes = tuple(mode for flag, mode in MODES.items() if config.get(flag))
    if not modes and config.get("pooling_mode"):
        named = config["pooling_mode"]
        modes = (named,) if isinstance(named, str) else tuple(named)
    unknown = [mode for mode in modes if mode not in MODES.values()]
    unknown += [key for key in config if key.startswith("pooling_mode_") and config[key] and key not in MODES]
    if unknown:
        raise EngineError(f"{POOLING_FILE}: the pooling mode {unknown[0]!r} is unknown. Use `run` and pool yourself.")
    return modes or ("mean",)


def _dimension(engine: Engine, plan: EmbeddingPlan) -> int:
    shape = next(port.shape for port in engine.manifest.outputs if port.name == plan.output)
    return shape[-1] * max(1, len(plan.modes)) if isinstance(shape[-1], int) else 0


def _embed_batch(engine: Engine, plan: EmbeddingPlan, encoded: Sequence[tuple[list[int], list[int]]]) -> np.ndarray:
    """Vectors float32[batch, dim] of one batch, not normalised."""
    width = max(1, max(len(ids) for ids, _ in encoded))
    ids = np.full((len(encoded), width), _pad_id(engine), np.int64)
    types, mask = np.zeros_like(ids), np.zeros_like(ids)
    for row, (tokens, kinds) in enumerate(encoded):
        ids[row, : len(tokens)], types[row, : len(kinds)], mask[row, : len(tokens)] = tokens, kinds, 1
    known = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": types,
        "position_ids": np.broadcast_to(np.arange(width), ids.shape),
    }
    feeds = {port.name: known[port.name].astype(port.dtype) for port in _known_inputs(engine, known)}
    output = engine.run(feeds)[plan.output].astype(np.float32, copy=False)
    return pool(output, mask.astype(bool), plan.modes) if plan.modes else output


def _pad_id(engine: Engine) -> int:
    special = engine.tokenizer.special_id("pad_token")
    return limits.pad_id(engine.manifest.config, engine.assets) if special is None else special


def _known_inputs(engine: Engine, known: Mapping[str, np.ndarray]) -> list[Any]:
    unknown = [port.name for port in engine.manifest.inputs if port.name not in known]
    if unknown:
        raise EngineError(f"{engine.folder}: has the input {unknown[0]!r}, which embed cannot fill. Use `run`.")
    return engine.manifest.inputs


def pool(hidden: np.ndarray, mask: np.ndarray, modes: Sequence[str]) -> np.ndarray:
    """Pool token vectors (Reimers and Gurevych 2019, section 3, and the later modes of sentence-transformers).

    Args:
        hidden: float32[batch, seq, dim]; what it holds at padding does not matter.
        mask: bool[batch, seq], True at tokens.
        modes: Of `MODES`; the vectors of several are joined.

    Returns:
        float32[batch, dim * len(modes)]; a row without tokens gives zeros.
    """
    clean = np.where(mask[:, :, None], hidden, np.float32(0))
    counts = np.maximum(mask.sum(axis=1, keepdims=True), 1).astype(np.float32)
    return np.concatenate([_pool_one(clean, mask, counts, mode) for mode in modes], axis=1)


def _pool_one(clean: np.ndarray, mask: np.ndarray, counts: np.ndarray, mode: str) -> np.ndarray:
    if mode == "cls":
        return clean[:, 0]
    if mode == "lasttoken":
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
        return clean[np.arange(len(clean)), last]
    if mode == "max":
        floor = np.where(mask[:, :, None], clean, np.float32(-np.inf)).max(axis=1)
        return np.where(mask.any(axis=1, keepdims=True), floor, np.float32(0))
    if mode == "weightedmean":
        weights = mask * np.arange(1, mask.shape[1] + 1, dtype=np.float32)
        total = np.maximum(weights.sum(axis=1, keepdims=True), 1)
        return (clean * weights[:, :, None]).sum(axis=1) / total
    return clean.sum(axis=1) / (counts if mode == "mean" else np.sqrt(counts))


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to Euclidean length 1; a zero row stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.float32(1e-12))
