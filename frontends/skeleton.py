"""A transformers model without its weights: real buffers, parameters that are reserved but never touched."""

from __future__ import annotations

import re
from typing import Any

from effc.errors import InputError
from effc.frontends.environment import require

_SDPA_MISSING = re.compile(r"does not support an attention implementation|scaled_dot_product_attention")


def build(model_class: Any, config: Any, attention: str = "sdpa") -> tuple[Any, tuple[str, ...]]:
    """Build a model in float32 for tracing, with fused attention (`sdpa`) or separate products (`eager`).

    Parameters are allocated and left uninitialised, so the system reserves their memory and commits none of it;
    buffers (inverse frequencies, scales) are computed as usual.

    Returns:
        The model in evaluation mode, and notes.

    Raises:
        InputError: The configuration does not make a model.
    """
    torch: Any = require("torch", "Building a model")
    from transformers.initialization import no_init_weights

    notes: tuple[str, ...] = ()
    with no_init_weights(), torch.no_grad():
        try:
            model = _from_config(model_class, config, attention)
        except (ValueError, ImportError) as error:
            if not _SDPA_MISSING.search(str(error)):
                raise _unusable(model_class, error) from error
            model = _from_config(model_class, config, "eager")
            notes = (f"{model_class.__name__} has no fused attention; its attention is exported as separate products.",)
        except Exception as error:
            raise _unusable(model_class, error) from error
    return model.eval().requires_grad_(False), notes


def _from_config(model_class: Any, config: Any, attention: str) -> Any:
    torch: Any = require("torch", "Building a model")
    return model_class._from_config(config, attn_implementation=attention, dtype=torch.float32)


def _unusable(model_class: Any, error: Exception) -> InputError:
    return InputError(
        f"config.json: does not make a {model_class.__name__} ({type(error).__name__}: {str(error)[:300]}). "
        "Check the values in config.json against the checkpoint."
    )


def tied_parameters(model: Any) -> dict[str, str]:
    """Parameters the configuration ties: name -> name of the parameter it shares. Empty for an untied model."""
    return dict(model.get_expanded_tied_weights_keys(all_submodels=True))
