"""`CachedAttention(query, key, value, valid, bias?, cos?, sin?, *past) -> y, *present`: attention with its cache.

`docs/cached-attention.md` gives the exact meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from effc.errors import InputError
from effc.ir.dialect.base import DOMAIN, DialectOp
from effc.ir.dialect.cache_storage import DenseStorage, HeadSizes, PageStorage, Storage

INT, FLOAT, STRING, INTS = (getattr(ir.AttributeType, name) for name in ("INT", "FLOAT", "STRING", "INTS"))
OPERANDS = ("query", "key", "value", "valid", "bias", "cos", "sin")
"""Inputs in front of the cache; the last three are optional."""
ROTARY = ("none", "half", "interleaved")
NO_STORAGE: dict[str, int | str | tuple[int, ...]] = {
    "ring": 0,
    "sinks": 0,
    "recent": 0,
    "page": 0,
    "key_scheme": "none",
    "value_scheme": "none",
    "key_bits": (),
    "value_bits": (),
    "key_group": 0,
    "value_group": 0,
    "salient": 0,
    "importance": "none",
}
"""Attributes of storages, as a storage without them has them."""


@dataclass(frozen=True)
class AttentionForm:
    """What a `CachedAttention` computes, apart from how it keeps its tokens.

    Attributes:
        heads: Query heads, a multiple of `kv_heads`.
        kv_heads: Key and value heads.
        head_size: Elements of a query or key head.
        value_size: Elements of a value head.
        scale: Factor on the scores.
        softcap: Softcap of the scores; 0: none.
        causal: A query sees slots up to its own.
        window: A query sees this many slots at most, its own included; 0: no window.
        rotary: `none`, `half` or `interleaved`.
        rotary_size: Rotated elements; 0 with `none`.

    Raises:
        InputError: A value that the op does not have.
    """

    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    scale: float
    softcap: float = 0.0
    causal: bool = True
    window: int = 0
    rotary: str = "none"
    rotary_size: int = 0

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_size", "value_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.heads % self.kv_heads:
            raise InputError(f"heads is {self.heads}, it must be a multiple of kv_heads, which is {self.kv_heads}")
        if not np.isfinite(self.scale) or not np.isfinite(self.softcap) or self.softcap < 0 or self.window < 0:
            raise InputError("scale must be finite, softcap and window finite and not negative")
        if self.rotary not in ROTARY:
            raise InputError(f"rotary is {self.rotary!r}, it must be one of {', '.join(ROTARY)}")
        rotated = 0 < self.rotary_size <= self.head_size and self.rotary_size % 2 == 0
        if rotated != (self.rotary != "none") or (self.rotary == "none" and self.rotary_size):
            raise InputError(f"rotary_size is {self.rotary_size}, it must be even and at most head_size, 0 for none")

    @property
    def sizes(self) -> HeadSizes:
        """Sizes the cache depends on."""
        return HeadSizes(self.kv_heads, self.head_size, self.value_size)


class CachedAttention(DialectOp):
    """Attention over a cache and the new tokens, and the cache that follows."""

    name = "CachedAttention"
    attributes = {
        **dict.fromkeys(("heads", "kv_heads", "head_size", "value_size"), INT),
        "scale": FLOAT,
        "softcap": FLOAT,
        "causal": INT,
        "window": INT,
        "rotary": STRING,
        "rotary_size": INT,
        "storage": STRING,
        **{name: {int: INT, str: STRING, tuple: INTS}[type(value)] for name, value in NO_STORAGE.items()},
    }

    def check(self, node: ir.Node) -> None:
        """Refuse attributes outside their ranges, and tensors that do not fit them."""
        super().check(node)
        try:
            form, storage = attention_form(node), cache_storage(node)
            _check_operands(node, form, storage)
        except InputError as error:
            raise InputError(f"node {node.name!r}: CachedAttention: {error}.") from error

    def output_types(self, node: ir.Node) -> Sequence[tuple[ir.DataType, ir.Shape | None]]:
        """The result, and the cache for `total` tokens."""
        form, storage = attention_form(node), cache_storage(node)
        query, valid = node.inputs[0], node.inputs[3]
        assert query is not None and valid is not None
        result = None
        if query.shape is not None:
            result = ir.Shape([query.shape[0], query.shape[1], form.heads * form.value_size])
        types: list[tuple[ir.DataType, ir.Shape | None]] = [(ir.DataType.FLOAT, result)]
        for tensor in storage.tensors(form.sizes):
            shape = None
            if valid.shape is not None:
                batch, total = valid.shape
                shape = ir.Shape([_size(axis, batch, total) for axis in tensor.shape])
            types.append((tensor.dtype, shape))
        return types

    def body(self, node: ir.Node, tape: Tape) -> Sequence[ir.Value]:
        """Join past and new tokens, attend with a mask, keep what the storage keeps."""
        storage = cache_storage(node)
        if not isinstance(storage, DenseStorage):
            raise InputError(
                f"node {node.name!r}: CachedAttention with storage={storage.kind} has no body in standard ops, so a "
                "portable engine cannot have it. Write a native engine, or leave the pass kv-cache out."
            )
        return _Body(node, tape, storage).record()


OP = CachedAttention()


def cached_attention(
    operands: Sequence[ir.Value],
    past: Sequence[ir.Value],
    form: AttentionForm,
    storage: Storage,
    *,
    bias: ir.Value | None = None,
    tables: tuple[ir.Value, ir.Value] | None = None,
    name: str | None = None,
) -> ir.Node:
    """A new `CachedAttention` node, its outputs typed.

    Args:
        operands: Query, key, value and valid.
        past: The tensors of the cache.
        form: What it computes.
        storage: How it keeps its tokens.
        bias: Added to the scaled scores.
        tables: Cosines and sines of the new tokens, with rotary.
        name: Of the node.

    Raises:
        InputError: They do not fit each other.
    """
    inputs = [*operands, bias, *(tables or (None, None)), *past]
    attributes = _attributes(form, storage)
    node = ir.Node(DOMAIN, "CachedAttention", inputs, attributes, num_outputs=1 + len(past), name=name)
    OP.infer(node)
    return node


def attention_form(node: ir.Node) -> AttentionForm:
    """What a node computes."""
    of = node.attributes
    integers = {key: of[key].as_int() for key in ("heads", "kv_heads", "head_size", "value_size", "window")}
    return AttentionForm(
        **integers,
        scale=of["scale"].as_float(),
        softcap=of["softcap"].as_float(),
        causal=bool(of["causal"].as_int()),
        rotary=of["rotary"].as_string(),
        rotary_size=of["rotary_size"].as_int(),
    )


def cache_storage(node: ir.Node) -> Storage:
    """How a node keeps its tokens.

    Raises:
        InputError: The storage is unknown, or an attribute is out of its range.
    """
    of, kind = node.attributes, node.attributes["storage"].as_string()
    past = past_values(node)
    dtype = past[0].dtype if past else None
    if dtype is None:
        raise InputError("its first cache tensor has no type")
    if kind == DenseStorage.kind:
        return DenseStorage(dtype, of["ring"].as_int())
    if kind != PageStorage.kind:
        raise InputError(f"storage is {kind!r}, it must be {DenseStorage.kind} or {PageStorage.kind}")
    integers = {
        key: of[key].as_int() for key in ("sinks", "recent", "page", "key_group", "value_group", "salient", "window")
    }
    words = {key: of[key].as_string() for key in ("key_scheme", "value_scheme", "importance")}
    bits = {key: tuple(of[key].as_ints()) for key in ("key_bits", "value_bits")}
    options: dict[str, Any] = {**integers, **words, **bits}
    return PageStorage(dtype=dtype, **options)


def past_values(node: ir.Node) -> list[ir.Value]:
    """The tensors of the cache a node reads."""
    return [value for value in node.inputs[len(OPERANDS) :] if value is not None]


def _attributes(form: AttentionForm, storage: Storage) -> list[ir.Attr]:
    values: dict[str, int | float | str | tuple[int, ...]] = {
        "heads": form.heads,
        "kv_heads": form.kv_heads,
        "head_size": form.head_size,
        "value_size": form.value_size,
        "scale": float(form.scale),
        "softcap": float(form.softcap),
        "causal": int(form.causal),
        "window": form.window,
        "rotary": form.rotary,
        "rotary_size": form.rotary_size,
        "storage": storage.kind,
        **NO_STORAGE,
        **storage.attributes(),
    }
    return [ir.Attr(name, OP.attributes[name], value) for name, value in values.items()]


def _size(axis: int | str, batch: ir.SymbolicDim | int, total: ir.SymbolicDim | int) -> ir.SymbolicDim | int:
    """An axis of a cache tensor once it holds `total` tokens."""
    if isinstance(axis, int):
        return axis
    if axis == "batch":
        return batch
    page = int(axis.partition("//")[2] or 1)
    if page == 1 or isinstance(total, int):
        return total if page == 1 else int(total) // page  # type: ignore[arg-type]
    return ir.SymbolicDim(None) if total.value is None else ir.SymbolicDim(f"{total.value} // {page}")


def _check_operands(node: ir.Node, form: AttentionForm, storage: Storage) -> None:
    missing = [name for name, value in zip(OPERANDS[:4], node.inputs) if value is None]
    if missing or len(node.inputs) <= len(OPERANDS):
        raise InputError(f"it needs {', '.join(OPERANDS[:4])} and the tensors of a cache")
    if (form.rotary != "none") != (node.inputs[5] is not None) or (node.inputs[5] is None) != (node.inputs[6] is None):
        raise InputError("it needs cos and sin with rotary, and has none without")
    widths = (form.heads * form.head_size, form.kv_heads * form.head_size, form.kv_heads * form.value_size)
    for name, value, width in zip(OPERANDS, node.inputs, widths):
        _check_axes(name, value, ("batch", "seq", width))
    _check_axes("valid", node.inputs[3], ("batch", "total"))
    if isinstance(storage, DenseStorage) and storage.ring and not 0 < form.window <= storage.ring:
        raise InputError(
            f"a ring of {storage.ring} places needs a window from 1 to {storage.ring}, it is {form.window}"
        )
    past, expected = past_values(node), storage.tensors(form.sizes)
    if len(past) != len(expected) or len(node.outputs) != 1 + len(past):
        raise InputError(f"storage={storage.kind} has {len(expected)} tensors, as inputs and as outputs")
    for value, tensor in zip(past, expected, strict=True):
        if value.dtype is not None and value.dtype != tensor.dtype:
            raise InputError(f"{tensor.name} is {value.dtype.name}, it must be {tensor.dtype.name}")
        _check_axes(tensor.name, value, tensor.shape)


def _check_axes(name: str, value: ir.Value | None, expected: Sequence[int | str]) -> None:
    """Compare the axes that are numbers on both sides; a growing axis may have any size."""
    if value is None or value.shape is None:
        return
    text = ", ".join(map(str, expected))
    if len(value.shape) != len(expected):
        raise InputError(f"{name} has {len(value.shape)} axes, it must be [{text}]")
    for actual, wanted in zip(value.shape, expected, strict=True):
        if isinstance(actual, int) and isinstance(wanted, int) and actual != wanted:
            raise InputError(f"{name} is {value.shape}, it must be [{text}]")


class _Body:
    """Records the reference body of one node with storage `dense`."""

    def __init__(self, node: ir.Node, tape: Tape, storage: DenseStorage) -> None:
        self.node, self.tape, self.storage = node, tape, storage
        self.form = attention_form(node)
        query, _, _, valid = node.inputs[:4]
        self.batch = self._op("Shape", valid, start=0, end=1)
        self.total = self._op("Shape", valid, start=1, end=2)
        self.new = self._op("Shape", query, start=1, end=2)
        self.past = self._op("Sub", self.total, self.new)
        self.held = self._op("Min", self.past, self._integers(storage.ring)) if storage.ring else self.past

    def record(self) -> list[ir.Value]:
        """Record everything; the values that take the place of the outputs."""
        form = self.form
        query, key, value = self.node.inputs[:3]
        queries = self._rotated(self._by_heads(query, form.heads, form.head_size))
        keys = self._rotated(self._by_heads(key, form.kv_heads, form.head_size))
        values = self._by_heads(value, form.kv_heads, form.value_size)
        joined = [self._joined(old, new) for old, new in zip(past_values(self.node), (keys, values), strict=True)]
        attributes = {"scale": form.scale, "softcap": form.softcap}
        result = self._op("Attention", queries, *joined, self._mask(), **attributes)
        tokens = self._op("Transpose", result, perm=[0, 2, 1, 3])
        packed = self._op("Reshape", tokens, self._integers(0, 0, form.heads * form.value_size))
        present = [self._present(old, new) for old, new in zip(past_values(self.node), (keys, values), strict=True)]
        return [packed, *present]

    def _op(self, op_type: str, *inputs: ir.Value | None, **attributes: int | float | list[int]) -> ir.Value:
        return self.tape.op(op_type, list(inputs), attributes)

    def _constant(self, array: np.ndarray) -> ir.Value:
        return self.tape.op("Constant", [], {"value": ir.Tensor(array, name="constant")})

    def _integers(self, *numbers: int) -> ir.Value:
        return self._constant(np.array(numbers, np.int64))

    def _by_heads(self, value: ir.Value | None, heads: int, size: int) -> ir.Value:
        split = self._op("Reshape", value, self._integers(0, 0, heads, size))
        return self._op("Transpose", split, perm=[0, 2, 1, 3])

    def _rotated(self, value: ir.Value) -> ir.Value:
        form = self.form
        if form.rotary == "none":
            return value
        rows = self._op("Concat", self.batch, self.new, self._integers(form.rotary_size // 2), axis=0)
        tables = [self._op("Expand", table, rows) for table in self.node.inputs[5:7]]
        partial = form.rotary_size if form.rotary_size < form.head_size else 0
        interleaved = int(form.rotary == "interleaved")
        return self._op("RotaryEmbedding", value, *tables, interleaved=interleaved, rotary_embedding_dim=partial)

    def _slots(self, start: ir.Value, end: ir.Value) -> ir.Value:
        """`start`, …, `end - 1` from two integers [1]."""
        scalar = self._constant(np.array([], np.int64))
        bounds = [self._op("Reshape", bound, scalar) for bound in (start, end)]
        return self._op("Range", *bounds, self._constant(np.array(1, np.int64)))

    def _joined(self, old: ir.Value, new: ir.Value) -> ir.Value:
        """Cached tokens in the order of their slots and the new ones, in fp32."""
        if self.storage.ring:
            slots = self._slots(self._op("Sub", self.past, self.held), self.past)
            cached = self._op("Gather", old, self._op("Mod", slots, self._integers(self.storage.ring)), axis=2)
        else:
            cached = self._op("Slice", old, self._integers(0), self.past, self._integers(2))
        return self._op("Concat", self._op("Cast", cached, to=int(ir.DataType.FLOAT)), new, axis=2)

    def _mask(self) -> ir.Value:
        """Which of the joined tokens each query sees, boolean, or the bias with -inf elsewhere."""
        bias, first = self.node.inputs[4], self._op("Sub", self.past, self.held)
        valid = self._last(self.node.inputs[3], first, 1)
        seen = self._op("Unsqueeze", valid, self._integers(1, 2))
        queries = self._op("Unsqueeze", self._slots(self.past, self.total), self._integers(1))
        keys = self._slots(first, self.total)
        if self.form.causal:
            seen = self._op("And", seen, self._op("LessOrEqual", keys, queries))
        if self.form.window:
            oldest = self._op("Sub", queries, self._integers(self.form.window))
            seen = self._op("And", seen, self._op("Greater", keys, oldest))
        if bias is not None:
            return self._op("Where", seen, self._last(bias, first, 3), self._constant(np.array(-np.inf, np.float32)))
        rows = self._op("Concat", self._integers(1, 1), self.new, self._integers(1), axis=0)
        return self._op("Expand", seen, rows)

    def _last(self, value: ir.Value | None, first: ir.Value, axis: int) -> ir.Value:
        """The part of an axis of slots that is at hand."""
        if not self.storage.ring:
            assert value is not None
            return value
        return self._op("Slice", value, first, self.total, self._integers(axis))

    def _present(self, old: ir.Value, new: ir.Value) -> ir.Value:
        """The cache with the new tokens in it."""
        stored = self._op("Cast", new, to=int(self.storage.dtype))
        axis = self._integers(2)
        if not self.storage.ring:
            end = self._integers(np.iinfo(np.int64).max)
            kept = self._op("Slice", old, self._integers(0), self.past, axis)
            spare = self._op("Slice", old, self.total, end, axis)
            return self._op("Concat", kept, stored, spare, axis=2)
        ring = self._integers(self.storage.ring)
        places = self._integers(*range(self.storage.ring))
        newest = self._op("Sub", self.total, self._integers(1))
        slots = self._op("Sub", newest, self._op("Mod", self._op("Sub", newest, places), ring))
        fresh = self._op("Add", self._op("Sub", slots, self.past), ring)
        chosen = self._op("Where", self._op("GreaterOrEqual", slots, self.past), fresh, places)
        return self._op("Gather", self._op("Concat", old, stored, axis=2), chosen, axis=2)
