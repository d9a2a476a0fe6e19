"""What an op of the dialect is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.tape import Tape

from effc.errors import InputError

DOMAIN = "effc"
VERSION = 1


class DialectOp(ABC):
    """Schema, inference and reference body of one op.

    Class attributes:
        name: Op type in the domain `effc`.
        attributes: Attribute name -> type; all are required, no others are allowed.
    """

    name: ClassVar[str]
    attributes: ClassVar[dict[str, ir.AttributeType]]

    def check(self, node: ir.Node) -> None:
        """Refuse a node with missing, mistyped or unknown attributes.

        onnxruntime accepts unknown attributes and treats a mistyped one as absent, so this is the only check.

        Raises:
            InputError: With the node and the attribute.
        """
        for name, kind in self.attributes.items():
            if name not in node.attributes:
                raise InputError(f"node {node.name!r}: {self.name} needs the attribute {name!r} ({kind.name}).")
            if node.attributes[name].type != kind:
                raise InputError(
                    f"node {node.name!r}: attribute {name!r} of {self.name} is {node.attributes[name].type.name}, "
                    f"it must be {kind.name}."
                )
        for name in node.attributes:
            if name not in self.attributes:
                raise InputError(f"node {node.name!r}: {self.name} has no attribute {name!r}.")

    def infer(self, node: ir.Node) -> None:
        """Check a node and set the dtype and shape of its outputs."""
        self.check(node)
        for value, (dtype, shape) in zip(node.outputs, self.output_types(node), strict=True):
            value.dtype = dtype
            value.shape = shape

    @abstractmethod
    def output_types(self, node: ir.Node) -> Sequence[tuple[ir.DataType, ir.Shape | None]]:
        """Dtype and shape of each output; None for a shape that is not known."""

    @abstractmethod
    def body(self, node: ir.Node, tape: Tape) -> Sequence[ir.Value]:
        """Record the reference body of a node on a tape.

        Returns:
            The values that take the place of the node's outputs.

        Raises:
            InputError: The node has a form without a body; the message says which form has one.
        """
