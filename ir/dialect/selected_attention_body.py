"""Reference bodies of `CachedAttention` with storage `dense` whose steps of one token read what they choose."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from effc.ir.dialect.cache_storage import DenseStorage
from effc.ir.dialect.cached_attention import AttentionForm
from effc.ir.dialect.cached_attention_body import DenseBody
from effc.ir.dialect.selections import PageSelection, TopKSelection

HIDDEN = float(np.finfo(np.float32).min)


class SelectedBody(DenseBody):
    """Records the body of one node: attention over all tokens, with the mask of those that are read."""

    def __init__(
        self,
        node: ir.Node,
        tape: Tape,
        form: AttentionForm,
        storage: DenseStorage,
        selection: PageSelection | TopKSelection,
    ) -> None:
        super().__init__(node, tape, form, storage)
        self.selection = selection
        self.block = selection.block if isinstance(selection, PageSelection) else 1
        valid = self._op("Cast", node.inputs[3], to=int(ir.DataType.INT32))
        self.start = self._op("ArgMax", valid, axis=1, keepdims=1)
        self.before = self._op("Max", self._op("Sub", self.past, self.start), self._integers(0))
        self.blocks = self._full_blocks(self.before, selection.sinks + selection.recent)

    @abstractmethod
    def _read(self, wanted: ir.Value) -> ir.Value:
        """Which tokens a step of one token reads, boolean [batch, kv heads or 1, total]."""

    def _full_blocks(self, tokens: ir.Value, others: int) -> ir.Value:
        rest = self._op("Max", self._op("Sub", tokens, self._integers(others)), self._integers(0))
        return self._op("Div", rest, self._integers(self.block))

    def _range(self, count: ir.Value) -> ir.Value:
        return self._slots(self._integers(0), count)

    def _mask(self) -> ir.Value:
        """What `DenseBody` sees and, in a step of one token, the selection reads."""
        one = self._op("Equal", self.new, self._integers(1))
        wanted = self._wanted()
        everything = self._op("GreaterOrEqual", wanted, self.blocks)
        few = self._op("Less", self.before, self._integers(self.selection.dense_below))
        everything = self._op("Or", self._op("Or", everything, few), self._op("Not", one))
        read = self._op("Or", self._read(wanted), self._op("Unsqueeze", everything, self._integers(1)))
        group = self.form.heads // self.form.kv_heads
        rows = self._op("Concat", self.batch, self._integers(self.form.kv_heads), self.total, axis=0)
        by_group = self._op("Unsqueeze", self._op("Expand", read, rows), self._integers(2, 3))
        sizes = self._op("Concat", self._integers(1, 1, group, 1, 1), axis=0)
        heads = self._op("Concat", self.batch, self._integers(self.form.heads, 1), self.total, axis=0)
        return self._op("And", super()._mask(), self._op("Reshape", self._op("Expand", by_group, sizes), heads))

    def _wanted(self) -> ir.Value:
        """Blocks that a row reads, [batch, 1]."""
        least = max(1, self.selection.budget // self.block)
        share = self._constant(np.array(np.float32(self.selection.share), np.float64))
        count = self._op("Ceil", self._op("Mul", self._op("Cast", self.blocks, to=int(ir.DataType.DOUBLE)), share))
        return self._op("Max", self._op("Cast", count, to=int(ir.DataType.INT64)), self._integers(least))

    def _newest(self) -> ir.Value:
        """The query of the last token, [batch, kv heads, group, head size]; zeros in a step without tokens."""
        form = self.form
        query = self._rotated(self._by_heads(self.node.inputs[0], form.heads, form.head_size))
        newest = self._op("Slice", query, self._integers(-1), self._integers(np.iinfo(np.int64).max), self._integers(2))
        newest = self._op("ReduceSum", newest, self._integers(2), keepdims=1)
        group = self._integers(0, form.kv_heads, form.heads // form.kv_heads, form.head_size)
        return self._op("Reshape", newest, group)

    def _largest(self, ranks: ir.Value, wanted: ir.Value) -> ir.Value:
        """Which of the ranks [batch, heads, n] are among the `wanted` [batch, 1] largest ones of their row, boolean."""
        count = self._op("Shape", ranks, start=2, end=3)
        _, order = self.tape.op_multi_out("TopK", [ranks, count], {"axis": 2}, num_outputs=2)
        among = self._op("Unsqueeze", self._op("Less", self._range(count), wanted), self._integers(1))
        flags = self._op("Expand", self._op("Cast", among, to=int(ir.DataType.FLOAT)), self._op("Shape", ranks))
        return self._op("Greater", self._op("ScatterElements", ranks, order, flags, axis=2), self._number(0.5))
