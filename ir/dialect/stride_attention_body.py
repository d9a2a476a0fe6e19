"""Reference body of `CachedAttention` with selection `stride`, in standard ops."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from effc.ir.dialect.cache_storage import DenseStorage
from effc.ir.dialect.cached_attention import AttentionForm
from effc.ir.dialect.cached_attention_body import DenseBody
from effc.ir.dialect.selections import StrideSelection


class StrideBody(DenseBody):
    """Records the body of one node: dense attention with the pattern in its mask."""

    def __init__(
        self, node: ir.Node, tape: Tape, form: AttentionForm, storage: DenseStorage, selection: StrideSelection
    ) -> None:
        super().__init__(node, tape, form, storage)
        self.selection = selection

    def _mask(self) -> ir.Value:
        """Boolean [batch, heads, seq, total]."""
        valid = self._op("Cast", self.node.inputs[3], to=int(ir.DataType.INT32))
        start = self._op("Unsqueeze", self._op("ArgMax", valid, axis=1, keepdims=1), self._integers(1, 2))
        tokens = self._op("Sub", self._slots(self._integers(0), self.total), start)
        slots = self._op("Unsqueeze", self._slots(self.past, self.total), self._integers(1))
        queries = self._op("Sub", slots, start)
        return self._op("And", super()._mask(), self._pattern(queries, tokens))

    def _pattern(self, queries: ir.Value, tokens: ir.Value) -> ir.Value:
        """Which tokens [batch, 1, 1, total] queries [batch, 1, seq, 1] read, counted from the first of their row."""
        of, form = self.selection, self.form
        block = self._integers(of.block)
        blocks = self._op("Div", tokens, block)
        distance = self._op("Sub", self._op("Div", queries, block), blocks)
        near = self._op("Less", distance, self._integers(of.recent // of.block))
        heads = np.arange(form.heads) // (form.heads // form.kv_heads)
        offsets = self._constant((heads % of.stride).astype(np.int64).reshape(1, -1, 1, 1))
        turn = self._op("Mod", self._op("Sub", blocks, offsets), self._integers(of.stride))
        strided = self._op("Equal", turn, self._integers(0))
        sinks = self._op("Less", tokens, self._integers(of.sinks))
        return self._op("Or", self._op("Or", near, strided), sinks)
