"""Write the masks of `Attention` in one short form, shared by all layers.

A mask that is understood completely (`effc.ir.analysis.masks`) is rebuilt from token positions:

    keep = key <= query  [and key > query - window]  [and padding]        bool[batch or 1, 1, seq, total]

and a mask that says nothing but causal becomes `is_causal`. A mask with a part that is not understood stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effc.ir.analysis.masks import MaskMeaning, mask_meaning
from effc.ir.rewrite import sizes
from effc.ir.rewrite.constants import new_constant, new_integers
from effc.ir.rewrite.dataflow import attribute_int
from effc.ir.rewrite.edit import insert_value
from effc.ir.rewrite.sizes import Size, shape_of
from effc.passes.canonical.shape_arithmetic import SizeSources


@dataclass(frozen=True)
class _Extent:
    """Sizes of the axes of the scores of one attention."""

    queries: Size
    keys: Size


def rebuild_mask(graph: ir.Graph, node: ir.Node, sources: SizeSources) -> bool:
    """Rebuild the mask of one `Attention`. Returns whether it was understood."""
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is None or attribute_int(node, "is_causal", 0):
        return False
    meaning, extent = mask_meaning(mask), _extent(node)
    if meaning is None or extent is None or not _expressible(meaning, extent, sources):
        return False
    causal = meaning.upper is not None and sizes.same(meaning.upper, sizes.subtract(extent.keys, extent.queries))
    if causal and meaning.lower is None and meaning.padding is None:
        node.replace_input_with(3, None)
        node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
        return True
    new = _built(graph, node, meaning, extent, sources)
    if new is not None:
        node.replace_input_with(3, new)
    else:
        node.replace_input_with(3, None)
    return True


def _extent(node: ir.Node) -> _Extent | None:
    q, k = shape_of(node.inputs[0]), shape_of(node.inputs[1])
    past = shape_of(node.inputs[4]) if len(node.inputs) > 4 else None
    if q is None or k is None or len(q) != 4 or len(k) != 4:
        return None
    return _Extent(q[2], sizes.add(past[2], k[2]) if past is not None else k[2])


def _expressible(meaning: MaskMeaning, extent: _Extent, sources: SizeSources) -> bool:
    wanted = [extent.queries, extent.keys]
    if meaning.upper is not None:
        wanted.append(meaning.upper)
    if meaning.lower is not None and not isinstance(_width(meaning), int):
        return False
    return all(isinstance(size, int) or sources.knows(size) for size in wanted)


def _width(meaning: MaskMeaning) -> Size:
    """Distance of the lower bound below the upper one (below the query itself when there is no upper one)."""
    assert meaning.lower is not None
    return sizes.subtract(meaning.upper if meaning.upper is not None else 0, meaning.lower)


def _built(
    graph: ir.Graph, node: ir.Node, meaning: MaskMeaning, extent: _Extent, sources: SizeSources
) -> ir.Value | None:
    band = _band(graph, node, meaning, extent, sources)
    if meaning.padding is None:
        return band
    padding = insert_value(node, "Unsqueeze", [meaning.padding, new_integers(graph, 1, 2)])
    if band is not None:
        return insert_value(node, "And", [padding, band])
    rows = insert_value(node, "Concat", [sources.vector(extent.queries), sources.vector(extent.keys)], {"axis": 0})
    return insert_value(node, "Expand", [padding, rows])


def _band(
    graph: ir.Graph, node: ir.Node, meaning: MaskMeaning, extent: _Extent, sources: SizeSources
) -> ir.Value | None:
    """`bool[queries, keys]`: key positions against query positions; None without bounds."""
    if meaning.upper is None and meaning.lower is None:
        return None
    zero, one = (new_constant(graph, np.array(number, dtype=np.int64)) for number in (0, 1))
    keys = insert_value(node, "Range", [zero, sources.scalar(extent.keys), one])
    first = meaning.upper if meaning.upper is not None else 0
    last = sources.scalar(sizes.add(first, extent.queries)) if sources.knows(sizes.add(first, extent.queries)) else None
    if last is None:
        last = insert_value(node, "Add", [sources.scalar(first), sources.scalar(extent.queries)])
    rows = insert_value(node, "Range", [sources.scalar(first), last, one])
    queries = insert_value(node, "Unsqueeze", [rows, new_integers(graph, 1)])
    band = insert_value(node, "LessOrEqual", [keys, queries]) if meaning.upper is not None else None
    if meaning.lower is None:
        return band
    width = _width(meaning)
    assert isinstance(width, int)
    oldest = insert_value(node, "Sub", [queries, new_constant(graph, np.array(width, dtype=np.int64))])
    recent = insert_value(node, "Greater", [keys, oldest])
    return recent if band is None else insert_value(node, "And", [band, recent])
