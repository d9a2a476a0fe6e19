"""Splits products with very large weights by rows, so that no step holds such a weight widened and transposed."""

from __future__ import annotations

import onnx_ir as ir

BLOCK = 1024
"""Rows of a block are a multiple of this, so that onnxruntime's product adds in the same order as it does unsplit."""
WORK_BYTES = 10
"""Bytes a weight element takes while its product runs: stored in two, widened and transposed in four each."""


def split_large_products(graph: ir.Graph, limit: int) -> int:
    """Rewrite `MatMul(x, Transpose([Cast](W)))` with W [N, K] beyond the limit as products with blocks of rows, joined.

    A block reads its rows from the stored weight when it is needed. Products of other forms are left alone.

    Args:
        graph: Edited in place.
        limit: Bytes one block may take, stored, widened and transposed together.

    Returns:
        Number of products that were split.
    """
    count = 0
    for node in list(graph):
        found = _large_weight(node, limit)
        if found is not None:
            _split(graph, node, *found, limit)
            count += 1
    return count


def _large_weight(node: ir.Node, limit: int) -> tuple[ir.Value, ir.Node, ir.Node | None] | None:
    """The weight, the Transpose and the Cast of a product that is too large, None for any other node."""
    if node.domain != "" or node.op_type != "MatMul" or node.inputs[1] is None:
        return None
    transpose = node.inputs[1].producer()
    if transpose is None or transpose.op_type != "Transpose" or transpose.inputs[0] is None:
        return None
    cast = transpose.inputs[0].producer()
    weight = transpose.inputs[0] if cast is None else cast.inputs[0]
    if weight is None or weight.const_value is None or not weight.is_initializer():
        return None
    if (cast is not None and cast.op_type != "Cast") or len(weight.const_value.shape) != 2:
        return None
    fits = weight.const_value.size * WORK_BYTES <= limit or weight.const_value.shape.numpy()[0] <= BLOCK
    return None if fits else (weight, transpose, cast)


def _split(
    graph: ir.Graph, product: ir.Node, weight: ir.Value, transpose: ir.Node, cast: ir.Node | None, limit: int
) -> None:
    tensor = weight.const_value
    assert tensor is not None
    rows, columns = tensor.shape.numpy()
    step = max(1, limit // (WORK_BYTES * columns) // BLOCK) * BLOCK
    parts: list[ir.Value] = []
    # A rest below a block joins the one before it.
    starts = [start for start in range(0, rows, step) if start == 0 or rows - start >= BLOCK]
    for start, end in zip(starts, [*starts[1:], rows]):
        block = _rows(tensor, start, end, f"{product.outputs[0].name}.rows{start}")
        graph.register_initializer(block)
        nodes = [] if cast is None else [ir.node("Cast", [block], cast.attributes)]
        nodes.append(ir.node("Transpose", [nodes[-1].outputs[0] if nodes else block], transpose.attributes))
        nodes.append(ir.node("MatMul", [product.inputs[0], nodes[-1].outputs[0]]))
        graph.insert_before(product, nodes)
        parts.append(nodes[-1].outputs[0])
    joined = ir.node("Concat", parts, {"axis": -1})
    graph.insert_before(product, joined)
    joined.outputs[0].type, joined.outputs[0].shape = product.outputs[0].type, product.outputs[0].shape
    product.outputs[0].replace_all_uses_with(joined.outputs[0], replace_graph_outputs=True)
    name, product.outputs[0].name = product.outputs[0].name, f"{product.outputs[0].name}.whole"
    joined.outputs[0].name = name
    graph.remove(product, safe=True)


def _rows(tensor: ir.TensorProtocol, start: int, end: int, name: str) -> ir.Value:
    shape = ir.Shape([end - start, *tensor.shape.numpy()[1:]])

    def read() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy()[start:end].copy(), dtype=tensor.dtype, shape=shape, name=name)

    lazy = ir.LazyTensor(read, dtype=tensor.dtype, shape=shape, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=lazy)
