"""Native kernels: the loader of `libeffc` and the codec of weights.

This package needs numpy only. The library also is the custom-op library of onnxruntime: pass
`library_path()` to `SessionOptions.register_custom_ops_library`.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from effc.errors import MissingDependencyError

__all__ = [
    "available_isas",
    "isa",
    "library_path",
    "live_weights",
    "load",
    "quantized_tokens",
    "read_bandwidth",
    "select_isa",
]

_ABI_VERSION = 2


def library_path() -> Path:
    """Return the path of the native library.

    Raises:
        MissingDependencyError: The library was not built.
    """
    path = Path(__file__).resolve().parent / "_lib" / "libeffc.so"
    if not path.is_file():
        raise MissingDependencyError(
            f"the native kernels are not built: {path} is missing — build them with "
            "`cmake -S kernels -B kernels/build && cmake --build kernels/build`, or reinstall effc on "
            "a machine with cmake and a C++20 compiler"
        )
    return path


@functools.cache
def load() -> ctypes.CDLL:
    """Load the native library once.

    Raises:
        MissingDependencyError: The library is missing, cannot be loaded, or is of another version.
    """
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
        version = int(library.effc_abi_version())
    except (OSError, AttributeError) as error:
        raise MissingDependencyError(f"{path} cannot be loaded: {error} — build the kernels again") from error
    if version != _ABI_VERSION:
        raise MissingDependencyError(
            f"{path} has interface version {version}, this effc needs {_ABI_VERSION} — build the kernels again"
        )
    library.effc_live_weights.restype = ctypes.c_int64
    library.effc_quantized_tokens.restype = ctypes.c_int64
    library.effc_read_bandwidth.restype = ctypes.c_double
    for name in ("effc_isa_list", "effc_isa", "effc_last_error"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def available_isas() -> list[str]:
    """Instruction sets that this machine runs, best first (of avx512, avx2, neon, scalar)."""
    return str(load().effc_isa_list().decode()).split(",")


def isa() -> str:
    """The instruction set in use: the best one, or the one that `EFFC_ISA` or `select_isa` names.

    Raises:
        ValueError: `EFFC_ISA` names an instruction set that this machine lacks.
    """
    name = load().effc_isa()
    if name is None:
        raise ValueError(load().effc_last_error().decode())
    return str(name.decode())


def select_isa(name: str) -> None:
    """Use instruction set `name` from now on; kernels of existing sessions keep theirs.

    Raises:
        ValueError: This machine lacks it.
    """
    library = load()
    if library.effc_select_isa(name.encode()) != 0:
        raise ValueError(library.effc_last_error().decode())


def read_bandwidth(nbytes: int = 1 << 29, threads: int = 2, rounds: int = 5) -> float:
    """Bytes per second that `threads` threads read from a buffer of `nbytes`, the best of `rounds`."""
    result = float(load().effc_read_bandwidth(ctypes.c_int64(nbytes), ctypes.c_int32(threads), ctypes.c_int32(rounds)))
    if result < 0:
        raise MemoryError(f"no buffer of {nbytes} bytes for the bandwidth measurement")
    return result


def live_weights() -> int:
    """Weights that open onnxruntime sessions hold; nodes that share initializers count once."""
    return int(load().effc_live_weights())


def quantized_tokens() -> int:
    """Tokens coded into pages since the library was loaded, each counted for every row and key head."""
    return int(load().effc_quantized_tokens())
