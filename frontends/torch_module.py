"""torch modules with example inputs: exported with a dynamic batch."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from effc.errors import InputError, UsageError
from effc.frontends import binding, check
from effc.frontends.conversions import to_numpy
from effc.frontends.environment import require
from effc.frontends.hashing import model_hash
from effc.frontends.interface import Interface
from effc.frontends.port_names import infer_task
from effc.frontends.request import Request
from effc.frontends.sizes import BATCH
from effc.frontends.stored_dtype import keep_or_cast
from effc.frontends.torch_tensors import weights_of
from effc.frontends.trace import trace
from effc.ir.program import Program, Source, Task

PREFIX = "model."


def import_module(model: Any, example_inputs: Any, request: Request) -> Program:
    """Import a module: axis 0 of every input that has the first input's batch size is `batch`.

    The graph computes in float32; half-precision weights stay stored as they are. A module that cannot take
    another batch than the example's is exported with that batch, and a note says so.

    Raises:
        UsageError: The example inputs are not tensors, or do not fit the module.
        InputError: torch cannot export the module.
        ContractError: The graph computes something else than torch.
    """
    _refuse_unreadable(model, request.name)
    inputs = _examples(model, example_inputs, request.name)
    module = _float32(model)
    interface = _interface(module, inputs, request.name)
    notes: list[str] = []
    try:
        graph, limits = trace(interface, request.progress)
    except InputError as error:
        fixed = replace(interface, axes=tuple({} for _ in interface.axes))
        graph, limits = trace(fixed, request.progress)
        interface = fixed
        notes.append(f"The batch is fixed at the example's: with a dynamic one, {error}")
    weights, dtype_notes = keep_or_cast(weights_of(model.state_dict()), request.dtype)
    binding.bind(graph.graph, PREFIX, module, weights, request.name)
    task = request.task or infer_task(graph.graph)
    source = Source("memory", request.name, content_hash=model_hash(graph))
    program = Program(graph, task, source)
    notes += [*limits, *dtype_notes]
    if request.check:
        notes.append(_check(program, interface, request))
    source = replace(source, weight_bytes=program.weight_bytes(), notes=tuple(notes))
    return replace(program, source=source)


def _refuse_unreadable(model: Any, name: str) -> None:
    torch: Any = require("torch", "Importing a torch model")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(f"{name}: is a TorchScript module, which torch.export does not read. Pass the module it was.")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise InputError(f"{name}: has weights on the meta device, without values. Load them first.")


def _examples(model: Any, given: Any, name: str) -> dict[str, Any]:
    torch: Any = require("torch", "Importing a torch model")
    if isinstance(given, Mapping):
        inputs = dict(given)
        if not _by_name(model, inputs) and not _takes(model, inspect.Parameter.VAR_POSITIONAL):
            names = ", ".join(inspect.signature(model.forward).parameters)
            raise UsageError(f"{name}: example_inputs names {', '.join(map(str, inputs))}; forward takes {names}.")
    else:
        values = [given] if isinstance(given, torch.Tensor) else list(given)
        inputs = dict(zip(_parameter_names(model, len(values)), values, strict=True))
    wrong = [key for key, value in inputs.items() if not isinstance(value, torch.Tensor)]
    if wrong or not inputs:
        raise UsageError(f"{name}: example_inputs must be tensors, {wrong or 'there are none'}.")
    return {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}


def _parameter_names(model: Any, count: int) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [item.name for item in inspect.signature(model.forward).parameters.values() if item.kind in kinds]
    return (names + [f"input_{index}" for index in range(len(names), count)])[:count]


def _float32(model: Any) -> Any:
    """The module in evaluation mode and float32: itself if it is so already, else a copy."""
    torch: Any = require("torch", "Importing a torch model")
    tensors = [*model.parameters(), *model.buffers()]
    half = any(tensor.is_floating_point() and tensor.dtype is not torch.float32 for tensor in tensors)
    training = any(module.training for module in model.modules())
    return copy.deepcopy(model).float().eval() if half or training else model


def _interface(module: Any, inputs: dict[str, Any], name: str) -> Interface:
    torch: Any = require("torch", "Importing a torch model")
    first = next(iter(inputs.values()))
    batch = first.shape[0] if first.ndim else None
    dynamic = [value.ndim > 0 and value.shape[0] == batch for value in inputs.values()]
    if batch == 1:
        # torch.export would take a size of one for a constant.
        inputs = {
            key: torch.cat([value, value]) if flag else value
            for (key, value), flag in zip(inputs.items(), dynamic, strict=True)
        }
    axes = tuple({0: BATCH} if flag else {} for flag in dynamic)
    names = tuple(_named(_run_once(module, inputs, name)))
    wrapper = _wrap(module, tuple(inputs))
    return Interface(Task.GENERIC, wrapper, inputs, axes, names, variadic=len(inputs))


def _run_once(module: Any, inputs: Mapping[str, Any], name: str) -> Any:
    torch: Any = require("torch", "Importing a torch model")
    try:
        with torch.no_grad():
            return module(**inputs) if _by_name(module, inputs) else module(*inputs.values())
    except Exception as error:
        shapes = ", ".join(f"{key}{list(value.shape)}" for key, value in inputs.items())
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UsageError(f"{name}: does not run on example_inputs {shapes}: {reason}") from error


def _by_name(module: Any, inputs: Mapping[str, Any]) -> bool:
    parameters = inspect.signature(module.forward).parameters
    keywords = _takes(module, inspect.Parameter.VAR_KEYWORD)
    return all(name in parameters or keywords for name in inputs)


def _takes(module: Any, kind: Any) -> bool:
    return any(item.kind is kind for item in inspect.signature(module.forward).parameters.values())


def _named(result: Any) -> dict[str, Any]:
    """The tensors of a result by name: keys of a mapping, fields of a named tuple, else numbered.

    A tensor further in has the names on its way, joined by `_`; what is neither tensor nor container is left out.
    """
    named = dict(_leaves(result, ""))
    if not named:
        raise UsageError("the module returns no tensors; wrap it in one that does.")
    return named


def _leaves(result: Any, name: str) -> Iterator[tuple[str, Any]]:
    torch: Any = require("torch", "Importing a torch model")
    if isinstance(result, torch.Tensor):
        yield name or "output", result
        return
    items: list[tuple[Any, Any]] = []
    if isinstance(result, Mapping):
        items = list(result.items())
    elif hasattr(result, "_asdict"):
        items = list(result._asdict().items())
    elif isinstance(result, (list, tuple)):
        items = [(index if name else f"output_{index}", value) for index, value in enumerate(result)]
    for key, value in items:
        yield from _leaves(value, f"{name}_{key}" if name else str(key))


def _wrap(module: Any, names: tuple[str, ...]) -> Any:
    torch: Any = require("torch", "Importing a torch model")
    by_name = _by_name(module, dict.fromkeys(names))

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            result = self.model(**dict(zip(names, tensors, strict=True))) if by_name else self.model(*tensors)
            return tuple(_named(result).values())

    return Positional()


def _check(program: Program, interface: Interface, request: Request) -> str:
    if not check.fits(program):
        return f"Not compared with torch: more than {check.MEMORY_LIMIT >> 20} MiB of float32 weights."
    with check.Runner(program.model) as runner:
        return check.run_cases(program, runner, _cases(interface), request.progress)


def _cases(interface: Interface) -> Iterator[check.Case]:
    torch: Any = require("torch", "Comparing with torch")
    for batch in (1, 2, 3, 5) if any(interface.axes) else (None,):
        inputs = interface.inputs
        if batch is not None:
            inputs = {
                name: tensor[torch.arange(batch) % tensor.shape[0]] if axes else tensor
                for (name, tensor), axes in zip(inputs.items(), interface.axes, strict=True)
            }
        with torch.no_grad():
            results = interface.module(*inputs.values())
        expected = {name: to_numpy(value) for name, value in zip(interface.outputs, results, strict=True)}
        name = "the example inputs" if batch is None else f"batch {batch}"
        yield check.Case(name, {key: to_numpy(value) for key, value in inputs.items()}, expected)
