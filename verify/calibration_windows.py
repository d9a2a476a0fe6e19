"""Cuts calibration data into windows: inputs of batch 1, without padding, at most so many tokens long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from effc.errors import InputError
from effc.runtime.bundle import Port
from effc.runtime.limits import position_limit, text_config
from effc.verify.calibration_files import (
    JSON_LINES,
    Document,
    array_rows,
    check_file,
    json_documents,
    text_blocks,
)
from effc.verify.inputs import Interface

IDS, MASK = "input_ids", "attention_mask"
MADE = frozenset({MASK, "position_ids", "token_type_ids"})
"""Inputs that follow from the tokens."""


@dataclass(frozen=True)
class Window:
    """Inputs of one run.

    Attributes:
        arrays: Input name -> array with a first axis of 1; what follows from the tokens may be absent.
    """

    arrays: Mapping[str, np.ndarray]

    @property
    def length(self) -> int:
        """Tokens; 1 where the model takes none."""
        return self.arrays[IDS].shape[1] if IDS in self.arrays else 1

    def cost(self, width: int) -> int:
        """What it takes of the tokens that may be used; a sample without tokens counts as `width`."""
        return self.length if IDS in self.arrays else width


def open_windows(path: Path, interface: Interface, tokens: int, width: int) -> Iterator[Window]:
    """The windows of a file, the last one cut so that all together have at most `tokens` tokens.

    Text of a causal language model is one stream, cut every `width` tokens, each window begun as the tokenizer begins
    a text; a line of JSON lines starts a new window. Windows of other models get all the tokenizer's special tokens.

    Raises:
        InputError: The file is refused; says where.
    """
    check_file(path)
    limit = position_limit(interface.config)
    width = width if limit is None else min(width, limit)
    left = tokens
    for window in _windows(path, interface, width):
        if IDS in window.arrays:
            window = _cut(window, 0, min(left, window.length))
        yield window
        left -= window.cost(width)
        if left <= 0:
            return


def _windows(path: Path, interface: Interface, width: int) -> Iterator[Window]:
    if path.suffix == ".npz":
        yield from _array_windows(path, interface, width)
        return
    ports = {port.name for port in interface.inputs}
    others = sorted(ports - {IDS} - MADE - interface.cache)
    if IDS not in ports or others:
        raise InputError(
            f"{path}: the model takes {', '.join(sorted(ports - interface.cache))}, which text does not give. "
            "Write arrays of these names into an .npz file."
        )
    marks = _Marks.of(interface)
    if path.suffix in JSON_LINES:
        for number, document in json_documents(path):
            where = f"{path}: line {number}"
            ids = document if isinstance(document, list) else _ids(document, interface, marks, where)
            _check_ids(ids, interface, where)
            yield from marks.windows(iter(ids), width, whole=isinstance(document, list))
        return
    yield from marks.windows(_stream(path, interface, marks), width, whole=False)


def _stream(path: Path, interface: Interface, marks: _Marks) -> Iterator[int]:
    for block in text_blocks(path):
        ids = _ids(block, interface, marks, str(path))
        _check_ids(ids, interface, str(path))
        yield from ids


def _ids(text: Document, interface: Interface, marks: _Marks, where: str) -> list[int]:
    """Ids of a text without the tokens the tokenizer puts around it."""
    if interface.tokenizer is None:
        raise InputError(
            f"{where}: is text, and the model came without a tokenizer.json. Give token ids instead: `input_ids` in "
            "JSON lines or in an .npz file."
        )
    try:
        str(text).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds characters that UTF-8 cannot express ({error.reason}).") from error
    ids = list(interface.tokenizer(str(text)))
    return ids[len(marks.before) : len(ids) - len(marks.after)]


def _check_ids(ids: list[int], interface: Interface, where: str) -> None:
    vocabulary = text_config(interface.config).get("vocab_size")
    for item in ids:
        if item < 0 or (isinstance(vocabulary, int) and item >= vocabulary):
            raise InputError(
                f"{where}: the id {item} is outside the vocabulary of {vocabulary}. Use the model's own tokenizer."
            )


@dataclass(frozen=True)
class _Marks:
    """The ids a tokenizer puts before and after a text; a model that generates gets those before only."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    generates: bool = False

    @classmethod
    def of(cls, interface: Interface) -> _Marks:
        """Found by what the tokenizer makes of nothing."""
        if interface.tokenizer is None:
            return cls(generates=interface.pad_left)
        around, begun = list(interface.tokenizer("")), list(interface.tokenizer("a"))
        count = next((i for i, (one, two) in enumerate(zip(around, begun)) if one != two), min(len(around), len(begun)))
        return cls(tuple(around[:count]), tuple(around[count:]), interface.pad_left)

    def windows(self, ids: Iterator[int], width: int, *, whole: bool) -> Iterator[Window]:
        """Windows of at most `width` ids, marks included; `whole` ids have theirs already."""
        before = () if whole else self.before
        after = () if whole or self.generates else self.after
        room = max(1, width - len(before) - len(after))
        while piece := list(islice(ids, room)):
            yield Window({IDS: np.array([[*before, *piece, *after]], np.int64)})


