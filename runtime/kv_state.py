"""The cache of a running generation: tensors that stay in onnxruntime's hands from step to step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnxruntime as ort

from effc.errors import EngineError, UsageError
from effc.runtime.bundle import CacheLayout, CachePort, Port
from effc.runtime.prefix_inputs import check_inputs, empty_inputs, prefix_ports, tokens_elsewhere
from effc.runtime.tensors import storage_dtype, to_numpy, to_ort

BLOCK = 64
"""Capacities are multiples of this many tokens."""
RESERVE = 128
"""Tokens of room beyond the prompt in a first allocation."""
BATCH, PAST = "batch", "past"
"""The symbols a cache shape may hold; `past // P` are whole pages of P tokens."""

NUM_LOGITS = "num_logits"
"""Optional input of an engine: how many of the last tokens get logits."""
ALL_LOGITS = np.iinfo(np.int64).max


class Cache(ABC):
    """Tensors bound as the cache inputs and outputs of a session.

    Args:
        ports: The tensors.
        batch: Rows.
        device: Where they live, `cpu` or `cuda`.
    """

    def __init__(self, ports: Sequence[CachePort], batch: int, device: str) -> None:
        self.ports = ports
        self.batch = batch
        self.device = device
        self.values: list[ort.OrtValue] = []
        self.initial: Mapping[str, np.ndarray] = {}

    @abstractmethod
    def bind(self, binding: ort.IOBinding, length: int, total: int) -> None:
        """Bind inputs and outputs for a run that takes the cache from `length` to `total` tokens."""

    @abstractmethod
    def advance(self, outputs: Mapping[str, ort.OrtValue]) -> None:
        """Take over what the run produced."""

    def arrays(self, length: int) -> dict[str, np.ndarray]:
        """Cache input name -> the tensor at `length` tokens, spare capacity included."""
        if not self.values:
            return {port.input: self._first(port, length) for port in self.ports}
        return {port.input: to_numpy(value, port.dtype) for port, value in zip(self.ports, self.values)}

    def _zeros(self, port: CachePort, past: int) -> np.ndarray:
        return np.zeros(port_shape(port, self.batch, past), storage_dtype(port.dtype))

    def _first(self, port: CachePort, length: int) -> np.ndarray:
        """What a cache that has seen no run begins with; a single row is used where it lies, for reading only."""
        shape = port_shape(port, self.batch, length)
        if port.input not in self.initial:
            return self._zeros(port, 0)
        if self.initial[port.input].shape[1:] == shape[1:]:
            return np.ascontiguousarray(np.broadcast_to(self.initial[port.input], shape))
        array = self._zeros(port, length)
        _put_last(port, array, length, self.initial[port.input])
        return array


class InPlaceCache(Cache):
    """One buffer per tensor, bound as input and output, so a step appends to it and copies nothing.

    A buffer that is full is replaced by one at least twice as long, with one copy of its tokens.
    Zeroed memory is handed out lazily by the system, so unused capacity costs no resident memory.
    """

    def __init__(self, ports: Sequence[CachePort], batch: int, device: str, limit: int | None) -> None:
        super().__init__(ports, batch, device)
        self.limit = limit
        self.capacity = 0

    def bind(self, binding: ort.IOBinding, length: int, total: int) -> None:
        """Make room for `total` tokens and bind every buffer both ways."""
        if total > self.capacity:
            self.capacity = next_capacity(total, self.capacity, self.limit)
            self.values = self._grown(length)
        for port, value in zip(self.ports, self.values):
            binding.bind_ortvalue_input(port.input, value)
            binding.bind_ortvalue_output(port.output, value)

    def advance(self, outputs: Mapping[str, ort.OrtValue]) -> None:
        """Nothing to do: the run wrote into the bound buffers."""

    def _grown(self, length: int) -> list[ort.OrtValue]:
        """Buffers of the new capacity with what the first `length` tokens left in the old ones, or began with."""
        grown = []
        for index, port in enumerate(self.ports):
            if self.values and _growing_axis(port) is None:
                grown.append(self.values[index])
                continue
            array = self._zeros(port, self.capacity)
            if self.values and length:
                kept = _kept(port, length)
                array[kept] = to_numpy(self.values[index], port.dtype)[kept]
            elif port.input in self.initial:
                _put_last(port, array, length, self.initial[port.input])
            grown.append(to_ort(array, port.dtype, self.device))
        self.initial = {}
        return grown


class GrowingCache(Cache):
    """The outputs of one run are the inputs of the next; they change hands without leaving onnxruntime."""

    def bind(self, binding: ort.IOBinding, length: int, total: int) -> None:
        """Bind the present tensors as inputs and let the run allocate the outputs."""
        if not self.values:
            self.values = [to_ort(self._first(port, length), port.dtype, self.device) for port in self.ports]
            self.initial = {}
        for port, value in zip(self.ports, self.values):
            binding.bind_ortvalue_input(port.input, value)
            binding.bind_output(port.output, self.device)

    def advance(self, outputs: Mapping[str, ort.OrtValue]) -> None:
        """Keep the outputs for the next run."""
        self.values = [outputs[port.output] for port in self.ports]


class KvState:
    """One generation in progress: a session, its bound cache and the number of tokens in it.

    Args:
        session: The session.
        layout: How the engine carries its cache.
        inputs: The inputs that are not cache.
        batch: Rows, all of one padded length.
        max_length: Most tokens the cache will be asked to hold; it bounds the capacity. None for no bound.
        device: Where the cache lives, `cpu` or `cuda`.

    Raises:
        EngineError: The layout's mode or a cache shape is unknown.

    Attributes:
        batch: Rows.
        length: Tokens in the cache, padding included.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        layout: CacheLayout,
        inputs: Sequence[Port],
        batch: int,
        *,
        max_length: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.batch = batch
        self.length = 0
        self.max_length = max_length
        self._session = session
        self._layout = layout
        self._inputs = {port.name: port for port in inputs}
        self._selects_logits = any(value.name == NUM_LOGITS for value in session.get_overridable_initializers())
        self._binding = session.io_binding()
        self._cache = _make_cache(layout, batch, device, max_length)
        self._feed_prefix(empty_inputs(layout))

    @property
    def buffers(self) -> dict[str, ort.OrtValue]:
        """Cache input name -> the tensor bound to it now."""
        return {port.input: value for port, value in zip(self._cache.ports, self._cache.values)}

    def nbytes(self, length: int | None = None) -> dict[str, int]:
        """Cache input name -> bytes it takes for `length` tokens (those it has now), without spare capacity."""
        return cache_bytes(self._layout, self.length if length is None else length, self._cache.batch)

    def snapshot(self) -> dict[str, np.ndarray]:
        """Cache input name -> a copy of what the tokens left in it, without spare capacity, in its storage dtype."""
        arrays = self._cache.arrays(self.length)
        return {port.input: arrays[port.input][_kept(port, self.length)].copy() for port in self._layout.ports}

    def restore(
        self, tensors: Mapping[str, np.ndarray], length: int, inputs: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Start from the cache of one row, which every row of the batch gets. The arrays are not written to.

        Args:
            tensors: What `snapshot` gave of a state with one row.
            length: Tokens it holds, none of them padding.
            inputs: What a prefix of those tokens brings beside its cache; None: nothing. Tensors hold the last tokens
                only where inputs stand for the first ones.

        Raises:
            UsageError: They are more than `max_length`, or this state holds tokens already.
            EngineError: The tensors, or the inputs, are not those of this engine at this length.
        """
        if self.length:
            raise UsageError(f"the cache holds {self.length} tokens already. Restore into a new state.")
        if self.max_length is not None and length > self.max_length:
            raise UsageError(
                f"the cache holds at most {self.max_length} tokens, {length} were given. Raise max_length."
            )
        check_snapshot(self._layout, tensors, length, inputs or {})
        if inputs is not None:
            check_inputs(self._layout, inputs)
            self._feed_prefix(inputs)
        self._cache.initial = dict(tensors)
        self.length = length

    def run(
        self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str], *, num_logits: int | None = None
    ) -> dict[str, np.ndarray]:
        """Append the fed tokens to the cache and compute outputs.

        More tokens than the engine takes at once are read in parts, which give what they give one after the other.

        Args:
            feeds: Every input that is not cache, with its dtype; `input_ids` is [batch, seq] and
                `attention_mask`, when the engine takes it, [batch, length + seq].
            outputs: Outputs wanted that are not cache.
            num_logits: How many of the last tokens get logits, where the engine can choose; None for all.

        Returns:
            Output name -> array. Its memory belongs to the run: it stays valid for as long as the array lives.

        Raises:
            UsageError: More tokens than `max_length`.
            EngineError: onnxruntime refused the run.
        """
        total = self.length + feeds["input_ids"].shape[1]
        if self.max_length is not None and total > self.max_length:
            raise UsageError(f"the cache holds at most {self.max_length} tokens, {total} were fed. Raise max_length.")
        count, most = feeds["input_ids"].shape[1], self._layout.longest_step
        if most is None or count <= most:
            return self._run_step(feeds, outputs, num_logits)
        results = []
        for start in range(0, count, most):
            end = min(start + most, count)
            wanted = outputs if num_logits is None or end == count else []
            results.append(self._run_step(self._columns(feeds, start, end, total - count), wanted, num_logits))
        given = {name: [part[name] for part in results if name in part] for name in outputs}
        return {name: np.concatenate(parts, axis=1) for name, parts in given.items()}

    def _columns(self, feeds: Mapping[str, np.ndarray], start: int, end: int, past: int) -> dict[str, np.ndarray]:
        """Feeds of the new tokens from `start` to `end`."""
        ranges = {"seq": slice(start, end), "total": slice(0, past + end)}
        return {
            name: array[tuple(ranges.get(str(axis), slice(None)) for axis in self._inputs[name].shape)]
            for name, array in feeds.items()
        }

    def _run_step(
        self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str], num_logits: int | None
    ) -> dict[str, np.ndarray]:
        total = self.length + feeds["input_ids"].shape[1]
        self._bind(feeds, outputs, total)
        if self._selects_logits:
            count = np.array([ALL_LOGITS if num_logits is None else num_logits], np.int64)
            self._binding.bind_ortvalue_input(NUM_LOGITS, to_ort(count, "int64"))
        self._run()
        names = [*(port.output for port in self._cache.ports), *outputs]
        results = dict(zip(names, self._binding.get_outputs()))
        self._cache.advance(results)
        self.length = total
        return {name: results[name].numpy() for name in outputs}

    def _feed_prefix(self, inputs: Mapping[str, np.ndarray]) -> None:
        for port in prefix_ports(self._layout):
            array = np.ascontiguousarray(inputs[port.name])
            self._binding.bind_ortvalue_input(port.name, to_ort(array, port.dtype))

    def _bind(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str], total: int) -> None:
        # An output of the last run that stays bound would be taken as a preallocated one of the wrong shape.
        self._binding.clear_binding_outputs()
        self._cache.bind(self._binding, self.length, total)
        for name, array in feeds.items():
            self._binding.bind_ortvalue_input(name, to_ort(np.ascontiguousarray(array), self._inputs[name].dtype))
        for name in outputs:
            self._binding.bind_output(name, "cpu")

    def _run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's errors have no common base of their own
            raise EngineError(f"the engine failed while running: {error}") from error


def _make_cache(layout: CacheLayout, batch: int, device: str, limit: int | None) -> Cache:
    if layout.mode == "in-place":
        return InPlaceCache(layout.ports, batch, device, limit)
    if layout.mode == "growing":
        return GrowingCache(layout.ports, batch, device)
    raise EngineError(f"the manifest names the cache mode {layout.mode!r}, which is unknown. Upgrade effc.")


def port_shape(port: CachePort, batch: int, past: int) -> tuple[int, ...]:
    """Shape of a cache tensor for a batch and a length.

    Raises:
        EngineError: The shape holds a symbol other than `batch`, `past` and `past // P`.
    """
    return tuple(_axis_size(port, axis, batch, past) for axis in range(len(port.shape)))


def cache_bytes(layout: CacheLayout, length: int, batch: int = 1) -> dict[str, int]:
    """Cache input name -> bytes it takes for a number of tokens, without spare capacity."""
    return {
        port.input: math.prod(port_shape(port, batch, length)) * storage_dtype(port.dtype).itemsize
        for port in layout.ports
    }


def check_snapshot(
    layout: CacheLayout,
    tensors: Mapping[str, np.ndarray],
    length: int,
    inputs: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> None:
    """Compare tensors with what the cache of one row holds after a number of tokens.

    Args:
        layout: Of the engine.
        tensors: Cache input name -> tensor.
        length: Tokens, those that inputs stand for included.
        inputs: What a prefix brings beside its cache.

    Raises:
        EngineError: A tensor is missing, unknown, or has another dtype or shape.
    """
    names = {port.input for port in layout.ports}
    if difference := ", ".join(sorted(names ^ set(tensors))):
        raise EngineError(f"the saved cache and that of the engine differ in {difference}. Compute it again.")
    elsewhere = tokens_elsewhere(layout, inputs)
    for port in layout.ports:
        array, shape = tensors[port.input], port_shape(port, 1, length - elsewhere.get(port.input, 0))
        if array.dtype != storage_dtype(port.dtype) or array.shape != shape:
            raise EngineError(
                f"the saved cache tensor {port.input!r} is {array.dtype}{list(array.shape)}, the engine has "
                f"{port.dtype}{list(shape)} after {length} tokens. Compute it again."
            )


def _axis_size(port: CachePort, axis: int, batch: int, past: int) -> int:
    size = port.shape[axis]
    if isinstance(size, int):
        return size
    if size == BATCH:
        return batch
    name, _, page = size.partition("//")
    if name.strip() != PAST or not (page.strip() or "1").isdigit() or page.strip() == "0":
        raise EngineError(
            f"cache input {port.input!r}: its shape has the unknown symbol {size!r}. Upgrade effc, or build it again."
        )
    return past // int(page or 1)


def _growing_axis(port: CachePort) -> int | None:
    """The axis that grows with the tokens; None for a tensor of fixed size."""
    growing = [axis for axis, size in enumerate(port.shape) if isinstance(size, str) and size != BATCH]
    return growing[0] if growing else None


def _kept(port: CachePort, length: int) -> tuple[slice, ...]:
    """Index of what `length` tokens need of a tensor."""
    axis = _growing_axis(port)
    return () if axis is None else (slice(None),) * axis + (slice(_axis_size(port, axis, 1, length)),)


def _put_last(port: CachePort, array: np.ndarray, length: int, held: np.ndarray) -> None:
    """Write into every row what one row holds of the last of `length` tokens; memory of those before is not touched."""
    axis = _growing_axis(port)
    if axis is None:
        array[:] = held
        return
    end = _axis_size(port, axis, 1, length)
    array[(slice(None),) * axis + (slice(end - held.shape[axis], end),)] = held


def next_capacity(needed: int, current: int, limit: int | None) -> int:
    """Tokens to make room for: twice the present capacity, or what is needed and a reserve; never above `limit`."""
    wanted = max(2 * current, needed + RESERVE)
    rounded = -(-wanted // BLOCK) * BLOCK
    return rounded if limit is None else max(needed, min(rounded, limit))
