"""Feeds made from an interface: the shapes that break models, real text where possible.

Imports nothing of the compiler, so a process that measures an engine's memory can use it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

from effc.errors import InputError
from effc.runtime.bundle import Manifest, Port
from effc.runtime.limits import position_limit, text_config
from effc.runtime.surprise import TOKEN_SCORES

OTHER_SIZE = 5
"""Size of a symbolic axis with no known meaning: odd, and no other size in use."""

PREFIX = dict.fromkeys(("clusters", "parents", "prefix", "rank", "chunks", "outliers"), 0)
"""Sizes of what only a prefix brings: there is none."""

LONGEST_RING = 1024
"""Windows up to this many tokens are tried with a past that is longer."""

PARAGRAPH = (
    "The harbour was quiet before sunrise. Two boats had come in during the night, and their crews were still "
    "asleep under the canvas. On the quay an old woman counted crates of oranges: 17, 18, 19, then a pause, because "
    "the twentieth was missing. “It fell into the water,” said the boy, who had seen it go. She looked at him, "
    "laughed, and wrote down twenty anyway. By noon the price had doubled, the fog had lifted, and nobody spoke "
    "of the crate again; but the gulls, circling above the breakwater, knew where the sweet smell came from.\n"
)
"""Text of our own for feeds where a tokenizer is there."""

Tokenizer = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class FeedShape:
    """One shape to run a model at.

    Attributes:
        batch: Rows.
        seq: New tokens per row.
        past: Tokens already in the cache; 0 for models without one.
        padded: Rows have unequal lengths.
        own_past: The past is built by running the model on the tokens before, so it has the form in which this model
            keeps its cache; else it is random content of that form.
    """

    batch: int
    seq: int
    past: int = 0
    padded: bool = False
    own_past: bool = False

    def __str__(self) -> str:
        return f"batch={self.batch} seq={self.seq} past={self.past}" + (" padded" if self.padded else "")


@dataclass(frozen=True)
class Interface:
    """What a model takes, whatever form it has.

    Attributes:
        inputs: Every input, cache included.
        config: Model configuration, for vocabulary size and limits; may be empty.
        tokenizer: Text -> ids, or None.
        cache: Names of the inputs that are cache; an engine's are not among `inputs`.
        pad_left: Rows of unequal lengths are padded on the left: models that generate.
        longest_step: Most new tokens of a row in one run; None: any number.
    """

    inputs: Sequence[Port]
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    cache: frozenset[str] = frozenset()
    pad_left: bool = False
    longest_step: int | None = None

    @property
    def numbers_tokens(self) -> bool:
        """Whether a cache input says by number which tokens the cache holds, so that no random content makes a past."""
        types = [_dtype(port.dtype) for port in self.inputs if port.name in self.cache]
        return any(dtype.kind == "i" and dtype.itemsize > 1 for dtype in types)

    def cache_form(self) -> frozenset[tuple[str, str, str]]:
        """Name, dtype and shape of each cache input: a past fits two programs when these are equal."""
        return frozenset((port.name, port.dtype, str(port.shape)) for port in self.inputs if port.name in self.cache)


def manifest_interface(manifest: Manifest, tokenizer: Tokenizer | None = None) -> Interface:
    """Interface of an engine; its cache is the runtime's business and not among the inputs."""
    cache = frozenset(port.input for port in manifest.cache.ports) if manifest.cache else frozenset()
    pad_left = bool(cache) or manifest.task == "causal-lm"
    return Interface(manifest.inputs, manifest.config, tokenizer, cache, pad_left)


def hard_shapes(interface: Interface) -> tuple[FeedShape, ...]:
    """The shapes that break models: unequal lengths on an empty cache, one token on a cache, long, a single token.

    The long shape reaches past the sliding window by its cache, where the model has a window of at most 1024.
    No shape is longer than the model has positions for.
    """
    shapes = [FeedShape(3, 7, 0, True), FeedShape(1, 67), FeedShape(1, 1)]
    if interface.cache:
        window = text_config(interface.config).get("sliding_window") or 0
        long_past = window + 3 if 0 < window <= LONGEST_RING else 61
        shapes[1:1] = [FeedShape(2, 1, 9, True), FeedShape(1, 6, long_past)]
    limit = position_limit(interface.config)
    return tuple(dict.fromkeys(_shortened(shape, limit) for shape in shapes))


