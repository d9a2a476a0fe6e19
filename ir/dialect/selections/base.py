"""What a selection of `CachedAttention` is: which cached tokens a step reads."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

from effc.errors import InputError
from effc.ir.dialect.cache_storage import HeadSizes, StateTensor, Storage

if TYPE_CHECKING:
    from effc.ir.dialect.cached_attention import AttentionForm


@dataclass(frozen=True)
class TokenSelection(ABC):
    """A selection, checked when it is made. Its fields are attributes of the op: `sinks` is `select_sinks`, and so on.

    Class attributes:
        kind: Value of the attribute `selection`.
        keeps_slots: Whether a ring has slot j at place j mod r, so that it must hold a window.
        turns_by_place: Whether tokens are rotated by their place in the cache, so that no position exceeds the places.
        reads_scores: Whether the last input behind the cache is a score of every token, float32 [batch, total].
        prefix: Names and types of the inputs that a prefix brings, the last ones behind the cache; None: that of keys.
    """

    kind: ClassVar[str]
    keeps_slots: ClassVar[bool] = True
    turns_by_place: ClassVar[bool] = False
    reads_scores: ClassVar[bool] = False
    prefix: ClassVar[Mapping[str, ir.DataType | None]] = {}

    @classmethod
    def read(cls, attributes: Mapping[str, ir.Attr]) -> Self:
        """The selection of a node with these attributes.

        Raises:
            InputError: A value that the op does not have.
        """
        return cls(**{field.name: attributes[_attribute(field.name)].value for field in fields(cls)})

    def attributes(self) -> dict[str, int | float | str]:
        """The attributes that are not those of no selection; floats as float32 has them."""
        values = {_attribute(field.name): (getattr(self, field.name), field.default) for field in fields(self)}
        return {
            name: float(np.float32(value)) if isinstance(default, float) else value
            for name, (value, default) in values.items()
        }

    @abstractmethod
    def tensors(self, storage: Storage, sizes: HeadSizes) -> tuple[StateTensor, ...]:
        """What it carries from step to step, after the tensors of the storage."""

    def constants(self, form: AttentionForm) -> dict[str, tuple[int | str, ...]]:
        """Names and axes of its inputs behind the cache."""
        return {}

    @abstractmethod
    def reason_against(self, form: AttentionForm, storage: Storage) -> str:
        """Why an attention without a bias cannot have it; empty when it can."""

    @abstractmethod
    def read_at(self, tokens: int) -> int:
        """Tokens that a step of one token reads of this many in the cache."""

    @property
    def longest_step(self) -> int | None:
        """Most new tokens of a step; None: any number."""
        return None


def require(holds: bool, problem: str) -> None:
    """Raise InputError with the problem unless it holds."""
    if not holds:
        raise InputError(problem)


def require_between(selection: TokenSelection, names: Sequence[str], least: float, most: float = math.inf) -> None:
    """Raise InputError unless these fields are from `least` to `most`."""
    wanted = f"{least} or more" if most == math.inf else f"from {least} to {most}"
    for name in names:
        value = getattr(selection, name)
        require(least <= value <= most, f"{name} is {value}, it must be {wanted}")


def _attribute(field: str) -> str:
    return field if field == "dense_below" else f"select_{field}"
