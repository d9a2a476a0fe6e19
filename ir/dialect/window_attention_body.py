"""Reference body of `CachedAttention` with selection `window`, in standard ops."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from effc.ir.dialect.cache_storage import DenseStorage
from effc.ir.dialect.cached_attention import AttentionForm, constant_values, past_values
from effc.ir.dialect.cached_attention_body import DenseBody
from effc.ir.dialect.selections import WindowSelection


class WindowBody(DenseBody):
    """Records the body of one node: a softmax over the ring and, with queries of their own, the far sinks."""

    def __init__(
        self, node: ir.Node, tape: Tape, form: AttentionForm, storage: DenseStorage, selection: WindowSelection
    ) -> None:
        super().__init__(node, tape, form, storage)
        self.selection = selection
        valid = self._op("Cast", node.inputs[3], to=int(ir.DataType.INT32))
        self.start = self._op("ArgMax", valid, axis=1, keepdims=1)
        tokens = self._integers(*range(selection.sinks))
        self.sink_slots = self._op("Add", self.start, tokens)

    def record(self) -> list[ir.Value]:
        """Record everything; the values that take the place of the outputs."""
        form = self.form
        query, key, value = self.node.inputs[:3]
        raw = [
            self._by_heads(one, heads, size)
            for one, heads, size in (
                (query, form.heads, form.head_size),
                (key, form.kv_heads, form.head_size),
                (value, form.kv_heads, form.value_size),
            )
        ]
        queries, keys = self._rotated(raw[0]), self._rotated(raw[1])
        past = past_values(self.node)
        capped = self.selection.positions == "cap"
        new = (raw[1] if capped else keys, raw[2])
        sinks = [self._sinks(old, one) for old, one in zip(past[2:], new, strict=True)]
        far = queries if self.selection.positions == "keep" else self._turned(raw[0])
        joined = [self._joined(old, one) for old, one in zip(past[:2], (keys, raw[2]), strict=True)]
        stored = [self._op("Cast", one, to=int(self.storage.dtype)) for one in (keys, raw[2])]
        present = [self._present(old, one) for old, one in zip(past[:2], stored, strict=True)]
        floats = [self._op("Cast", one, to=int(ir.DataType.FLOAT)) for one in sinks]
        scores = [self._scores(far, floats[0], self._far_mask()), self._scores(queries, joined[0], self._mask())]
        result = self._weighted(scores, [floats[1], joined[1]])
        return [result, *present, *sinks]

    def _turned(self, queries: ir.Value) -> ir.Value:
        """Queries rotated to the far position."""
        form = self.form
        rows = self._op("Concat", self.batch, self.new, self._integers(form.rotary_size // 2), axis=0)
        tables = [self._op("Expand", table, rows) for table in constant_values(self.node)]
        partial = form.rotary_size if form.rotary_size < form.head_size else 0
        interleaved = int(form.rotary == "interleaved")
        return self._op("RotaryEmbedding", queries, *tables, interleaved=interleaved, rotary_embedding_dim=partial)

    def _sinks(self, old: ir.Value, new: ir.Value) -> ir.Value:
        """The first tokens after this step; a place that has none keeps what it held."""
        place = self._op("Sub", self.sink_slots, self.past)
        here = self._op("And", self._op("GreaterOrEqual", place, self._integers(0)), self._op("Less", place, self.new))
        padding = self._integers(0, 0, 0, 0, 0, 0, 1, 0)  # a step without tokens has one to gather from
        inside = self._op(
            "Max", self._op("Min", place, self._op("Sub", self.new, self._integers(1))), self._integers(0)
        )
        index = self._op("Expand", self._op("Unsqueeze", inside, self._integers(1, 3)), self._op("Shape", old))
        found = self._op("GatherElements", self._op("Pad", new, padding), index, axis=2)
        rounded = self._op("Cast", found, to=int(self.storage.dtype))
        both = [self._op("Cast", one, to=int(ir.DataType.FLOAT)) for one in (rounded, old)]
        kept = self._op("Where", self._op("Unsqueeze", here, self._integers(1, 3)), *both)
        return self._op("Cast", kept, to=int(self.storage.dtype))

    def _far_mask(self) -> ir.Value:
        """Which sinks each query sees beyond its window, boolean [batch, 1, seq, sinks]."""
        last = self._op("Max", self._op("Sub", self.total, self._integers(1)), self._integers(0))
        slots = self._op("Min", self.sink_slots, last)
        padded = self._op(
            "Pad", self._op("Cast", self.node.inputs[3], to=int(ir.DataType.INT32)), self._integers(0, 0, 0, 1)
        )
        valid = self._op("Cast", self._op("GatherElements", padded, slots, axis=1), to=int(ir.DataType.BOOL))
        oldest = self._op("Sub", self._slots(self.past, self.total), self._integers(self.form.window))
        queries = self._op("Unsqueeze", oldest, self._integers(0, 1, 3))
        beyond = self._op("LessOrEqual", self._op("Unsqueeze", self.sink_slots, self._integers(1, 2)), queries)
        return self._op("And", beyond, self._op("Unsqueeze", valid, self._integers(1, 2)))

    def _scores(self, queries: ir.Value, keys: ir.Value, mask: ir.Value) -> ir.Value:
        """Scaled scores [batch, heads, seq, tokens], -inf where a query does not see."""
        form = self.form
        turned = self._op("Transpose", self._repeated(keys, form.head_size), perm=[0, 1, 3, 2])
        scores = self._op("Mul", self._op("MatMul", queries, turned), self._number(form.scale))
        if form.softcap:
            cap = self._number(form.softcap)
            scores = self._op("Mul", self._op("Tanh", self._op("Div", scores, cap)), cap)
        return self._op("Where", mask, scores, self._number(-np.inf))

    def _repeated(self, value: ir.Value, size: int) -> ir.Value:
        """Key or value heads once for every query head."""
        form = self.form
        groups = self._integers(1, 1, form.heads // form.kv_heads, 1, 1)
        wide = self._op("Expand", self._op("Unsqueeze", value, self._integers(2)), groups)
        return self._op("Reshape", wide, self._integers(0, form.heads, -1, size), allowzero=0)

    def _weighted(self, scores: list[ir.Value], values: list[ir.Value]) -> ir.Value:
        """Softmax over all scores, times the values, packed; a query that sees nothing gives zeros."""
        form = self.form
        joined = self._op("Concat", *scores, axis=3)
        most = self._op("Max", self._op("ReduceMax", joined, self._integers(3), keepdims=1), self._number(-1e30))
        weights = self._op("Exp", self._op("Sub", joined, most))
        sums = self._op("ReduceSum", weights, self._integers(3), keepdims=1)
        share = self._op("Div", weights, self._op("Max", sums, self._number(1e-30)))
        stacked = self._op("Concat", *(self._repeated(one, form.value_size) for one in values), axis=2)
        tokens = self._op("Transpose", self._op("MatMul", share, stacked), perm=[0, 2, 1, 3])
        return self._op("Reshape", tokens, self._integers(0, 0, form.heads * form.value_size))
