"""Proof that coded weights are the source's weights: decode each one and compare SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from effc.errors import ContractError
from effc.ir.dialect.stored_weight import StoredWeight, reads_stored_weight, stored_weight
from effc.ir.program import Program
from effc.kernels import codec
from effc.passes.base import Pass, PassReport
from effc.passes.instruments import Instrument


class WeightCheck(Instrument):
    """After a pass that codes weights: every decoded tensor has the SHA-256 of its source."""

    def after(self, one: Pass, program: Program, report: PassReport) -> Mapping[str, Any]:
        """Decode and compare; one weight is in memory at a time.

        Raises:
            ContractError: Some tensor decodes to other bytes.
        """
        expected = {entry["name"]: entry["sha256"] for entry in report.details.get("tensors", ()) if "sha256" in entry}
        if not expected:
            return {}
        return {"weights_identical": compare_weights(coded_weights(program.graph), expected)}


def coded_weights(graph: ir.Graph) -> dict[str, StoredWeight]:
    """Every coded weight of a graph by the name of the weight it codes."""
    found = {}
    for node in graph.all_nodes():
        if reads_stored_weight(node):
            weight = stored_weight(node)
            if weight.layout != "raw":
                found[weight.name] = weight
    return found


def compare_weights(coded: Mapping[str, StoredWeight], expected: Mapping[str, str]) -> int:
    """Compare the SHA-256 of decoded weights with those of their sources.

    Returns:
        Number of weights compared, all equal.

    Raises:
        ContractError: A weight is missing or decodes to other bytes.
    """
    for name, digest in expected.items():
        if name not in coded:
            raise ContractError(f"weight {name!r}: was reported as coded and is not in the graph.")
        if weight_digest(coded[name]) != digest:
            raise ContractError(f"weight {name!r}: decodes to other bytes than its source has. Please report this.")
    return len(expected)


def weight_digest(weight: StoredWeight) -> str:
    """SHA-256 of the bytes a coded weight decodes to, hexadecimal."""
    array = np.ascontiguousarray(codec.decode(weight.read()))
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
