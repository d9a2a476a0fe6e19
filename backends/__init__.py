"""Backends: each lowers a `Program` and writes an engine folder for one target."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from difflib import get_close_matches

from effc.backends.base import Backend
from effc.errors import MissingDependencyError, UsageError

_BACKENDS = {
    "ort-cpu": "effc.backends.onnxruntime.cpu:OnnxRuntimeCpu",
}
"""Target name -> `module:class`, imported when asked for."""


@dataclass(frozen=True)
class TargetStatus:
    """Whether engines of a target can be built here, and if not, why."""

    available: bool
    reason: str


def backend(target: str) -> Backend:
    """The backend of a target.

    Raises:
        UsageError: No such target; the message lists them.
        MissingDependencyError: The target exists, but what it needs is not installed.
    """
    if target not in _BACKENDS:
        near = get_close_matches(target, _BACKENDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"unknown target {target!r}.{hint} Targets: {', '.join(sorted(_BACKENDS))}.")
    module, _, attribute = _BACKENDS[target].partition(":")
    try:
        chosen: Backend = getattr(importlib.import_module(module), attribute)()
        return chosen
    except ImportError as error:
        raise MissingDependencyError(f"target {target!r} cannot be loaded: {error}.") from error


def targets() -> dict[str, TargetStatus]:
    """Every target with its status on this machine."""
    statuses = {}
    for name in _BACKENDS:
        try:
            reason = backend(name).unavailable()
        except MissingDependencyError as error:
            reason = str(error)
        statuses[name] = TargetStatus(available=not reason, reason=reason)
    return statuses
