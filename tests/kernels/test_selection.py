"""Selections of CachedAttention in real onnxruntime sessions, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from attention_oracle import Form, rotate, split
from cached_attention_model import DENSE, Model, open_model
from paged_cache_oracle import PageCodec, Pages
from selection_oracle import Selection, chosen_blocks, dense_bounds, page_bounds, read_slots

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
        if self.selection is not None:
            blocks = self.capacity // self.selection.block
            tensors.append(np.zeros((*lead, blocks, 2 * form.head_size), dtype))
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


def selection_for(storage: str, **options: float) -> Selection:
    """One with the tokens that the storage keeps as they are."""
    block = PAGED[storage].page if storage in PAGED else 16
    return replace(Selection(block=block), **options)


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
            read = self._read(head, queries)
            reads.append(read)
            for query in queries:
                scores = keys[head, read] @ query * form.scale
                if form.softcap:
                    scores = form.softcap * np.tanh(scores / form.softcap)
                weights = np.exp(scores - scores.max())
                results.append(weights @ values[head, read] / weights.sum())
        return np.concatenate(results), reads

    def _read(self, head: int, queries: np.ndarray) -> np.ndarray:
        blocks = self.selection.blocks(self.before)
        total = self.before + 1
        if self.before < self.selection.dense_below or self.selection.wanted(blocks) >= blocks:
            return np.ones(total, bool)
        chosen = chosen_blocks(self.cache.form, self.selection, queries, self.bounds(head))
        return read_slots(self.selection, chosen, blocks, 0, total)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("options", [{"budget": 64}, {"share": 0.25}, {"share": 0.1, "dense_below": 250}], ids=str)
def test_matches_float64(name: str, storage: str, options: dict[str, float], isa: str) -> None:
    form, selection = form_for(name, storage), selection_for(storage, **options)
    feeds = tokens_of(form)
    cache = Cache(form, storage, selection)
    cache.run(feeds, [100, 101])
    few = 0
    for _ in range(40):
        wanted, reads = Expected(cache, selection, feeds).step()
        found = cache.step(feeds, 1)[0, 0]
        np.testing.assert_allclose(found, wanted, atol=2e-5)
        few += sum(not read.all() for read in reads)
    assert few >= (0 if "dense_below" in options else 40 * form.kv_heads)
    cache.run(feeds, [cache.capacity - 512 or 10] * 2)
    wanted, reads = Expected(cache, selection, feeds).step()
    np.testing.assert_allclose(cache.step(feeds, 1)[0, 0], wanted, atol=2e-5)
    assert not any(read.all() for read in reads)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("storage", STORAGES)
def test_a_full_budget_is_dense(name: str, storage: str) -> None:
    """The same bits as without a selection."""
    form = form_for(name, storage)
    feeds = tokens_of(form)
    steps = [200, *[1] * 60]
    dense = Cache(form, storage, None).run(feeds, steps)
    for options in ({"budget": 512}, {"share": 1.0}, {"budget": 16, "dense_below": TOKENS}):
        found = Cache(form, storage, selection_for(storage, **options)).run(feeds, steps)
        assert np.array_equal(found, dense)


@pytest.mark.parametrize("storage", STORAGES)
def test_rows_do_not_depend_on_each_other(storage: str) -> None:
    """A row in a left-padded batch is the row alone."""
    form, selection = form_for("gqa", storage), selection_for(storage, budget=64)
    feeds = tokens_of(form, batch=3)
    feeds["valid"][1, :57] = False
    feeds["valid"][2, :150] = False
    steps = [170, *[1] * 50]
    together = Cache(form, storage, selection, batch=3).run(feeds, steps)
    for row, first in enumerate((0, 57, 150)):
        alone = {name: array[row : row + 1, first:] for name, array in feeds.items()}
        found = Cache(form, storage, selection).run(alone, [170 - first, *[1] * 50])
        assert np.array_equal(found[0, -50:], together[row, -50:])


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_chunks_of_a_prompt_do_not_matter(storage: str) -> None:
    form, selection = form_for("gqa", storage), selection_for(storage, budget=64)
    feeds = tokens_of(form)
    whole, parts = (
        Cache(form, storage, selection).run(feeds, [*prompt, *[1] * 30]) for prompt in ([250], [90, 2, 158])
    )
    np.testing.assert_allclose(parts[:, -30:], whole[:, -30:], atol=1e-5)


@pytest.mark.parametrize("storage", STORAGES)
def test_the_same_step_twice(storage: str) -> None:
    form, selection = form_for("rotary", storage), selection_for(storage, budget=32)
    feeds = tokens_of(form)
    cache = Cache(form, storage, selection)
    cache.run(feeds, [250])
    step = part(feeds, 250, 251)
    (first, _), (second, _) = (cache.model.run(step, cache.past) for _ in range(2))
    assert np.array_equal(first, second)


def test_group_heads_are_repeated_key_heads() -> None:
    """GQA with one query repeated over its group reads what the key head alone reads."""
    form = FORMS["gqa"]
    feeds = tokens_of(form)
    group = form.heads // form.kv_heads
    one = feeds["query"].reshape(1, TOKENS, form.kv_heads, group, -1)[:, :, :, :1]
    feeds["query"] = np.repeat(one, group, axis=3).reshape(1, TOKENS, -1)
    selection, steps = Selection(budget=64), [250, *[1] * 20]
    grouped = Cache(form, "float32", selection).run(feeds, steps)
    alone = feeds | {"query": one.reshape(1, TOKENS, -1)}
    single = Cache(replace(form, heads=form.kv_heads), "float32", selection).run(alone, steps)
    wanted = np.repeat(single.reshape(1, -1, form.kv_heads, 1, form.value_size), group, axis=3)
    np.testing.assert_allclose(grouped, wanted.reshape(grouped.shape), atol=1e-6)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_planted_key_is_found(storage: str) -> None:
    form = form_for("mha", storage)
    selection = selection_for(storage, budget=32)
    feeds = tokens_of(form)
    feeds["key"][0, 77] = 3 * feeds["query"][0, 300]
    feeds["value"][0, 77] = 50
    cache = Cache(form, storage, selection)
    cache.run(feeds, [200, 100])
    found = cache.step(feeds, 1)
    np.testing.assert_allclose(found, 50, rtol=0.05)


def test_ties_go_to_the_earlier_block() -> None:
    form, selection = FORMS["mha"], Selection(sinks=0, recent=0, budget=32)
    feeds = tokens_of(form)
    feeds["key"][:] = 1
    feeds["value"][:] = np.arange(TOKENS)[None, :, None]
    cache = Cache(form, "float32", selection)
    cache.run(feeds, [160])
    np.testing.assert_allclose(cache.step(feeds, 1), (np.arange(32).sum() + 160) / 33, rtol=1e-6)


def test_invalid_tokens_inside_are_not_read() -> None:
    form, selection = FORMS["gqa"], Selection(budget=64)
    feeds = tokens_of(form)
    feeds["valid"][0, 20:200:3] = False
    spoiled = {name: array.copy() for name, array in feeds.items()}
    spoiled["value"][0, 20:200:3] = 1e6
    steps = [250, *[1] * 20]
    found, other = (Cache(form, "float32", selection).run(one, steps) for one in (feeds, spoiled))
    assert np.array_equal(found[:, -20:], other[:, -20:])


def test_bounds_that_are_not_shared_are_copied() -> None:
    form, selection = FORMS["rotary"], Selection(budget=64)
    feeds = tokens_of(form)
    cache = Cache(form, "bfloat16", selection)
    cache.run(feeds, [200])
    before = [array.copy() for array in cache.past]
    _, copied = cache.model.run(part(feeds, 200, 240), cache.past)
    cache.run(feeds, [40])
    assert np.array_equal(copied[2][:, :, :14], cache.past[2][:, :, :14])
    assert not np.array_equal(before[2], cache.past[2])


@pytest.mark.parametrize(
    ("form", "storage", "options", "message"),
    [
        (FORMS["gqa"], DENSE, {"selection": "some"}, "attribute 'selection' is 'some'"),
        (replace(FORMS["gqa"], window=40), DENSE, {}, "takes no window"),
        (replace(FORMS["gqa"], scale=-1.0), DENSE, {}, "takes no negative scale"),
        (FORMS["gqa"], DENSE, {"select_block": 0}, "'select_block' is 0"),
        (FORMS["gqa"], DENSE, {"select_share": 1.5}, "'select_share' is 1.5"),
        (EVEN["gqa"], PAGED["int8"], {"select_recent": 40}, "other sinks, recent tokens or blocks"),
        (EVEN["gqa"], Pages(page=16, salient=16, key_scheme="balanced"), {}, "coded by channel"),
        (EVEN["gqa"], Pages(page=16, salient=16, key_bits=(16, 16)), {}, "coded by channel"),
    ],
)
def test_what_there_is_not(form: Form, storage: object, options: dict[str, object], message: str) -> None:
    past = Cache(FORMS["gqa"], "float32", Selection()).past
    attributes = dict(storage) if isinstance(storage, dict) else DENSE | asdict(storage) | {"storage": "pages"}
    with pytest.raises(Exception, match=message):
        open_model(form, past, storage=attributes | Selection().attributes() | options)


def test_a_bias_and_missing_bounds_are_refused() -> None:
    form, cache = FORMS["gqa"], Cache(FORMS["gqa"], "float32", Selection())
    feeds = tokens_of(form)
    step = part(feeds, 0, 1)
    biased = open_model(form, cache.past, ["bias"], storage=DENSE | Selection().attributes())
    with pytest.raises(Exception, match="takes no bias"):
        biased.run(step | {"bias": np.zeros((1, 1, 1, 1), F32)}, cache.past)
    short = [*cache.past[:2], cache.past[2][:, :, :5]]
    with pytest.raises(Exception, match="which need 6"):
        cache.model.run(part(feeds, 100, 101), short)