def _array_windows(path: Path, interface: Interface, width: int) -> Iterator[Window]:
    """Every sample of an `.npz` file; one of tokens alone is cut every `width` tokens."""
    ports = {port.name: port for port in interface.inputs if port.name not in interface.cache}
    for number, row in enumerate(array_rows(path)):
        if number == 0:
            _check_names(path, ports, row)
        where = f"{path}: sample {number}"
        sample = Window({name: _fitted(array, ports[name], f"{where}: {name}") for name, array in row.items()})
        if IDS in row:
            sample = _without_padding(sample, where)
            _check_ids(sample.arrays[IDS][0].tolist(), interface, where)
        step = width if set(row) <= {IDS, *MADE} else sample.length
        yield from (_cut(sample, start, start + step) for start in range(0, sample.length, step))


def _check_names(path: Path, ports: Mapping[str, Port], row: Mapping[str, np.ndarray]) -> None:
    taken = f"The model takes {', '.join(sorted(ports))}."
    unknown = sorted(row.keys() - ports.keys())
    if unknown:
        raise InputError(f"{path}: has arrays of unknown names: {', '.join(unknown)}. {taken}")
    if "position_ids" in row:
        raise InputError(f"{path}: has position_ids, which follow from the tokens. Leave them out.")
    made = MADE if IDS in row else frozenset()
    missing = sorted(ports.keys() - row.keys() - made)
    if missing:
        raise InputError(f"{path}: has no array {', '.join(missing)}. {taken}")


def _fitted(array: np.ndarray, port: Port, where: str) -> np.ndarray:
    """A sample as an input of batch 1."""
    wanted = "float" if port.dtype == "bfloat16" else np.dtype(port.dtype).kind
    kinds = {"i": "iu", "u": "iu", "b": "biu", "f": "f"}.get(wanted[0], wanted[0])
    if array.dtype.kind not in kinds:
        raise InputError(f"{where} is {array.dtype}, the model takes {port.dtype}. Convert it.")
    fits = array.ndim + 1 == len(port.shape) and all(
        not isinstance(size, int) or size == given for size, given in zip(port.shape[1:], array.shape)
    )
    if not fits:
        raise InputError(f"{where} has the shape {list(array.shape)}, the model takes {list(port.shape)[1:]} a sample.")
    return array[None]


def _without_padding(sample: Window, where: str) -> Window:
    mask = sample.arrays.get(MASK)
    if mask is None:
        if not sample.length:
            raise InputError(f"{where}: has no tokens.")
        return sample
    if mask.shape != sample.arrays[IDS].shape or not np.isin(mask, (0, 1)).all():
        raise InputError(f"{where}: {MASK} must be 0 or 1 for every token.")
    kept = np.flatnonzero(mask[0])
    if not len(kept) or kept[-1] - kept[0] + 1 != len(kept):
        raise InputError(f"{where}: {MASK} must leave a run of tokens without a gap.")
    return _cut(Window({name: array for name, array in sample.arrays.items() if name != MASK}), kept[0], kept[-1] + 1)


def _cut(window: Window, start: int, end: int) -> Window:
    """The tokens from `start` up to `end`; arrays that are not about tokens stay."""
    about_tokens = {IDS, *MADE}
    parts = {name: array[:, start:end] if name in about_tokens else array for name, array in window.arrays.items()}
    return Window(parts)
