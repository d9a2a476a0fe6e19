"""Runs an engine at a shape and over text, whatever form its cache has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from effc.errors import InputError
from effc.runtime.kv_state import KvState
from effc.runtime.session import Engine
from effc.runtime.surprise import TOKEN_SCORES
from effc.verify.inputs import FeedShape, Interface, make_feed, token_columns

CHUNK = 64
"""Tokens of text read in one run: later ones read earlier ones from the cache, and the logits stay few."""


def run_at(engine: Engine, interface: Interface, shape: FeedShape, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Outputs that are not cache at one shape.

    A past is built by running the engine on the tokens before, so it has the form this engine keeps its cache in.

    Args:
        engine: The engine.
        interface: Its interface, with the configuration and tokenizer that are common to all engines compared.
        shape: Where to run it.
        seed: Of random inputs.
    """
    whole = make_feed(interface, FeedShape(shape.batch, shape.past + shape.seq, 0, shape.padded), seed=seed)
    if engine.manifest.cache is None:
        return engine.run(whole)
    names = [port.name for port in engine.manifest.outputs]
    state = engine.new_state(shape.batch, max_length=shape.past + shape.seq)
    if shape.past:
        state.run(token_columns(whole, 0, shape.past), [])
    return state.run(token_columns(whole, shape.past, shape.past + shape.seq), names)


def token_feed(engine: Engine, ids: np.ndarray, past: int) -> dict[str, np.ndarray]:
    """Feed for `ids` [batch, seq] after `past` tokens, no padding, all tokens worth the same.

    Raises:
        InputError: The engine has an input that is not made from tokens.
    """
    batch, seq = ids.shape
    made = {
        "input_ids": ids,
        "attention_mask": np.ones((batch, past + seq), np.int64),
        "position_ids": np.broadcast_to(np.arange(past, past + seq), (batch, seq)),
        "token_type_ids": np.zeros((batch, seq), np.int64),
        TOKEN_SCORES: np.zeros((batch, past + seq), np.float32),
    }
    feed = {}
    for port in engine.manifest.inputs:
        if port.name not in made:
            raise InputError(
                f"{engine.folder}: input {port.name!r} is not made from tokens ({', '.join(made)}), so text cannot be "
                "run through it. Use `Engine.run`."
            )
        feed[port.name] = np.ascontiguousarray(made[port.name], np.dtype(port.dtype))
    return feed


def window_logits(engine: Engine, window: Sequence[int], chunk: int = CHUNK) -> Iterator[np.ndarray]:
    """Logits [chunk, vocab] for the tokens of one window, `chunk` at a time, from an empty cache."""
    ids = np.asarray(window, np.int64)[None]
    if engine.manifest.cache is None:
        logits = engine.run(token_feed(engine, ids, 0))["logits"][0]
        yield from (logits[start : start + chunk] for start in range(0, len(logits), chunk))
        return
    state: KvState = engine.new_state(1, max_length=ids.shape[1])
    for start in range(0, ids.shape[1], chunk):
        feed = token_feed(engine, ids[:, start : start + chunk], start)
        yield state.run(feed, ["logits"])["logits"][0]
