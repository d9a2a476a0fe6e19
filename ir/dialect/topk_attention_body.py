"""Reference body of `CachedAttention` with storage `dense` and selection `topk`, in standard ops."""

from __future__ import annotations

import onnx_ir as ir

from effc.ir.dialect.selected_attention_body import HIDDEN, SelectedBody
from effc.ir.dialect.selections import TopKSelection


class TopKBody(SelectedBody):
    """Tokens by the votes of all heads."""

    selection: TopKSelection

    def _cache(self, keys: ir.Value, values: ir.Value) -> tuple[list[ir.Value], list[ir.Value]]:
        joined, present = super()._cache(keys, values)
        self.keys = joined[0]
        return joined, present

    def _read(self, wanted: ir.Value) -> ir.Value:
        """Sinks, the last tokens, and those with the most votes; the same for all heads."""
        places = self._op(
            "Sub", self._range(self.total), self._op("Add", self.start, self._integers(self.selection.sinks))
        )
        inside = self._op("GreaterOrEqual", places, self._integers(0))
        middle = self._op(
            "Unsqueeze", self._op("And", inside, self._op("Less", places, self.blocks)), self._integers(1)
        )
        chosen = self._largest(self._op("Where", middle, self._votes(middle), self._number(-1)), wanted)
        return self._op("Or", self._op("Not", middle), chosen)

    def _votes(self, middle: ir.Value) -> ir.Value:
        """What all heads give each token of the middle [batch, 1, total], boolean; the same shape."""
        form = self.form
        scores = self._op("MatMul", self._newest(), self._op("Transpose", self.keys, perm=[0, 1, 3, 2]))
        scores = self._op("Mul", scores, self._number(form.scale))
        if form.softcap:
            cap = self._number(form.softcap)
            scores = self._op("Mul", self._op("Tanh", self._op("Div", scores, cap)), cap)
        valid = self._op("Unsqueeze", self.node.inputs[3], self._integers(1))
        seen = self._op("Unsqueeze", self._op("And", middle, valid), self._integers(1))
        shares = self._op("Softmax", self._op("Where", seen, scores, self._number(HIDDEN)), axis=3)
        votes = self._op(
            "ReduceSum", self._op("Where", seen, shares, self._number(0)), self._integers(1, 2), keepdims=0
        )
        return self._op("Unsqueeze", votes, self._integers(1))
