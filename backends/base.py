"""What a backend is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from effc.ir.program import Program
from effc.runtime.bundle import Manifest

Progress = Callable[[str, int, int], None]
"""Called with a stage name, the bytes done and the bytes in all (0 when unknown)."""


class Backend(ABC):
    """Turns a program into an engine folder for one target.

    Class attributes:
        name: Target name.
    """

    name: ClassVar[str]

    @abstractmethod
    def unavailable(self) -> str:
        """Why engines of this target cannot be built here; empty when they can."""

    @abstractmethod
    def static_caches(self, program: Program) -> list[str]:
        """Names of the attentions whose caches have static scales and that the target stores by itself."""

    @abstractmethod
    def lower_static_caches(self, program: Program) -> None:
        """Hand those caches to the target, in place."""

    @abstractmethod
    def lower(self, program: Program, *, portable: bool) -> Program:
        """The program in the ops this target runs; a new program, the given one stays as it is.

        Args:
            program: The program after its passes.
            portable: Standard ops only: the bodies of all `effc` ops are inlined.
        """

    @abstractmethod
    def write(self, program: Program, folder: Path, *, portable: bool, progress: Progress | None = None) -> Manifest:
        """Write a lowered program into an empty folder: graph, weights, assets.

        Returns:
            The manifest, complete but for `files` and `bytes.engine`, which the caller fills when all files
            are there.
        """
