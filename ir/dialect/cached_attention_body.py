"""Reference bodies of `CachedAttention` in standard ops."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from effc.ir.dialect.cache_storage import DenseStorage, StaticStorage
from effc.ir.dialect.cached_attention import AttentionForm, constant_values, past_values


class DenseBody:
    """Records the reference body of one node with storage `dense`.

    Args:
        node: The node.
        tape: Takes the ops.
        form: What the node computes.
        storage: How it keeps its tokens.
    """

    def __init__(self, node: ir.Node, tape: Tape, form: AttentionForm, storage: DenseStorage) -> None:
        self.node, self.tape, self.form, self.storage = node, tape, form, storage
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
        joined, present = self._cache(keys, values)
        attributes = {"scale": form.scale, "softcap": form.softcap}
        result = self._op("Attention", queries, *joined, self._mask(), **attributes)
        tokens = self._op("Transpose", result, perm=[0, 2, 1, 3])
        packed = self._op("Reshape", tokens, self._integers(0, 0, form.heads * form.value_size))
        return [packed, *present]

    def _cache(self, keys: ir.Value, values: ir.Value) -> tuple[list[ir.Value], list[ir.Value]]:
        """Keys and values to attend to, and the cache that follows."""
        pairs = list(zip(past_values(self.node), (keys, values), strict=True))
        joined = [self._joined(old, new) for old, new in pairs]
        stored = [self._op("Cast", new, to=int(self.storage.dtype)) for _, new in pairs]
        return joined, [self._present(old, new) for (old, _), new in zip(pairs, stored, strict=True)]

    def _op(self, op_type: str, *inputs: ir.Value | None, **attributes: int | float | list[int]) -> ir.Value:
        return self.tape.op(op_type, list(inputs), attributes)

    def _constant(self, array: np.ndarray) -> ir.Value:
        return self.tape.op("Constant", [], {"value": ir.Tensor(array, name="constant")})

    def _integers(self, *numbers: int) -> ir.Value:
        return self._constant(np.array(numbers, np.int64))

    def _number(self, number: float, dtype: type = np.float32) -> ir.Value:
        return self._constant(np.array(number, dtype))

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

    def _present(self, old: ir.Value, stored: ir.Value) -> ir.Value:
        """The cache with the new tokens in it."""
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


class StaticBody(DenseBody):
    """Records the reference body of one node with storage `static`: every token is read as it is stored."""

    def __init__(self, node: ir.Node, tape: Tape, form: AttentionForm, storage: StaticStorage) -> None:
        super().__init__(node, tape, form, DenseStorage())
        self.bits = storage.bits

    def _cache(self, keys: ir.Value, values: ir.Value) -> tuple[list[ir.Value], list[ir.Value]]:
        joined, present = [], []
        sizes = (self.form.head_size, self.form.value_size)
        old, scales = past_values(self.node), constant_values(self.node)
        for codes, new, scale, size in zip(old, (keys, values), scales, sizes, strict=True):
            stored = self._encoded(new, scale, size)
            cached = self._op("Slice", codes, self._integers(0), self.past, self._integers(2))
            joined.append(self._decoded(self._op("Concat", cached, stored, axis=2), scale, size))
            present.append(self._present(codes, stored))
        return joined, present

    def _encoded(self, value: ir.Value, scale: ir.Value, size: int) -> ir.Value:
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        rounded = self._op("Round", self._op("Div", value, scale))
        codes = self._op("Clip", rounded, self._number(low, np.float32), self._number(high, np.float32))
        if self.bits == 8:
            return self._op("Cast", codes, to=int(ir.DataType.INT8))
        raised = self._op("Cast", self._op("Sub", codes, self._number(low, np.float32)), to=int(ir.DataType.UINT8))
        pairs = self._op("Reshape", raised, self._integers(0, 0, -1, size // 2, 2))
        even, odd = (self._op("Gather", pairs, self._number(index, np.int64), axis=4) for index in (0, 1))
        moved = self.tape.op("BitShift", [odd, self._number(4, np.uint8)], {"direction": "LEFT"})
        return self._op("BitwiseOr", even, moved)

    def _decoded(self, codes: ir.Value, scale: ir.Value, size: int) -> ir.Value:
        if self.bits == 8:
            return self._op("Mul", self._op("Cast", codes, to=int(ir.DataType.FLOAT)), scale)
        even = self._op("BitwiseAnd", codes, self._number(15, np.uint8))
        odd = self.tape.op("BitShift", [codes, self._number(4, np.uint8)], {"direction": "RIGHT"})
        last = self._integers(4)
        pairs = self._op("Concat", *(self._op("Unsqueeze", part, last) for part in (even, odd)), axis=4)
        flat = self._op("Reshape", pairs, self._integers(0, 0, -1, size))
        values = self._op("Sub", self._op("Cast", flat, to=int(ir.DataType.FLOAT)), self._number(8, np.float32))
        return self._op("Mul", values, scale)
