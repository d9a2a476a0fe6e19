"""Cosines and sines of fixed positions, as a model's own rotation has them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effc.ir.analysis.cached_attention import CachedAttentionSite
from effc.ir.rewrite.constants import constant_tensor, new_constant
from effc.ir.rewrite.dataflow import read_values
from effc.passes.canonical.constant_folding import evaluate

POSITIONS = "position_ids"


class FarAngles:
    """Makes the angles of fixed positions, once for every rotation and range of them.

    Args:
        graph: The graph of all sites.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.positions = next((value for value in graph.inputs if value.name == POSITIONS), None)
        self._made: dict[tuple[ir.Value, range], ir.Value] = {}
        self._arrays: dict[ir.Value, np.ndarray] = {}

    def reason_against(self, site: CachedAttentionSite, *, constant: bool = False) -> str:
        """Why the angles of a site cannot be had at another position; empty when they can.

        Args:
            site: The attention.
            constant: They are wanted once for all, so they may depend on positions alone.
        """
        tables = site.node.inputs[5:7]
        if self.positions is None or any(table is None or not self._chain(table) for table in tables):
            return f"its rotation does not come from the input {POSITIONS}, so that of another position is unknown"
        if constant and any(not self._is_constant(table) for table in tables if table is not None):
            return f"its rotation depends on more than the input {POSITIONS}, so it is not known beforehand"
        return ""

    def at(self, site: CachedAttentionSite, positions: range) -> list[ir.Value]:
        """Cosines and sines [1, positions, rotary_size / 2].

        They are the nodes that compute the model's own, copied behind constant positions, and constants as far as
        they depend on nothing else.
        """
        return [self._table(table, positions, site.node) for table in site.node.inputs[5:7] if table is not None]

    def _table(self, table: ir.Value, positions: range, before: ir.Node) -> ir.Value:
        key = (table, positions)
        if key not in self._made:
            self._made[key] = self._copy(table, positions, before)
        return self._made[key]

    def _copy(self, table: ir.Value, positions: range, before: ir.Node) -> ir.Value:
        assert self.positions is not None
        copies = {self.positions: self._constant(np.array([positions], np.int64))}
        for node in self._chain(table):
            inputs = [copies.get(value, value) if value is not None else None for value in node.inputs]
            copy = ir.Node(
                node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs)
            )
            copies.update(zip(node.outputs, self._results(copy, before), strict=True))
        return copies[table]

    def _results(self, node: ir.Node, before: ir.Node) -> list[ir.Value]:
        """The outputs of a new node: constants where it reads nothing else."""
        if all(self._is_known(value) for value in node.inputs):
            results = [self._constant(array) for array in evaluate(node, self._arrays)]
            for place in range(len(node.inputs)):
                node.replace_input_with(place, None)
            return results
        self.graph.insert_before(before, node)
        return list(node.outputs)

    def _constant(self, array: np.ndarray) -> ir.Value:
        value = new_constant(self.graph, array)
        self._arrays[value] = array
        return value

    def _is_known(self, value: ir.Value | None) -> bool:
        return value is None or value in self._arrays or constant_tensor(value) is not None

    def _is_constant(self, table: ir.Value) -> bool:
        """Whether a table depends on positions and constants only."""
        chain = self._chain(table)
        computed = {self.positions, *(value for node in chain for value in node.outputs)}
        return all(value in computed or self._is_known(value) for node in chain for value in node.inputs)

    def _chain(self, table: ir.Value) -> list[ir.Node]:
        """The nodes between the positions and a table, in order; empty when it does not depend on them."""
        needed, stack = set(), [table]
        while stack:
            node = stack.pop().producer()
            if node is not None and node not in needed:
                needed.add(node)
                stack += [value for value in read_values(node) if value is not None]
        moved, chain = {self.positions}, []
        for node in self.graph:
            if node in needed and any(value in moved for value in read_values(node)):
                chain.append(node)
                moved.update(node.outputs)
        return chain if table in moved else []
