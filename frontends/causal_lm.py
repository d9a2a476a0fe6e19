"""Decoder language models: tokens, mask, positions and cache in; logits and the longer cache out."""

from __future__ import annotations

import inspect
from typing import Any

from effc.errors import InputError
from effc.frontends.environment import require
from effc.frontends.interface import Interface
from effc.frontends.sizes import BATCH, PAST, SEQ, TOTAL
from effc.ir.program import Task

EXAMPLE_BATCH, EXAMPLE_SEQ, EXAMPLE_PAST = 2, 3, 5


def causal_lm_interface(model: Any) -> Interface:
    """The interface of a transformers decoder with its KV cache as explicit inputs and outputs.

    Inputs: input_ids int64[batch,seq], attention_mask int64[batch,total], position_ids int64[batch,seq],
    past_key_values.N.key / .value float32[batch,kv_heads,past,head_dim].
    Outputs: logits float32[batch,seq,vocab], present.N.key / .value [batch,kv_heads,total,head_dim].

    Raises:
        InputError: The model keeps a state that is no key-value cache (state-space and hybrid models).
    """
    torch: Any = require("torch", "Importing a language model")
    shapes = cache_shapes(model)
    inputs = {
        "input_ids": torch.zeros(EXAMPLE_BATCH, EXAMPLE_SEQ, dtype=torch.int64),
        "attention_mask": torch.ones(EXAMPLE_BATCH, EXAMPLE_SEQ + EXAMPLE_PAST, dtype=torch.int64),
        "position_ids": EXAMPLE_PAST + torch.arange(EXAMPLE_SEQ).repeat(EXAMPLE_BATCH, 1),
    }
    axes: list[dict[int, str]] = [{0: BATCH, 1: SEQ}, {0: BATCH, 1: TOTAL}, {0: BATCH, 1: SEQ}]
    outputs = ["logits"]
    for layer, pair in enumerate(shapes):
        for part, (heads, width) in zip(("key", "value"), pair, strict=True):
            inputs[f"past_key_values.{layer}.{part}"] = torch.zeros(EXAMPLE_BATCH, heads, EXAMPLE_PAST, width)
            axes.append({0: BATCH, 2: PAST})
            outputs.append(f"present.{layer}.{part}")
    notes = () if takes_positions(model) else ("The model takes no position_ids: the input exists but is unused.",)
    return Interface(
        Task.CAUSAL_LM, _wrap(model), inputs, tuple(axes), tuple(outputs), variadic=2 * len(shapes), notes=notes
    )


def takes_positions(model: Any) -> bool:
    """Whether the model's forward has `position_ids`."""
    return "position_ids" in inspect.signature(model.forward).parameters


def _wrap(model: Any) -> Any:
    torch: Any = require("torch", "Importing a language model")
    from transformers import DynamicCache

    positions = takes_positions(model)

    class CausalLM(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> tuple[Any, ...]:
            # Without a configuration every layer keeps its full length; the window is in the mask.
            cache = DynamicCache()
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            extra = {"position_ids": position_ids} if positions else {}
            output = self.model(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **extra
            )
            present = [part for layer in cache.layers for part in (layer.keys, layer.values)]
            return (output.logits, *present)

    return CausalLM()


def cache_shapes(model: Any) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """`((heads, width) of keys, (heads, width) of values)` of every layer that has a cache.

    Found by running the model once on fake tensors: no configuration states it for all architectures.
    """
    torch: Any = require("torch", "Importing a language model")
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import DynamicCache
    from transformers.exporters.exporter_onnx import use_experts_implementation

    cache: Any = DynamicCache()
    try:
        # Of the expert products only the batched one runs on fake tensors.
        experts = use_experts_implementation(model, "batched_mm")
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), experts:
            ids = torch.zeros(EXAMPLE_BATCH, EXAMPLE_SEQ, dtype=torch.int64)
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
    except Exception as error:
        reason = f"a trial run failed ({type(error).__name__}: {str(error)[:300]})"
        raise InputError(_no_cache(model, reason)) from error
    filled: Any = getattr(output, "past_key_values", None)
    if filled is not cache or not cache.layers:
        raise InputError(_no_cache(model, "it does not fill a key-value cache"))
    shapes = []
    for number, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.ndim != 4 or keys.shape[2] != EXAMPLE_SEQ:
            raise InputError(_no_cache(model, f"layer {number} keeps a state of another kind"))
        shapes.append(((int(keys.shape[1]), int(keys.shape[3])), (int(values.shape[1]), int(values.shape[3]))))
    return shapes


def _no_cache(model: Any, reason: str) -> str:
    return (
        f"{type(model).__name__}: its state cannot be exported as a key-value cache: {reason}. effc compiles "
        "attention decoders; state-space, recurrent and hybrid models are not supported."
    )
