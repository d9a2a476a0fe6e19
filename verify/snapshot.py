"""A program as it was at one moment: its graph, and its outputs at the shapes that were asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from effc.errors import InputError
from effc.ir.analysis.cached_attention import cached_attention_sites
from effc.ir.program import Program, Task
from effc.ir.rewrite.cut import cut_to
from effc.runtime.bundle import Port
from effc.verify.inputs import (
    FeedShape,
    Interface,
    Tokenizer,
    attention_mask,
    empty_cache,
    make_feed,
    token_columns,
)
from effc.verify.streaming import DEFAULT_LIMIT, Observer, evaluate


class Snapshot:
    """A copy of a program's graph, which shares the weights, with outputs computed when required.

    Args:
        program: The program; later edits of it do not reach the snapshot.
        seed: Of random inputs.
        limit: Bytes of weights held at once while it runs.

    Raises:
        InputError: The graph is not whole (a node reads a value that belongs to no node of it), or the model's
            `tokenizer.json` is damaged.
    """

    def __init__(self, program: Program, *, seed: int = 0, limit: int = DEFAULT_LIMIT) -> None:
        self.model = _copy(program.model)
        self.interface = program_interface(program)
        self.seed = seed
        self.limit = limit
        self._carried = [(str(past.name), str(present.name)) for past, present in program.cache_pairs()]
        self._outputs: dict[FeedShape, dict[str, np.ndarray]] = {}

    def require(self, shapes: Iterable[FeedShape]) -> None:
        """Compute the outputs at these shapes, all in one reading of the weights.

        Raises:
            InputError: The graph cannot be run.
        """
        missing = [shape for shape in shapes if shape not in self._outputs]
        if missing:
            self._outputs.update(zip(missing, evaluate(self.model, self._feeds(missing), limit=self.limit)))

    def at(self, shape: FeedShape) -> dict[str, np.ndarray]:
        """Output name -> array at one shape."""
        self.require([shape])
        return self._outputs[shape]

    def mask(self, shape: FeedShape) -> np.ndarray:
        """Int64 [batch, past + seq]: 1 at tokens, 0 at padding."""
        return attention_mask(self.interface, shape)

    def observe(self, shape: FeedShape, observer: Observer) -> None:
        """Show every inner value at one shape to the observer."""
        evaluate(self.model, self._feeds([shape]), limit=self.limit, observe=observer)

    def _feeds(self, shapes: Sequence[FeedShape]) -> list[dict[str, np.ndarray]]:
        grown = {shape for shape in shapes if shape.own_past and shape.past}
        built = self._own_pasts([shape for shape in shapes if shape in grown])
        return [
            built.pop(0) if shape in grown else make_feed(self.interface, shape, seed=self.seed) for shape in shapes
        ]

    def _own_pasts(self, shapes: Sequence[FeedShape]) -> list[dict[str, np.ndarray]]:
        """Feeds whose cache is what the graph itself made of the tokens before."""
        if not shapes:
            return []
        wholes = [self._tokens(shape) for shape in shapes]
        carried = cut_to(self.model, [present for _, present in self._carried])
        caches = [empty_cache(self.interface, shape.batch) for shape in shapes]
        longest = max(shape.past for shape in shapes)
        step = self.interface.longest_step or longest
        for start in range(0, longest, step):
            unread = [index for index, shape in enumerate(shapes) if start < shape.past]
            feeds = [
                {**token_columns(wholes[index], start, min(start + step, shapes[index].past)), **caches[index]}
                for index in unread
            ]
            for index, output in zip(unread, evaluate(carried, feeds, limit=self.limit), strict=True):
                caches[index] = {past: output[present] for past, present in self._carried}
        return [
            {**token_columns(whole, shape.past, shape.past + shape.seq), **cache}
            for whole, shape, cache in zip(wholes, shapes, caches, strict=True)
        ]

    def _tokens(self, shape: FeedShape) -> dict[str, np.ndarray]:
        """The inputs that are not cache for past and new tokens together."""
        whole = replace(shape, seq=shape.past + shape.seq, past=0)
        feed = make_feed(self.interface, whole, seed=self.seed)
        return {name: array for name, array in feed.items() if name not in self.interface.cache}


def _copy(model: ir.Model) -> ir.Model:
    try:
        return model.clone()
    except RuntimeError as error:
        # onnx_ir wraps the sentence that says which value it is in the text of the whole graph.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise InputError(f"the graph is not whole: {cause}") from error


def program_interface(program: Program) -> Interface:
    """Interface of a program: graph inputs that are not weights, tokenizer from the source's assets."""
    ports = [_port(value) for value in program.graph.inputs if not value.is_initializer()]
    cache = frozenset(str(past.name) for past, _ in program.cache_pairs())
    tokenizer = _tokenizer(program.source.assets.get("tokenizer.json"))
    pad_left = bool(cache) or program.task == Task.CAUSAL_LM
    steps = [one for site in cached_attention_sites(program.graph) if (one := site.selection.longest_step)]
    return Interface(ports, program.source.config, tokenizer, cache, pad_left, min(steps, default=None))


def _port(value: ir.Value) -> Port:
    if value.dtype is None or value.shape is None:
        raise InputError(f"input {value.name!r} has no type or shape. Export the model again with typed inputs.")
    dims = [dim if isinstance(dim, int) else str(dim.value or "") for dim in value.shape]
    return Port(str(value.name), value.dtype.numpy().name, dims)


def _tokenizer(asset: Any) -> Tokenizer | None:
    if asset is None:
        return None
    from tokenizers import Tokenizer as Fast

    try:
        fast = Fast.from_buffer(asset) if isinstance(asset, bytes) else Fast.from_file(str(asset))
    except Exception as error:  # the library raises bare Exception
        where = "tokenizer.json" if isinstance(asset, bytes) else asset
        raise InputError(f"{where}: is no tokenizer ({error}). Download it again.") from error
    return lambda text: fast.encode(text).ids
