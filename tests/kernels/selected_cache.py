"""A cache of one CachedAttention with any selection and storage, in an onnxruntime session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from attention_feeds import EVEN, FORMS, angles, part
from attention_oracle import Form
from cached_attention_model import DENSE, Model, open_model
from cluster_oracle import Clusters
from lowrank_oracle import Prefix

from effc.ir.dialect.cache_storage import DenseStorage, HeadSizes, PageStorage, StateTensor, Storage
from effc.ir.dialect.selections import (
    AllTokens,
    ClusterSelection,
    EvictSelection,
    LowRankSelection,
    RetainSelection,
    TokenSelection,
    WindowSelection,
)
from effc.kernels.read_log import logged_reads

DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
PAGED = {
    "int8": PageStorage(sinks=4, recent=12, page=16, salient=16),
    "int4": PageStorage(sinks=4, recent=12, page=32, salient=32, key_bits=(4, 4), value_bits=(4, 4), key_group=16),
    "mixed": PageStorage(
        sinks=4, recent=12, page=32, salient=16, key_bits=(4, 2), value_bits=(4, 2), importance="normalised"
    ),
}
STORAGES = ("float32", "bfloat16", *PAGED)
ALL = AllTokens()

Reads = dict[tuple[int, int], np.ndarray]
"""Row and key head -> the tokens it reads, counted from the row's first one."""


def form_for(name: str, storage: str) -> Form:
    """The form of that name which the storage can keep."""
    return EVEN[name] if storage in PAGED else FORMS[name]


def storage_of(name: str, ring: int = 0) -> Storage:
    """The storage of that name."""
    return PAGED[name] if name in PAGED else DenseStorage(DTYPES[name], ring)


def attributes_of(storage: Storage, selection: TokenSelection) -> dict[str, object]:
    """Attributes of a node beside those of its form."""
    chosen = {"storage": storage.kind, "selection": selection.kind}
    return DENSE | storage.attributes() | selection.attributes() | chosen


def places_of(form: Form, selection: TokenSelection) -> int:
    """The ring that a dense cache needs; 0: none."""
    if isinstance(selection, EvictSelection):
        return selection.places
    if isinstance(selection, RetainSelection):
        return selection.budget
    return form.window if isinstance(selection, WindowSelection) else 0


def constants_of(form: Form, selection: TokenSelection, dtype: np.dtype, capacity: int) -> dict[str, np.ndarray]:
    """The inputs behind the cache, apart from scores, as a model without a prefix has them."""
    if isinstance(selection, ClusterSelection):
        return Clusters.empty(form).inputs()
    prefix, positions = {}, np.zeros(0)
    if isinstance(selection, LowRankSelection):
        prefix = Prefix.empty(form, dtype).inputs()
        positions = np.arange(capacity if form.rotary != "none" else 0)
    elif isinstance(selection, RetainSelection):
        positions = np.arange(selection.budget)
    elif isinstance(selection, WindowSelection) and selection.positions != "keep":
        positions = np.array([selection.far_position(form.window)])
    tables = dict(zip(("far_cos", "far_sin"), angles(form, positions[None]), strict=True)) if len(positions) else {}
    return tables | prefix


@dataclass
class Cache:
    """A session with its cache, stepped with any number of tokens.

    Attributes:
        form: Of the attention.
        storage: `float32`, `float16`, `bfloat16`, or one of `PAGED`.
        selection: Which tokens a step reads.
        batch: Rows.
        capacity: Tokens, of tensors that grow.
        ring: Places of a dense cache that keeps no more tokens; None: as many as the selection needs, 0 for all.
        past: The tensors of the cache.
        constants: Inputs behind them.
        tokens: In the cache.
    """

    form: Form
    storage: str
    selection: TokenSelection = ALL
    batch: int = 1
    capacity: int = 512
    ring: int | None = None

    def __post_init__(self) -> None:
        ring = places_of(self.form, self.selection) if self.ring is None else self.ring
        self.kept_as = storage_of(self.storage, ring)
        sizes = HeadSizes(self.form.kv_heads, self.form.head_size, self.form.value_size, self.form.heads)
        tensors = (*self.kept_as.tensors(sizes), *self.selection.tensors(self.kept_as, sizes))
        self.past = [np.zeros(self._shape(tensor), tensor.dtype.numpy()) for tensor in tensors]
        self.tokens = 0
        self.constants: dict[str, np.ndarray] = {}
        self.give(constants_of(self.form, self.selection, self.past[0].dtype, self.capacity))

    def _shape(self, tensor: StateTensor) -> tuple[int, ...]:
        sizes = [self.batch if axis == "batch" else axis for axis in tensor.shape]
        return tuple(
            one if isinstance(one, int) else self.capacity // int(one.partition("//")[2] or 1) for one in sizes
        )

    @property
    def places(self) -> int:
        """Tokens it keeps, of a dense cache that does not keep all; else 0."""
        return self.kept_as.ring if isinstance(self.kept_as, DenseStorage) else 0

    @property
    def optional(self) -> list[str]:
        """Inputs that not every node has."""
        rotates = self.form.rotary != "none" and not self.selection.turns_by_place
        return ["cos", "sin"] if rotates else []

    def give(self, constants: Mapping[str, np.ndarray]) -> None:
        """Open the session anew, with these inputs behind the cache."""
        self.constants = dict(constants)
        attributes = attributes_of(self.kept_as, self.selection)
        scores = self.selection.reads_scores
        self.model: Model = open_model(
            self.form, self.past, self.optional, storage=attributes, constants=constants, scores=scores
        )

    def feeds(self, feeds: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
        """Those of the next tokens that the node has."""
        names = {"query", "key", "value", "valid", *self.optional, *(["scores"] if self.selection.reads_scores else [])}
        step = part(feeds, self.tokens, self.tokens + count)
        return {name: array for name, array in step.items() if name in names}

    def attempt(self, feeds: dict[str, np.ndarray], count: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """What a step would give; the cache stays as it is."""
        return self.model.run(self.feeds(feeds, count), self.past)

    def step(self, feeds: dict[str, np.ndarray], count: int, in_place: bool = True) -> np.ndarray:
        """The result of the next tokens."""
        y, self.past = self.model.run(self.feeds(feeds, count), self.past, in_place)
        self.tokens += count
        return y

    def run(self, feeds: dict[str, np.ndarray], steps: Sequence[int], in_place: bool = True) -> np.ndarray:
        """The results of several steps, joined."""
        return np.concatenate([self.step(feeds, count, in_place) for count in steps], axis=1)

    def logged_step(self, feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, Reads]:
        """The result of one token, and what it read."""
        with logged_reads() as found:
            y = self.step(feeds, 1)
        return y, {(one.row, one.head): _tokens(one.runs) for one in found}

    def logged_run(self, feeds: dict[str, np.ndarray], count: int) -> tuple[np.ndarray, list[Reads]]:
        """The results of so many steps of one token, joined, and what each read."""
        results, reads = zip(*(self.logged_step(feeds) for _ in range(count)), strict=True)
        return np.concatenate(results, axis=1), list(reads)


def _tokens(runs: np.ndarray) -> np.ndarray:
    return np.concatenate([np.arange(begin, end) for begin, end in runs] or [np.zeros(0, int)])
