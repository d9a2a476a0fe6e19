"""Optional dependencies of the frontends: asked for by name, and kept quiet."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

from effc.errors import MissingDependencyError


def require(module: str, reason: str) -> ModuleType:
    """Import an optional dependency of the `torch` extra.

    Raises:
        MissingDependencyError: It is not installed, or does not load.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f'{reason} needs `{module}`, which does not load ({error}). Run `pip install "effc[torch]"`.'
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no log lines below errors from any library in this block.

    Everything the user must know goes into the notes of the program, not into other libraries' logs.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def offline_and_quiet() -> Iterator[None]:
    """`quiet`, and no network and no progress bars from transformers and huggingface_hub in this block."""
    names = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS")
    saved = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        with quiet(), _no_progress_bars():
            yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    try:
        from transformers.utils import logging as transformers_logging
    except ImportError:
        yield
        return
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
