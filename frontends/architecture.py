"""Which transformers class a configuration stands for, and what task it serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effc.errors import InputError, UsageError
from effc.frontends.environment import require
from effc.ir.program import Task

BASE_ONLY = ("ForMaskedLM", "ForPreTraining", "LMHeadModelForMasked", "ForNextSentencePrediction")


@dataclass(frozen=True)
class Architecture:
    """A model class with the configuration to build it from.

    Attributes:
        model_class: The transformers class.
        config: The configuration that class takes (for one tower of a pair, that tower's).
        task: What it is for.
        encoder_only: Build the class, then import its encoder alone.
        notes: What was decided, one sentence each.
    """

    model_class: Any
    config: Any
    task: Task
    encoder_only: bool = False
    notes: tuple[str, ...] = ()


def load_config(folder: Path, content: Mapping[str, Any]) -> Any:
    """The transformers configuration object of a folder.

    Raises:
        InputError: The model type is unknown or needs code from the folder, which effc never runs.
    """
    require("transformers", "Importing a Hugging Face model")
    from transformers import AutoConfig

    if "quantization_config" in content:
        method = (content["quantization_config"] or {}).get("quant_method", "unknown method")
        raise InputError(
            f"{folder / 'config.json'}: the checkpoint is already quantized ({method}). "
            "Import the unquantized model; effc quantizes in its passes."
        )
    model_type = content.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{folder / 'config.json'}: has no `model_type`, so the architecture is unknown.")
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        remote = " It points to code of its own (`auto_map`), which effc never runs." if "auto_map" in content else ""
        raise InputError(
            f"{folder / 'config.json'}: model type {model_type!r} cannot be configured "
            f"({type(error).__name__}: {str(error)[:200]}).{remote} Check the file, or upgrade transformers."
        ) from error


def choose(config: Any, task: Task | None, where: str) -> Architecture:
    """Pick the class and the task of a configuration.

    Rules, first match wins: a pair of towers (CLIP, SigLIP) gives its image tower, its text tower with
    `task="encoder"`; an encoder-decoder gives its encoder; a class for causal language modelling gives a causal
    LM; a class whose main input is pixels gives a vision model; anything else is an encoder. Heads for masked
    tokens are dropped, heads for classification are kept.

    Raises:
        InputError: The architecture is unknown.
        UsageError: The task asked for does not fit it.
    """
    transformers = require("transformers", "Importing a Hugging Face model")
    name = _class_name(config, where)
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise InputError(f"{where}: architecture {name!r} is unknown to transformers {transformers.__version__}.")
    if _is_pair(name, config):
        return _tower(transformers, name, config, task, where)
    if getattr(config, "is_encoder_decoder", False):
        return _encoder_of_pair(transformers, config, task, where)
    if name in _causal_names() or task is Task.CAUSAL_LM:
        return _causal(model_class, config, task, where)
    return _encoder(transformers, model_class, config, task, where)


def _class_name(config: Any, where: str) -> str:
    names = getattr(config, "architectures", None) or []
    if names and isinstance(names[0], str):
        return names[0]
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    mapped = MODEL_MAPPING_NAMES.get(config.model_type) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if mapped is None:
        raise InputError(f"{where}: names no architecture and model type {config.model_type!r} has no default one.")
    return mapped if isinstance(mapped, str) else mapped[0]


def _causal_names() -> set[str]:
    from transformers.models.auto import modeling_auto as auto

    names: set[str] = set()
    for table in (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for value in table.values():
            names.update([value] if isinstance(value, str) else value)
    return names


def _causal(model_class: Any, config: Any, task: Task | None, where: str) -> Architecture:
    if task not in (None, Task.CAUSAL_LM):
        raise UsageError(f"{where}: {model_class.__name__} is a causal language model, not {task}.")
    if model_class.__name__ not in _causal_names():
        raise UsageError(f"{where}: {model_class.__name__} is no causal language model.")
    notes: tuple[str, ...] = ()
    if getattr(config, "vision_config", None) is not None:
        notes = (f"{model_class.__name__} is imported as a text decoder; its image tower is left out.",)
    return Architecture(model_class, config, Task.CAUSAL_LM, notes=notes)


def _encoder(transformers: Any, model_class: Any, config: Any, task: Task | None, where: str) -> Architecture:
    notes: tuple[str, ...] = ()
    if model_class.__name__.endswith(BASE_ONLY):
        base = _class_name(_without_architectures(config), where)
        notes = (f"{model_class.__name__} is imported as {base}: the head for masked tokens is left out.",)
        model_class = getattr(transformers, base)
    actual = Task.VISION if model_class.main_input_name == "pixel_values" else Task.ENCODER
    if task not in (None, actual, Task.GENERIC):
        raise UsageError(f"{where}: {model_class.__name__} serves the task {actual}, not {task}.")
    return Architecture(model_class, config, actual, notes=notes)


def _without_architectures(config: Any) -> Any:
    plain = type(config).from_dict(config.to_dict())
    plain.architectures = None
    return plain


def _is_pair(name: str, config: Any) -> bool:
    towers = getattr(config, "text_config", None) is not None and getattr(config, "vision_config", None) is not None
    return towers and name.endswith("Model") and name not in _causal_names()


def _tower(transformers: Any, name: str, config: Any, task: Task | None, where: str) -> Architecture:
    if task not in (None, Task.VISION, Task.ENCODER):
        raise UsageError(f"{where}: {name} has an image tower (vision) and a text tower (encoder), no {task}.")
    kind = "Text" if task is Task.ENCODER else "Vision"
    stem = name.removesuffix("Model")
    for candidate in (f"{stem}{kind}ModelWithProjection", f"{stem}{kind}Model"):
        if hasattr(transformers, candidate):
            sub = config.text_config if kind == "Text" else config.vision_config
            other = "" if kind == "Text" else " The text tower comes with task='encoder'."
            notes = (f"{name} has two towers; this is the {kind.lower()} one, {candidate}.{other}",)
            return Architecture(getattr(transformers, candidate), sub, task or Task.VISION, notes=notes)
    raise InputError(f"{where}: {name} has two towers, and transformers has no class for its {kind.lower()} one.")


def _encoder_of_pair(transformers: Any, config: Any, task: Task | None, where: str) -> Architecture:
    if task not in (None, Task.ENCODER):
        raise UsageError(f"{where}: is an encoder-decoder; its encoder can be imported (encoder), not {task}.")
    base = _class_name(_without_architectures(config), where)
    notes = (f"{base} is an encoder-decoder; this is its encoder.",)
    return Architecture(getattr(transformers, base), config, Task.ENCODER, encoder_only=True, notes=notes)