def cache_shapes(interface: Interface) -> tuple[FeedShape, ...]:
    """Shapes that reach beyond what a cache of bounded size holds: past a ring, and past the first page of codes."""
    shapes = []
    for port in interface.inputs:
        places = port.shape[2] if port.name in interface.cache and len(port.shape) == 4 else None
        if not isinstance(places, int) or places > LONGEST_RING:
            continue
        if port.name.endswith(".exact_key"):
            shapes += [FeedShape(2, 3, places + 5, True), FeedShape(1, 1, 2 * places + 3)]
        elif port.name.endswith(".key"):
            shapes.append(FeedShape(1, 6, places + 3))
    limit = position_limit(interface.config)
    return tuple(dict.fromkeys(_shortened(shape, limit) for shape in shapes))


def _shortened(shape: FeedShape, limit: int | None) -> FeedShape:
    if limit is None or shape.past + shape.seq <= limit:
        return shape
    seq = min(shape.seq, max(1, limit // 2))
    return replace(shape, seq=seq, past=min(shape.past, max(0, limit - seq)))


def within_step(shapes: Sequence[FeedShape], interface: Interface) -> tuple[FeedShape, ...]:
    """The same texts, of which no more tokens are new than a run takes; those before become a past."""
    most = interface.longest_step
    if most is None:
        return tuple(shapes)
    return tuple(
        shape if shape.seq <= most else replace(shape, seq=most, past=shape.past + shape.seq - most, own_past=True)
        for shape in shapes
    )


def quick_shapes(interface: Interface) -> tuple[FeedShape, ...]:
    """One shape with every difficulty in it, for models where each evaluation is expensive."""
    shape = FeedShape(2, 5, 4 if interface.cache else 0, True)
    return (_shortened(shape, position_limit(interface.config)),)


def make_feed(interface: Interface, shape: FeedShape, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays for every input at one shape.

    The content of an input depends on its name, dtype, shape and the seed only, so two programs that share
    inputs get the same content there.

    Args:
        interface: What the model takes.
        shape: Sizes of `batch`, `seq`, `past` and `total`; axes with another name or none get `OTHER_SIZE`.
        seed: Of the random content.
    """
    mask = attention_mask(interface, shape)
    return {port.name: _content(interface, port, shape, mask, seed) for port in interface.inputs}


def attention_mask(interface: Interface, shape: FeedShape) -> np.ndarray:
    """Int64 [batch, past + seq]; rows of a padded shape lose a third of their length each, down to one token.

    Padding is on the left for models that generate, on the right for others.
    """
    total = shape.past + shape.seq
    mask = np.ones((shape.batch, total), np.int64)
    for row in range(1, shape.batch if shape.padded else 0):
        missing = min(total - 1, row * max(1, total // 3))
        mask[row, :missing] = 0
        if not interface.pad_left:
            mask[row] = mask[row, ::-1]
    return mask


def token_columns(feed: Mapping[str, np.ndarray], start: int, end: int) -> dict[str, np.ndarray]:
    """Part of a feed without cache that holds the tokens `start` to `end`; mask and scores cover all up to `end`."""
    width = feed["input_ids"].shape[1]
    parts = {}
    for name, array in feed.items():
        if name in ("attention_mask", TOKEN_SCORES):
            parts[name] = array[:, :end]
        elif array.ndim >= 2 and array.size and array.shape[1] == width:
            parts[name] = array[:, start:end]
        else:
            parts[name] = array
    return parts


def empty_cache(interface: Interface, batch: int) -> dict[str, np.ndarray]:
    """The cache inputs before the first token: zeros."""
    shape = FeedShape(batch, 0)
    ports = [port for port in interface.inputs if port.name in interface.cache]
    return {port.name: np.zeros(_sizes(port, shape, interface.config), _dtype(port.dtype)) for port in ports}


def valid_positions(name: str, array: np.ndarray, shape: FeedShape, mask: np.ndarray) -> np.ndarray | None:
    """Where an output has a meaning: not at padded positions. None: everywhere.

    Outputs [batch, seq, …] are masked on their second axis, cache outputs [batch, heads, total, …] on their third.
    """
    total = shape.past + shape.seq
    if name.startswith("present") and array.ndim == 4 and array.shape[0] == shape.batch and array.shape[2] == total:
        return np.broadcast_to(mask[:, None, :] == 1, array.shape[:3])
    if array.ndim >= 3 and array.shape[:2] == (shape.batch, shape.seq):
        return np.asarray(mask[:, shape.past :] == 1)
    return None


def _sizes(port: Port, shape: FeedShape, config: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else _size(dim, shape, config) for dim in port.shape)


_ALIASES = {
    "batch_size": "batch",
    "sequence_length": "seq",
    "sequence": "seq",
    "past_sequence_length": "past",
    "total_sequence_length": "total",
}


def _size(symbol: str, shape: FeedShape, config: Mapping[str, Any]) -> int:
    """Size of a symbol, of a sum such as `past + seq`, or of whole pages such as `past // 128`."""
    if "//" in symbol:
        tokens, _, page = symbol.partition("//")
        return _size(tokens, shape, config) // int(page)
    known = {"batch": shape.batch, "seq": shape.seq, "past": shape.past, "total": shape.past + shape.seq, **PREFIX}
    total = 0
    for word in symbol.replace(" ", "").split("+"):
        name = _ALIASES.get(word, word)
        if word.isdigit():
            total += int(word)
        elif name in ("height", "width"):
            size = config.get("image_size") or 32
            total += size if isinstance(size, int) else size[name == "width"]
        else:
            total += known.get(name, OTHER_SIZE)
    return total


def _content(interface: Interface, port: Port, shape: FeedShape, mask: np.ndarray, seed: int) -> np.ndarray:
    sizes, dtype = _sizes(port, shape, interface.config), _dtype(port.dtype)
    draw = _generator(port.name, seed)
    if port.name in interface.cache:
        if dtype.kind in "iub":
            return np.zeros(sizes, dtype)
        return (0.5 * draw.standard_normal(sizes)).astype(dtype)
    if port.name.endswith("attention_mask") and sizes in (mask.shape, (shape.batch, shape.seq)):
        return mask[:, mask.shape[1] - sizes[1] :].astype(dtype)
    if port.name == "position_ids" and len(sizes) == 2:
        positions = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)
        return np.asarray(positions[:, shape.past : shape.past + sizes[1]], dtype)
    if port.name in ("token_type_ids", TOKEN_SCORES):
        return np.zeros(sizes, dtype)
    if port.name.endswith("input_ids") and dtype.kind in "iu":
        return _token_ids(interface, sizes, draw).astype(dtype)
    return _generic(sizes, dtype, draw)


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" or name.startswith("float8") else name)


def _generator(name: str, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{name}/{seed}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def _token_ids(interface: Interface, sizes: tuple[int, ...], draw: np.random.Generator) -> np.ndarray:
    """Ids of the paragraph, each row starting at another token; random ids where there is no tokenizer."""
    vocabulary = int(text_config(interface.config).get("vocab_size") or 32)
    if interface.tokenizer is None:
        return draw.integers(0, vocabulary, sizes)
    ids = np.asarray(interface.tokenizer(PARAGRAPH), np.int64) % vocabulary
    count = int(np.prod(sizes, dtype=np.int64))
    step = 13 if len(sizes) > 1 else 0
    width = sizes[-1] if sizes else 1
    places = [(row * step + column) % len(ids) for row in range(count // max(width, 1)) for column in range(width)]
    return ids[places].reshape(sizes)


def _generic(sizes: tuple[int, ...], dtype: np.dtype, draw: np.random.Generator) -> np.ndarray:
    """Normal floats, 0 or 1 for integers (safe as an index of any axis of two), random booleans."""
    if dtype.kind == "b":
        return draw.integers(0, 2, sizes).astype(bool)
    if dtype.kind in "iu":
        return draw.integers(0, 2, sizes).astype(dtype)
    if dtype.kind in "OSU":
        raise InputError("inputs of type string have no feed. Give the model a tokenized input.")
    return draw.standard_normal(sizes).astype(dtype)
