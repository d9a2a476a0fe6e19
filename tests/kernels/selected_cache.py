"""A cache of one CachedAttention in an onnxruntime session, and in float64 what a step of it with a selection gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
from attention_oracle import Form, rotate, split
from cached_attention_model import DENSE, Model, open_model
from paged_cache_oracle import PageCodec, Pages
from selection_oracle import Selection, chosen_blocks, dense_bounds, page_bounds, read_slots, votes

from effc.ir.dialect.cache_storage import HeadSizes, PageStorage

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
FORMS = {
    "mha": Form(3, 3, 32, 16, scale=32**-0.5),
    "gqa": Form(6, 2, 32, 32, scale=0.3, softcap=30.0),
    "rotary": Form(4, 1, 33, 48, scale=0.4, rotary="half", rotary_size=32),
}
EVEN = {name: replace(form, head_size=32) for name, form in FORMS.items()}
PAGED = {
    "int8": Pages(page=16, salient=16),
    "int4": Pages(page=32, key_bits=(4, 4), value_bits=(4, 4), key_group=16),
    "mixed": Pages(page=32, salient=16, key_bits=(4, 2), value_bits=(4, 2), importance="normalised"),
}
STORAGES = ("float32", "bfloat16", *PAGED)
TOKENS = 330


@dataclass
class Cache:
    """A session with its cache, stepped with any number of tokens."""

    form: Form
    storage: str
    selection: Selection | None
    batch: int = 1
    capacity: int = 512

    def __post_init__(self) -> None:
        attributes = DENSE if self.storage not in PAGED else DENSE | asdict(PAGED[self.storage]) | {"storage": "pages"}
        if self.selection is not None:
            attributes = attributes | self.selection.attributes()
        self.past = self._empty()
        optional = ["cos", "sin"] if self.form.rotary != "none" else []
        self.model: Model = open_model(self.form, self.past, optional, storage=attributes)
        self.tokens = 0

    def _empty(self) -> list[np.ndarray]:
        form, lead = self.form, (self.batch, self.form.kv_heads)
        if self.storage in PAGED:
            pages = PAGED[self.storage]
            tensors = [np.zeros((*lead, pages.places, size), BF16) for size in (form.head_size, form.value_size)]
            tensors.append(np.zeros((*lead, self.capacity // pages.page, PageCodec(form, pages).bytes), np.uint8))
            if pages.statistics:
                tensors.append(np.zeros((*lead, 2 * pages.places + form.head_size), F32))
            return tensors
        dtype = F32 if self.storage == "float32" else BF16
        tensors = [np.zeros((*lead, self.capacity, size), dtype) for size in (form.head_size, form.value_size)]
        if self.selection is not None and self.selection.kind == "pages":
            blocks = self.capacity // self.selection.block
            tensors.append(np.zeros((*lead, blocks, 2 * form.head_size), dtype))
        if self.selection is not None and self.selection.refresh:
            tensors.append(np.zeros((self.batch, self.capacity), np.uint8))
            tensors.append(np.zeros((self.batch, form.heads * form.head_size), F32))
            tensors.append(np.zeros((self.batch, 2), np.int32))
        return tensors

    def step(self, feeds: dict[str, np.ndarray], count: int) -> np.ndarray:
        y, self.past = self.model.run(part(feeds, self.tokens, self.tokens + count), self.past, in_place=True)
        self.tokens += count
        return y

    def run(self, feeds: dict[str, np.ndarray], steps: Sequence[int]) -> np.ndarray:
        return np.concatenate([self.step(feeds, count) for count in steps], axis=1)


def part(feeds: dict[str, np.ndarray], begin: int, end: int) -> dict[str, np.ndarray]:
    new = {name: feeds[name][:, begin:end] for name in ("query", "key", "value", "cos", "sin") if name in feeds}
    return new | {"valid": feeds["valid"][:, :end]}


def tokens_of(form: Form, batch: int = 1, seed: int = 3, count: int = TOKENS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    widths = {
        "query": form.heads * form.head_size,
        "key": form.kv_heads * form.head_size,
        "value": form.kv_heads * form.value_size,
    }
    feeds = {name: rng.standard_normal((batch, count, width)).astype(F32) for name, width in widths.items()}
    feeds["query"] *= 2
    feeds["valid"] = np.ones((batch, count), bool)
    if form.rotary != "none":
        angles = np.arange(count)[:, None] / 50.0 ** np.linspace(0, 1, form.rotary_size // 2)
        angles = np.broadcast_to(angles, (batch, *angles.shape))
        feeds |= {"cos": np.cos(angles).astype(F32), "sin": np.sin(angles).astype(F32)}
    return feeds


def selection_for(kind: str, storage: str, **options: float) -> Selection:
    """One with the tokens that the storage keeps as they are."""
    block = PAGED[storage].page if storage in PAGED else 16
    return replace(Selection(kind, block=1 if kind == "topk" else block), **options)


def form_for(name: str, storage: str) -> Form:
    return EVEN[name] if storage in PAGED else FORMS[name]


class Expected:
    """The tokens of one row of a cache, read back, and attention over those that are chosen."""

    def __init__(self, cache: Cache, selection: Selection, feeds: dict[str, np.ndarray], row: int = 0) -> None:
        self.cache, self.selection, self.row = cache, selection, row
        self.start = int(np.argmax(feeds["valid"][row]))
        self.feeds = {name: array[row : row + 1] for name, array in feeds.items()}
        self.before = cache.tokens - self.start
        self.keys, self.values = self._decoded() if cache.storage in PAGED else self._dense()

    def _dense(self) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.start, self.cache.tokens)
        keys, values = (self.cache.past[i][self.row, :, span].astype(np.float64) for i in (0, 1))
        return keys, values

    def _decoded(self) -> tuple[np.ndarray, np.ndarray]:
        form, pages, past = self.cache.form, PAGED[self.cache.storage], self.cache.past
        codec, count = PageCodec(form, pages), pages.pages(self.before)
        both = []
        for which in (0, 1):
            exact = past[which][self.row].astype(np.float64)
            decoded = [
                [codec.decode(past[2][self.row, head, p])[which] for p in range(count)] for head in range(form.kv_heads)
            ]
            size = exact.shape[2]
            middle = np.array(decoded, np.float64).reshape(form.kv_heads, count * pages.page, size)
            tail = self.before - pages.sinks - count * pages.page
            parts = [exact[:, : pages.sinks], middle, exact[:, pages.sinks : pages.sinks + tail]]
            both.append(np.concatenate(parts, axis=1)[:, : self.before])
        return both[0], both[1]

    def bounds(self, head: int) -> list[np.ndarray]:
        blocks = self.selection.blocks(self.before)
        if self.cache.storage not in PAGED:
            return [one[None] for one in dense_bounds(self.selection, self.keys, blocks)[head]]
        form, pages = self.cache.form, PAGED[self.cache.storage]
        storage = PageStorage(ir.DataType.BFLOAT16, **asdict(pages))
        sizes = HeadSizes(form.kv_heads, form.head_size, form.value_size)
        return [page_bounds(storage, sizes, self.cache.past[2][self.row, head, p]) for p in range(blocks)]

    def step(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """The next token's result [H * E], and the slots each key head reads (from the row's first token)."""
        form, at = self.cache.form, self.cache.tokens
        new = part(self.feeds, at, at + 1)
        q, k = split(new["query"], form.heads), split(new["key"], form.kv_heads)
        if form.rotary != "none":
            q, k = (rotate(x, new["cos"], new["sin"], form) for x in (q, k))
        keys = np.concatenate([self.keys, k[0]], axis=1)
        values = np.concatenate([self.values, split(new["value"], form.kv_heads)[0]], axis=1)
        group, results, reads = form.heads // form.kv_heads, [], []
        for head in range(form.kv_heads):
            queries = q[0, head * group : (head + 1) * group, 0]
            read = self._read(head, q[0, :, 0])
            reads.append(read)
            for query in queries:
                scores = keys[head, read] @ query * form.scale
                if form.softcap:
                    scores = form.softcap * np.tanh(scores / form.softcap)
                weights = np.exp(scores - scores.max())
                results.append(weights @ values[head, read] / weights.sum())
        return np.concatenate(results), reads

    def _read(self, head: int, queries: np.ndarray) -> np.ndarray:
        selection, form = self.selection, self.cache.form
        blocks = selection.blocks(self.before)
        total = self.before + 1
        wanted = selection.wanted(blocks)
        if self.before < selection.dense_below or wanted >= blocks:
            return np.ones(total, bool)
        if selection.kind == "topk":
            middle = slice(selection.sinks, selection.sinks + blocks)
            valid = self.feeds["valid"][0, self.start :][middle]
            given = votes(form, queries, self.keys[:, middle], valid)
            chosen = np.sort(np.lexsort((np.arange(blocks), -given))[:wanted])
        else:
            group = form.heads // form.kv_heads
            own = queries[head * group : (head + 1) * group]
            chosen = chosen_blocks(form, selection, own, self.bounds(head))
        return read_slots(selection, chosen, blocks, 0, total)
