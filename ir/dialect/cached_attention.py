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
from effc.ir.dialect.cache_storage import DenseStorage, HeadSizes, PageStorage, StateTensor, StaticStorage, Storage
from effc.ir.dialect.selections import (
    SELECTIONS,
    AllTokens,
    PageSelection,
    StrideSelection,
    TokenSelection,
    TopKSelection,
    WindowSelection,
)

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
NO_SELECTION: dict[str, int | float | str] = {
    "select_sinks": 0,
    "select_recent": 0,
    "select_block": 0,
    "select_budget": 0,
    "select_share": 0.0,
    "dense_below": 0,
    "select_refresh": 0,
    "select_similarity": 0.0,
    "select_reach": 0.0,
    "select_positions": "none",
    "select_pool": 0,
    "select_stride": 0,
}
"""Attributes of selections, as those without them have them."""


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
        return HeadSizes(self.kv_heads, self.head_size, self.value_size, self.heads)


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
        "selection": STRING,
        **{name: {int: INT, float: FLOAT, str: STRING}[type(value)] for name, value in NO_SELECTION.items()},
    }

    def check(self, node: ir.Node) -> None:
        """Refuse attributes outside their ranges, and tensors that do not fit them."""
        super().check(node)
        try:
            form, storage, selection = attention_form(node), cache_storage(node), token_selection(node)
            _check_selection(node, form, storage, selection)
            _check_operands(node, form, storage, selection)
        except InputError as error:
            raise InputError(f"node {node.name!r}: CachedAttention: {error}.") from error

    def output_types(self, node: ir.Node) -> Sequence[tuple[ir.DataType, ir.Shape | None]]:
        """The result, and the cache for `total` tokens."""
        form = attention_form(node)
        query, valid = node.inputs[0], node.inputs[3]
        assert query is not None and valid is not None
        result = None
        if query.shape is not None:
            result = ir.Shape([query.shape[0], query.shape[1], form.heads * form.value_size])
        types: list[tuple[ir.DataType, ir.Shape | None]] = [(ir.DataType.FLOAT, result)]
        for tensor in cache_tensors(form, cache_storage(node), token_selection(node)):
            shape = None
            if valid.shape is not None:
                batch, total = valid.shape
                shape = ir.Shape([_size(axis, batch, total) for axis in tensor.shape])
            types.append((tensor.dtype, shape))
        return types

    def body(self, node: ir.Node, tape: Tape) -> Sequence[ir.Value]:
        """Join past and new tokens, attend with a mask, keep what the storage keeps."""
        from effc.ir.dialect.cached_attention_body import DenseBody, StaticBody
        from effc.ir.dialect.pages_attention_body import PagesBody
        from effc.ir.dialect.stride_attention_body import StrideBody
        from effc.ir.dialect.topk_attention_body import TopKBody
        from effc.ir.dialect.window_attention_body import WindowBody

        form, storage, selection = attention_form(node), cache_storage(node), token_selection(node)
        if isinstance(storage, DenseStorage) and isinstance(selection, PageSelection):
            return PagesBody(node, tape, form, storage, selection).record()
        if isinstance(storage, DenseStorage) and isinstance(selection, TopKSelection) and not selection.refresh:
            return TopKBody(node, tape, form, storage, selection).record()
        if isinstance(storage, DenseStorage) and isinstance(selection, WindowSelection):
            return WindowBody(node, tape, form, storage, selection).record()
        if isinstance(storage, DenseStorage) and isinstance(selection, StrideSelection):
            return StrideBody(node, tape, form, storage, selection).record()
        if isinstance(storage, DenseStorage) and isinstance(selection, AllTokens):
            return DenseBody(node, tape, form, storage).record()
        if isinstance(storage, StaticStorage):
            return StaticBody(node, tape, form, storage).record()
        if isinstance(storage, DenseStorage):
            raise _no_body(node, f"selection={selection.kind}", "sparse-attention")
        raise _no_body(node, f"storage={storage.kind}", "kv-cache")


OP = CachedAttention()


def cached_attention(
    operands: Sequence[ir.Value],
    past: Sequence[ir.Value],
    form: AttentionForm,
    storage: Storage,
    *,
    selection: TokenSelection = AllTokens(),  # noqa: B008 - frozen
    bias: ir.Value | None = None,
    tables: tuple[ir.Value, ir.Value] | None = None,
    constants: Sequence[ir.Value] = (),
    name: str | None = None,
) -> ir.Node:
    """A new `CachedAttention` node, its outputs typed.

    Args:
        operands: Query, key, value and valid.
        past: The tensors of the cache.
        form: What it computes.
        storage: How it keeps its tokens.
        selection: Which of them it reads.
        bias: Added to the scaled scores.
        tables: Cosines and sines of the new tokens, with rotary, unless the selection turns tokens by place.
        constants: Behind the cache: scales of keys and values with storage `static`, cosines and sines of far queries
            with a selection `window` that moves sinks, inputs of the graph with a selection `clusters`; those of all
            places, and scores, with a selection `retain`.
        name: Of the node.

    Raises:
        InputError: They do not fit each other.
    """
    inputs = [*operands, bias, *(tables or (None, None)), *past, *constants]
    attributes = _attributes(form, storage, selection)
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
    if kind == StaticStorage.kind:
        return StaticStorage(_one_width(of["key_bits"].as_ints(), of["value_bits"].as_ints()))
    if kind != PageStorage.kind:
        kinds = ", ".join(one.kind for one in (DenseStorage, PageStorage, StaticStorage))
        raise InputError(f"storage is {kind!r}, it must be one of {kinds}")
    integers = {
        key: of[key].as_int() for key in ("sinks", "recent", "page", "key_group", "value_group", "salient", "window")
    }
    words = {key: of[key].as_string() for key in ("key_scheme", "value_scheme", "importance")}
    bits = {key: tuple(of[key].as_ints()) for key in ("key_bits", "value_bits")}
    options: dict[str, Any] = {**integers, **words, **bits}
    return PageStorage(dtype=dtype, **options)


