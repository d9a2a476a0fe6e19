"""External data of ONNX files: every reference checked, then read lazily.

A reference must stay in the model's folder. A link is followed only where the model file itself is one and both end
in the same folder, which is how the Hugging Face cache lays files out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx_ir as ir

from effc.errors import InputError
from effc.ir.weights import file_tensor


@dataclass(frozen=True)
class ExternalFolder:
    """Where external data may lie.

    Attributes:
        model: What to call the model in errors.
        folder: The model's folder.
        linked: The folder the model file's link ends in, or None for a plain file.
    """

    model: str
    folder: Path
    linked: Path | None = None

    @classmethod
    def of_file(cls, path: Path) -> ExternalFolder:
        """The rules for a model file."""
        return cls(str(path), path.parent, path.resolve().parent if path.is_symlink() else None)

    def resolve(self, location: str, tensor: str) -> Path:
        """The file a location names, links resolved.

        Raises:
            InputError: It leaves the folder, or is no plain file.
        """
        pure = PurePosixPath(location)
        unsafe = pure.is_absolute() or ".." in pure.parts or "\0" in location or not pure.parts
        if unsafe or PureWindowsPath(location).is_absolute() or "\\" in location:
            raise self.refused(tensor, f"points to {location!r}, outside the model's folder", "Do not use this model.")
        path = self.folder / location
        resolved = path.resolve()
        inside = resolved.is_relative_to(self.folder.resolve()) or resolved.parent == self.linked
        if not inside:
            raise self.refused(tensor, f"points to {location!r}, a link out of the folder", "Do not use this model.")
        if not resolved.is_file():
            raise self.refused(tensor, f"points to {location!r}, which is missing", "Copy or download it as well.")
        return resolved

    def refused(self, tensor: str, what: str, remedy: str) -> InputError:
        """An error about one external tensor."""
        return InputError(f"{self.model}: external tensor {tensor!r} {what}. {remedy}")


def open_external(model: ir.Model, folder: ExternalFolder) -> list[Path]:
    """Replace every external tensor of a model by a checked lazy one.

    Returns:
        The files that are read, without repetition, in order of first use.

    Raises:
        InputError: A reference leaves the folder, is missing, or does not fit its file.
    """
    files: dict[Path, None] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _checked(value.const_value, folder, files)
    for node in model.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            tensor = attribute.value
            if attribute.type is ir.AttributeType.TENSOR and isinstance(tensor, ir.ExternalTensor):
                node.attributes[name] = ir.AttrTensor(name, _checked(tensor, folder, files))
    return list(files)


def _checked(tensor: ir.ExternalTensor, folder: ExternalFolder, files: dict[Path, None]) -> ir.TensorProtocol:
    name = tensor.name or "unnamed"
    shape = tuple(tensor.shape)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise folder.refused(name, f"has the shape {list(shape)}", "The model is damaged: export it again.")
    path = folder.resolve(str(tensor.location), name)
    offset, size = tensor.offset or 0, path.stat().st_size
    needed = -(-tensor.size * tensor.dtype.bitwidth // 8)
    if tensor.length is not None and tensor.length != needed:
        what = f"is {tensor.dtype.name}{list(shape)}, {needed} bytes, but claims {tensor.length}"
        raise folder.refused(name, what, "The model is damaged: export it again.")
    if offset < 0 or offset + needed > size:
        what = f"needs bytes {offset} to {offset + needed} of {path.name}, which has {size}"
        raise folder.refused(name, what, "The file is truncated: copy or download it again.")
    files[path] = None
    return file_tensor(path, offset, tensor.dtype, shape, name)  # type: ignore[arg-type]
