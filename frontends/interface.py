"""What a model looks like from outside: the module to trace, example inputs, names of inputs, outputs and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from effc.ir.program import Task

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Interface:
    """A module with positional tensor inputs, ready for `torch.export`.

    Attributes:
        task: What the model is for.
        module: The wrapper that is traced; the model is its attribute `model`.
        inputs: Input name -> example tensor, in order. Sizes of dynamic axes are at least 2, so none is specialised.
        axes: For each input, axis -> size name.
        outputs: Output names, in order.
        variadic: How many of the last inputs `forward` takes as `*tensors`.
        notes: What was decided, one sentence each.
    """

    task: Task
    module: torch.nn.Module
    inputs: Mapping[str, torch.Tensor]
    axes: tuple[Mapping[int, str], ...]
    outputs: tuple[str, ...]
    variadic: int = 0
    notes: tuple[str, ...] = ()