def token_selection(node: ir.Node) -> TokenSelection:
    """Which tokens a node reads.

    Raises:
        InputError: The selection is unknown, or an attribute is out of its range.
    """
    of, kind = node.attributes, node.attributes["selection"].as_string()
    if kind not in SELECTIONS:
        raise InputError(f"selection is {kind!r}, it must be one of {', '.join(SELECTIONS)}")
    return SELECTIONS[kind].read(of)


def cache_tensors(form: AttentionForm, storage: Storage, selection: TokenSelection) -> tuple[StateTensor, ...]:
    """The tensors of the cache, in order: those of the storage, then those of the selection."""
    return (*storage.tensors(form.sizes), *selection.tensors(storage, form.sizes))


def past_values(node: ir.Node) -> list[ir.Value]:
    """The tensors of the cache a node reads; scales that follow them are not among them."""
    first = len(OPERANDS)
    return [value for value in node.inputs[first : first + len(node.outputs) - 1] if value is not None]


def constant_values(node: ir.Node) -> list[ir.Value]:
    """The inputs behind the cache: scales of a storage `static`, or angles and scores that the selection reads."""
    return [value for value in node.inputs[len(OPERANDS) + len(node.outputs) - 1 :] if value is not None]


def has_no_kernel(node: ir.Node) -> bool:
    """Whether a node has a form that is always lowered to something else: a cache with static scales."""
    return node.op_type == OP.name and node.attributes["storage"].as_string() == StaticStorage.kind


def _no_body(node: ir.Node, what: str, pass_name: str) -> InputError:
    return InputError(
        f"node {node.name!r}: CachedAttention with {what} has no body in standard ops, so a portable engine cannot "
        f"have it. Write a native engine, or leave the pass {pass_name} out."
    )


def _one_width(key_bits: Sequence[int], value_bits: Sequence[int]) -> int:
    if len(set(key_bits) | set(value_bits)) != 1 or len(key_bits) != 2 or len(value_bits) != 2:
        raise InputError(f"key_bits is {list(key_bits)} and value_bits {list(value_bits)}, static needs one number")
    return key_bits[0]


def _attributes(form: AttentionForm, storage: Storage, selection: TokenSelection) -> list[ir.Attr]:
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
        "selection": selection.kind,
        **NO_SELECTION,
        **selection.attributes(),
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


def _check_selection(node: ir.Node, form: AttentionForm, storage: Storage, selection: TokenSelection) -> None:
    if isinstance(selection, AllTokens):
        return
    reason = selection.reason_against(form, storage) or ("it has a bias" if node.inputs[4] is not None else "")
    if reason:
        raise InputError(f"selection={selection.kind}: {reason}")


def _check_operands(node: ir.Node, form: AttentionForm, storage: Storage, selection: TokenSelection) -> None:
    missing = [name for name, value in zip(OPERANDS[:4], node.inputs) if value is None]
    if missing or len(node.inputs) <= len(OPERANDS):
        raise InputError(f"it needs {', '.join(OPERANDS[:4])} and the tensors of a cache")
    rotated = form.rotary != "none" and not selection.turns_by_place
    if any(rotated != (value is not None) for value in node.inputs[5:7]):
        raise InputError("it needs cos and sin with rotary, and has none without, or where it turns tokens by place")
    widths = (form.heads * form.head_size, form.kv_heads * form.head_size, form.kv_heads * form.value_size)
    for name, value, width in zip(OPERANDS, node.inputs, widths):
        _check_axes(name, value, ("batch", "seq", width))
    _check_axes("valid", node.inputs[3], ("batch", "total"))
    ring = storage.ring if isinstance(storage, DenseStorage) and selection.keeps_slots else 0
    if ring and not 0 < form.window <= ring:
        raise InputError(f"a ring of {ring} places needs a window from 1 to {ring}, it is {form.window}")
    past, expected = past_values(node), cache_tensors(form, storage, selection)
    if len(past) != len(expected) or len(node.outputs) != 1 + len(past):
        kinds = f"storage={storage.kind} with selection={selection.kind}"
        raise InputError(f"{kinds} has {len(expected)} tensors, as inputs and as outputs")
    for value, tensor in zip(past, expected, strict=True):
        if value.dtype is not None and value.dtype != tensor.dtype:
            raise InputError(f"{tensor.name} is {value.dtype.name}, it must be {tensor.dtype.name}")
        _check_axes(tensor.name, value, tensor.shape)
    _check_constants(constant_values(node), form, storage, selection)


def _check_constants(
    constants: Sequence[ir.Value], form: AttentionForm, storage: Storage, selection: TokenSelection
) -> None:
    wanted: dict[str, tuple[int | str, ...]] = {}
    if isinstance(storage, StaticStorage):
        sizes = {"key scale": form.head_size, "value scale": form.value_size}
        wanted = {name: (1, form.kv_heads, 1, size) for name, size in sizes.items()}
    wanted |= selection.constants(form)
    if len(constants) != len(wanted):
        kinds = f"storage={storage.kind} with selection={selection.kind}"
        raise InputError(f"{kinds} has {len(wanted)} inputs behind its cache, there are {len(constants)}")
    for value, (name, axes) in zip(constants, wanted.items(), strict=True):
        _check_axes(name, value, axes)


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
