"""Facts about this machine that decide what effc can do here, and what to install for the rest."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from effc import __version__
from effc.errors import EffcError

REQUIRED = (
    "onnx",
    "onnx-ir",
    "onnxscript",
    "numpy",
    "networkx",
    "click",
    "rich",
    "safetensors",
    "tokenizers",
    "ml_dtypes",
    "jinja2",
)
OPTIONAL = {"torch": "torch", "transformers": "torch", "gguf": "torch"}
"""Package that some models need -> the extra of effc that installs it."""
GPU_TIMEOUT = 10.0


def environment() -> dict[str, Any]:
    """The facts of `effc doctor`.

    Returns:
        `version`, `isa` (instruction set the kernels run with, or None), `isas` (all they could run with),
        `kernels` (path of the library, or None), `onnxruntime` (version or None), `gpu` (names, empty without
        one), `targets` (name -> `available`, `reason`), `python`, `platform`, `cores`, `packages`
        (name -> version or None) and `missing` (list of `what`, `why`, `install`).
    """
    kernels = _kernels()
    packages = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    runtime = _version("onnxruntime") or _version("onnxruntime-gpu")
    facts = {
        "version": __version__,
        "isa": kernels["isa"],
        "isas": kernels["isas"],
        "kernels": kernels["path"],
        "onnxruntime": runtime,
        "gpu": gpu_names(),
        "targets": _targets(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count() or 1,
        "packages": packages,
    }
    return {**facts, "missing": _missing(packages, runtime, kernels)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _kernels() -> dict[str, Any]:
    try:
        from effc import kernels

        path = kernels.library_path()
        facts = {"isas": list(kernels.available_isas()), "path": str(path)}
    except (EffcError, ImportError, OSError) as error:
        return {"isa": None, "isas": [], "path": None, "reason": str(error), "install": _build_command()}
    try:
        return {**facts, "isa": kernels.isa(), "reason": "", "install": ""}
    except ValueError as error:
        return {**facts, "isa": None, "reason": str(error), "install": "set EFFC_ISA to one of them, or unset it"}


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs that `nvidia-smi` reports; none where it is not installed or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=GPU_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        # A driver that does not answer leaves nothing to run on.
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def _targets() -> dict[str, dict[str, Any]]:
    try:
        from effc.backends import targets
    except ImportError as error:
        return {"ort-cpu": {"available": False, "reason": str(error)}}
    return {name: asdict(status) for name, status in targets().items()}


def _missing(packages: dict[str, str | None], runtime: str | None, kernels: dict[str, Any]) -> list[dict[str, str]]:
    missing = [
        {"what": name, "why": "effc imports it", "install": f"pip install {name}"}
        for name in REQUIRED
        if packages[name] is None
    ]
    if runtime is None:
        missing.append({"what": "onnxruntime", "why": "engines run on it", "install": "pip install onnxruntime"})
    missing += [
        {
            "what": name,
            "why": "Hugging Face, GGUF and torch models are read with it",
            "install": f"pip install 'effc[{extra}]'",
        }
        for name, extra in OPTIONAL.items()
        if packages[name] is None
    ]
    if kernels["reason"]:
        missing.append({"what": "kernels", "why": kernels["reason"], "install": kernels["install"]})
    return missing


def _build_command() -> str:
    here = importlib.util.find_spec("effc")
    where = "make kernels" if here is not None and here.origin and "site-packages" not in here.origin else ""
    return where or "pip install --force-reinstall --no-deps effc (needs a C++20 compiler)"
