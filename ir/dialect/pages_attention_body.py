"""Reference body of `CachedAttention` with storage `dense` and selection `pages`, in standard ops."""

from __future__ import annotations

import onnx_ir as ir

from effc.ir.dialect.cached_attention import past_values
from effc.ir.dialect.selected_attention_body import HIDDEN, SelectedBody
from effc.ir.dialect.selections import PageSelection


class PagesBody(SelectedBody):
    """Blocks by their means or bounds."""

    selection: PageSelection

    def _cache(self, keys: ir.Value, values: ir.Value) -> tuple[list[ir.Value], list[ir.Value]]:
        *pairs, bounds = past_values(self.node)
        joined = [self._joined(old, new) for old, new in zip(pairs, (keys, values), strict=True)]
        stored = [self._op("Cast", new, to=int(self.storage.dtype)) for new in (keys, values)]
        present = [self._present(old, new) for old, new in zip(pairs, stored, strict=True)]
        return joined, [*present, self._present_bounds(present[0], bounds)]

    def _present_bounds(self, keys: ir.Value, past: ir.Value) -> ir.Value:
        """The means or bounds of full blocks: as they were, or of the keys; 0 of other blocks."""
        block, heads, size = self.selection.block, self.form.kv_heads, self.form.head_size
        needed = self._op("Div", self.total, self._integers(block))
        count = self._op("Max", needed, self._op("Shape", past, start=2, end=3))
        tokens = self._range(self._op("Mul", count, self._integers(block)))
        slots = self._op("Add", self.start, self._op("Add", tokens, self._integers(self.selection.sinks)))
        last = self._op("Sub", self.total, self._integers(1))
        places = self._op("Unsqueeze", self._op("Min", slots, last), self._integers(1, 3))
        span = self._op("Mul", count, self._integers(block))
        rows = self._op("Concat", self.batch, self._integers(heads), span, self._integers(size), axis=0)
        moved = self._op("GatherElements", keys, self._op("Expand", places, rows), axis=2)
        floats = self._op("Cast", moved, to=int(ir.DataType.FLOAT))
        parts = self._op("Concat", self._integers(0, 0), count, self._integers(block, size), axis=0)
        split = self._op("Reshape", floats, parts)
        names = ("ReduceMin", "ReduceMax") if self.selection.reach else ("ReduceMean",)
        found = [self._op(name, split, self._integers(3), keepdims=0) for name in names]
        old, full = (
            self._op("Unsqueeze", self._op("Less", self._range(count), blocks), self._integers(1, 3))
            for blocks in (
                self._full_blocks(self.before, self.selection.sinks),
                self._full_blocks(self._op("Sub", self.total, self.start), self.selection.sinks),
            )
        )
        floats = self._op("Cast", past, to=int(ir.DataType.FLOAT))
        room = self._op("Sub", count, self._op("Shape", past, start=2, end=3))
        pads = self._op("Concat", self._integers(*[0] * 6), room, self._integers(0), axis=0)
        made = self._op("Where", full, self._op("Concat", *found, axis=3), self._number(0))
        kept = self._op("Where", old, self._op("Pad", floats, pads), made)
        assert past.dtype is not None
        return self._op("Cast", kept, to=int(past.dtype))

    def _read(self, wanted: ir.Value) -> ir.Value:
        """Which tokens are read, boolean [batch, kv heads, total]."""
        chosen = self._largest(self._ranks(), wanted)
        zero = self._integers(0)
        begin = self._op("Add", self.start, self._integers(self.selection.sinks))
        tokens = self._op("Sub", self._range(self.total), begin)
        block = self._op("Div", self._op("Max", tokens, zero), self._integers(self.selection.block))
        middle = self._op("And", self._op("GreaterOrEqual", tokens, zero), self._op("Less", block, self.blocks))
        last = self._op("Sub", self._op("Shape", chosen, start=2, end=3), self._integers(1))
        rows = self._op("Concat", self.batch, self._integers(self.form.kv_heads), self.total, axis=0)
        places = self._op("Expand", self._op("Unsqueeze", self._op("Min", block, last), self._integers(1)), rows)
        flags = self._op("Cast", chosen, to=int(ir.DataType.INT32))
        read = self._op("Cast", self._op("GatherElements", flags, places, axis=2), to=int(ir.DataType.BOOL))
        return self._op("Or", read, self._op("Not", self._op("Unsqueeze", middle, self._integers(1))))

    def _ranks(self) -> ir.Value:
        """Ln of the largest share that a head of the group may give each block; a block that is none comes last."""
        padding = self._integers(0, 0, 0, 0, 0, 0, 1, 0)
        bounds = self._op("Pad", self._op("Cast", past_values(self.node)[2], to=int(ir.DataType.FLOAT)), padding)
        scores = self._op("Mul", self._scores(bounds), self._number(self.form.scale))
        count = self._op("Shape", bounds, start=2, end=3)
        exists = self._op("Unsqueeze", self._op("Less", self._range(count), self.blocks), self._integers(1, 2))
        scores = self._op("Where", exists, scores, self._number(HIDDEN))
        shares = self._op("Sub", scores, self._op("ReduceLogSumExp", scores, self._integers(3), keepdims=1))
        return self._op("ReduceMax", shares, self._integers(2), keepdims=0)

    def _scores(self, bounds: ir.Value) -> ir.Value:
        """Of the means, or from the middle of the bounds on the way to the largest product that they allow."""
        queries, size = self._newest(), self.form.head_size
        if not self.selection.reach:
            return self._product(queries, bounds)
        halves = self._integers(size, size)
        least, most = self.tape.op_multi_out("Split", [bounds, halves], {"axis": 3}, num_outputs=2)
        outwards = self._op("Mul", self._op("Abs", queries), self._number(self.selection.reach))
        products = [
            self._product(self._op(name, queries, outwards), side) for name, side in (("Sub", least), ("Add", most))
        ]
        return self._op("Mul", self._op("Add", *products), self._number(0.5))

    def _product(self, queries: ir.Value, rows: ir.Value) -> ir.Value:
        return self._op("MatMul", queries, self._op("Transpose", rows, perm=[0, 1, 3, 2]))
