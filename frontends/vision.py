"""Image models: pixels in, hidden states, embeddings or logits out."""

from __future__ import annotations

from typing import Any

from effc.errors import InputError
from effc.frontends.encoder import produced, wrap
from effc.frontends.environment import require
from effc.frontends.interface import Interface
from effc.frontends.sizes import BATCH
from effc.ir.program import Task

EXAMPLE_BATCH = 2


def vision_interface(model: Any) -> Interface:
    """The interface of an image model.

    Input: pixel_values float32[batch, channels, height, width], batch dynamic, the image size from the configuration.
    Outputs: those of last_hidden_state, logits, image_embeds the model gives.
    """
    torch: Any = require("torch", "Importing an image model")
    height, width = image_size(model)
    channels = getattr(model.config, "num_channels", 3)
    inputs = {"pixel_values": torch.zeros(EXAMPLE_BATCH, channels, height, width)}
    outputs = produced(model, inputs)
    wrapper = wrap(model, tuple(inputs), outputs)
    return Interface(Task.VISION, wrapper, inputs, ({0: BATCH},), outputs, variadic=1)


def image_size(model: Any) -> tuple[int, int]:
    """Height and width the model was made for.

    Raises:
        InputError: The configuration does not say.
    """
    size = getattr(model.config, "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    if size is None and type(model).__name__.startswith(("ResNet", "ConvNext", "RegNet", "MobileNet")):
        return 224, 224
    raise InputError(
        f"{type(model).__name__}: its configuration has no image_size. Add it to config.json, "
        "or export the model with example inputs and pass the ExportedProgram."
    )
