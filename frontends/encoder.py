"""Encoders: tokens (or audio features) in, hidden states and, for classifiers, logits out."""

from __future__ import annotations

import inspect
from typing import Any

from effc.errors import InputError
from effc.frontends.environment import require
from effc.frontends.interface import Interface
from effc.frontends.sizes import BATCH, SEQ
from effc.ir.program import Task

EXAMPLE_BATCH, EXAMPLE_SEQ = 2, 3


def encoder_interface(model: Any) -> Interface:
    """The interface of a text or audio encoder; of an encoder-decoder model, that of its encoder.

    Inputs: input_ids, attention_mask, token_type_ids (when the model has them), int64[batch,seq];
    or input_features float32[batch, mel bins, frames] for audio.
    Outputs: last_hidden_state float32[batch,seq,hidden]; a model with a head gives logits instead.

    Raises:
        InputError: The model needs other inputs, or gives no known output.
    """
    torch: Any = require("torch", "Importing an encoder")
    if model.main_input_name in ("input_features", "input_values"):
        return _audio_interface(model)
    names = ["input_ids", "attention_mask"]
    if takes_token_types(model):
        names.append("token_type_ids")
    inputs = {
        name: torch.full((EXAMPLE_BATCH, EXAMPLE_SEQ), int(name == "attention_mask"), dtype=torch.int64)
        for name in names
    }
    axes = tuple({0: BATCH, 1: SEQ} for _ in names)
    return _interface(Task.ENCODER, model, inputs, axes)


def takes_token_types(model: Any) -> bool:
    """Whether the model distinguishes more than one segment."""
    types = getattr(model.config, "type_vocab_size", 0) or 0
    return "token_type_ids" in inspect.signature(model.forward).parameters and types > 0


def _audio_interface(model: Any) -> Interface:
    torch: Any = require("torch", "Importing an encoder")
    bins = model.config.num_mel_bins
    frames = 2 * getattr(model.config, "max_source_positions", 1500)
    inputs = {"input_features": torch.zeros(EXAMPLE_BATCH, bins, frames)}
    return _interface(Task.ENCODER, model, inputs, ({0: BATCH},))


def _interface(task: Task, model: Any, inputs: dict[str, Any], axes: Any) -> Interface:
    outputs = produced(model, inputs)
    return Interface(
        task, wrap(model, tuple(inputs), outputs), inputs, axes, outputs, variadic=len(inputs)
    )


def produced(model: Any, inputs: dict[str, Any]) -> tuple[str, ...]:
    """Which of last_hidden_state, logits, image_embeds, text_embeds the model returns, found on fake tensors."""
    torch: Any = require("torch", "Importing an encoder")
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            output = model(**{name: torch.empty_like(tensor) for name, tensor in inputs.items()})
    except Exception as error:
        raise InputError(
            f"{type(model).__name__}: does not run on {', '.join(inputs)} alone ({type(error).__name__}: "
            f"{str(error)[:200]}). Export it with the inputs it needs and pass the ExportedProgram."
        ) from error
    candidates = ("last_hidden_state", "logits", "image_embeds", "text_embeds")
    found = tuple(name for name in candidates if getattr(output, name, None) is not None)
    if not found:
        raise InputError(
            f"{type(model).__name__}: returns none of {', '.join(candidates)}. "
            "Export it with the outputs you need and pass the ExportedProgram."
        )
    return found


def wrap(model: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Any:
    """A module with positional inputs that returns the named outputs as a tuple."""
    torch: Any = require("torch", "Importing an encoder")

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            output = self.model(**dict(zip(inputs, tensors, strict=True)))
            return tuple(getattr(output, name) for name in outputs)

    return Encoder()
