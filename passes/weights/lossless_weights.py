"""The `lossless-weights` pass: entropy-codes the exponents of stored weights, bit for bit reversible."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from effc.errors import UsageError
from effc.ir.dialect import is_dialect_node
from effc.ir.dialect.stored_weight import StoredWeight, raw_weight, replace_weight, stored_weight
from effc.ir.program import Program
from effc.ir.store import Store, content_key
from effc.ir.weights import tensor_shape
from effc.kernels import codec
from effc.passes.base import Contract, LeftAlone, Match, Pass, PassReport, Site
from effc.passes.weights.coded_files import FORMAT_VERSION, load_tensors, save_tensors
from effc.passes.weights.runtime_layout import runtime_layout
from effc.passes.weights.stored_weights import MIN_BYTES, StoredWeights


@dataclass(frozen=True)
class LosslessWeights(Pass):
    """Entropy-code weights without changing a bit.

    The exponents of trained weights carry about 2.6 of their 8 bits; signs and mantissas are close to random. So
    each 2-D weight is split: signs and mantissas are stored as they are, exponents are coded. On disk they are a
    canonical length-limited Huffman code (about 10.6 bits per bf16 weight), in memory fixed-length ranks with escapes
    (12.06 bits, or 11.2 to 11.4 with the 3-bit layout), which the product decodes in registers.

    Before:

        y = effc.CodedMatMul(x, weight) {layout="raw"}

    After:

        y = effc.CodedMatMul(x, sign_mantissa, code_lengths, stream, chunk_offsets) {layout="huffman"}

    Attributes:
        layout: `huffman` stores the dense form, transcoded to ranks when the engine is loaded; `rank4` and `rank3`
            store the ranks themselves, which are mapped from the file without any work at load.
        min_saving: Least part of a weight's stored bytes that coding must save.
        min_bytes: Smaller weights are left alone.
        skip: Glob patterns of weight names to leave alone, joined by `|`.

    Source: Zhang et al. 2025 (DFloat11, arXiv 2504.11651) for the split and the entropy of exponents.
    """

    name: ClassVar[str] = "lossless-weights"
    contract: ClassVar[Contract] = Contract.EXACT
    layout: Literal["huffman", "rank4", "rank3"] = "huffman"
    min_saving: float = field(default=0.08, metadata={"range": "0 to below 1"})
    min_bytes: int = field(default=MIN_BYTES, metadata={"range": "0 or more"})
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.min_saving < 1:
            raise UsageError(f"min-saving is {self.min_saving}, it must be from 0 to below 1.")
        if self.min_bytes < 0:
            raise UsageError(f"min-bytes is {self.min_bytes}, it must not be negative.")

    def requires(self) -> Sequence[Pass]:
        """Weights must be read by ops that know the coded layouts."""
        return (StoredWeights(min_bytes=self.min_bytes, skip=self.skip),)

    def match(self, program: Program) -> Match:
        """Measure every raw stored weight; a tied weight is one site."""
        sites, left = [], []
        for value in _raw_weights(program.graph):
            reason, prediction = self._reason(value)
            if reason:
                left.append(LeftAlone(str(value.name), reason))
            else:
                sites.append(Site(str(value.name), (value, prediction)))
        return Match(sites, left + self._unread(program))

    def apply(self, program: Program, sites: Sequence[Site]) -> PassReport:
        """Code each weight once and let all its readers read the coded form."""
        store = Store()
        tensors = []
        for site in sites:
            value, prediction = site.payload
            coded, digest = self._coded(value, store)
            replace_weight(program.graph, raw_weight(value), coded)
            tensors.append({**_figures(value, prediction, coded), "sha256": digest})
        return PassReport([site.name for site in sites], details={"tensors": tensors, "layout": self.layout})

    def _unread(self, program: Program) -> list[LeftAlone]:
        """Weights that `stored-weights` did not take, with its reason; for integers also what coding would gain."""
        left = []
        stored = {value.name for value in _raw_weights(program.graph)}
        for item in self.requires()[0].match(program).left:
            if item.site in stored:
                continue
            tensor = program.graph.initializers[item.site].const_value
            gain = "" if tensor is None else _integer_gain(tensor)
            left.append(LeftAlone(item.site, item.reason + gain))
        return left

    def _reason(self, value: ir.Value) -> tuple[str, Any]:
        """Why a weight is left alone, empty when it is not; and what coding it would give."""
        tensor = value.const_value
        assert tensor is not None
        if any(fnmatchcase(str(value.name), pattern) for pattern in self.skip):
            return "skipped by the option `skip`", None
        if tensor.nbytes < self.min_bytes:
            return f"{tensor.nbytes} bytes, below min-bytes={self.min_bytes}", None
        dtype = codec.dtype_name(tensor.dtype.numpy())
        if self.layout != "huffman" and tensor.dtype == ir.DataType.FLOAT16:
            return f"fp16 gains nothing from the layout {self.layout!r}; use layout=huffman", None
        rows, columns = tensor_shape(tensor)
        prediction = codec.predict(codec.exponent_histogram(tensor.numpy()), dtype, (rows, columns))
        bits = tensor.dtype.bitwidth
        saving = 1 - _bits(prediction, self.layout) / bits
        if saving < self.min_saving:
            return (
                f"coding would save {100 * saving:.1f} % (entropy {prediction.entropy_bits:.2f} of {bits} bits), "
                f"below min-saving={self.min_saving:g}"
            ), prediction
        return "", prediction

    def _coded(self, value: ir.Value, store: Store) -> tuple[StoredWeight, str]:
        """The coded weight as initializers that read from the store, and the SHA-256 of the source bytes."""
        tensor = value.const_value
        assert tensor is not None
        array = np.ascontiguousarray(tensor.numpy())
        digest = hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
        key = content_key(
            what="coded weight",
            weight=digest,
            shape=array.shape,
            dtype=tensor.dtype.name,
            layout=self.layout,
            format=FORMAT_VERSION,
        )
        parts = codec.tensor_names(self.layout, codec.dtype_name(tensor.dtype.numpy()))
        path = store.find(key) or save_tensors(store, key, codec.encode(array, self.layout).tensors)
        tensors = load_tensors(path, [f"{value.name}.{part}" for part in parts])
        rows, columns = array.shape
        values = tuple(_initializer(tensor) for tensor in tensors)
        return StoredWeight(self.layout, tensor.dtype, rows, columns, values), digest


def _raw_weights(graph: ir.Graph) -> list[ir.Value]:
    """Initializers that dialect nodes read in the `raw` layout, in graph order, each once."""
    found: dict[ir.Value, None] = {}
    for node in graph.all_nodes():
        if is_dialect_node(node) and node.attributes.get_string("layout") == "raw":
            found.setdefault(stored_weight(node).tensors[0])
    return list(found)


def _initializer(tensor: ir.TensorProtocol) -> ir.Value:
    return ir.Value(
        name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor_shape(tensor)), const_value=tensor
    )


def _integer_gain(tensor: ir.TensorProtocol) -> str:
    """What entropy coding of an integer weight would save, as the end of a sentence; empty for other dtypes."""
    if not tensor.dtype.is_integer() or tensor.size == 0:
        return ""
    _, counts = np.unique(tensor.numpy(), return_counts=True)
    share = counts / counts.sum()
    entropy = float(-(share * np.log2(share)).sum())
    bits = tensor.dtype.bitwidth
    return f"; its values carry {entropy:.2f} of {bits} bits, so coding could save {100 * (1 - entropy / bits):.1f} %"


def _bits(prediction: codec.Prediction, layout: str) -> float:
    return {
        "huffman": prediction.storage_bits,
        "rank4": prediction.rank4_bits,
        "rank3": prediction.rank3_bits,
    }[layout]


def _runtime_bits(prediction: codec.Prediction, dtype: ir.DataType) -> float:
    """Bits per weight once the engine is loaded: the layout the kernels transcode to."""
    return {"rank4": prediction.rank4_bits, "rank3": prediction.rank3_bits, "raw": float(dtype.bitwidth)}[
        runtime_layout(codec.dtype_name(dtype.numpy()))
    ]


def _figures(value: ir.Value, prediction: codec.Prediction, coded: StoredWeight) -> dict[str, Any]:
    """JSON-ready figures of one coded weight."""
    tensor = value.const_value
    assert tensor is not None
    return {
        "name": str(value.name),
        "shape": [coded.rows, coded.columns],
        "dtype": codec.dtype_name(tensor.dtype.numpy()),
        "bytes": tensor.nbytes,
        "stored_bytes": sum(part.const_value.nbytes for part in coded.tensors if part.const_value is not None),
        "entropy_bits": round(prediction.entropy_bits, 4),
        "storage_bits": round(prediction.storage_bits, 4),
        "runtime_bits": round(_runtime_bits(prediction, tensor.dtype), 4),
    }
