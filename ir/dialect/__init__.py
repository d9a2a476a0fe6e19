"""The `effc` dialect: one op a file, found by name.

Every op has a check of its node, type inference and a reference body made of standard ops; the body is the
op's meaning.
"""

from __future__ import annotations

import importlib
from functools import cache

import onnx_ir as ir

from effc.errors import InputError
from effc.ir.dialect.base import DOMAIN, DialectOp

_OPS = {
    "CachedAttention": "effc.ir.dialect.cached_attention",
    "CodedMatMul": "effc.ir.dialect.coded_matmul",
    "CodedGather": "effc.ir.dialect.coded_gather",
    "DecodeWeight": "effc.ir.dialect.decode_weight",
}


def op_names() -> list[str]:
    """Names of all ops of the dialect."""
    return sorted(_OPS)


@cache
def dialect_op(name: str) -> DialectOp:
    """The op of a name.

    Raises:
        InputError: The dialect has no such op.
    """
    if name not in _OPS:
        raise InputError(f"the effc dialect has no op {name!r}. Ops: {', '.join(op_names())}.")
    return importlib.import_module(_OPS[name]).OP


def is_dialect_node(node: ir.Node) -> bool:
    """Whether a node is an op of the dialect."""
    return node.domain == DOMAIN


def infer_dialect_types(graph: ir.Graph) -> None:
    """Check every dialect node of the graph and set the types and shapes of its outputs."""
    for node in graph.all_nodes():
        if is_dialect_node(node):
            dialect_op(node.op_type).infer(node)
