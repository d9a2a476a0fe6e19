"""Comparison of an imported graph with torch, at four shapes, in onnxruntime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from effc.errors import ContractError
from effc.frontends.causal_lm import takes_positions
from effc.frontends.environment import require
from effc.frontends.interface import Interface
from effc.ir.program import Program, Task

MEMORY_LIMIT = 600 << 20
"""Largest model, in float32 bytes, that is compared with its own weights."""

FATAL = 4
"""onnxruntime's log severity that prints nothing we do not raise ourselves."""
TOLERANCE = {np.dtype(np.float32): 2e-4, np.dtype(np.float16): 2e-2}
"""Largest difference allowed, as a share of the largest magnitude in the reference (at least 1e-3)."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: What the shape stands for.
        feeds: Inputs of the graph.
        expected: Output name -> reference.
        valid: Where the first output counts (padding does not), or None for everywhere.
    """

    name: str
    feeds: Mapping[str, np.ndarray]
    expected: Mapping[str, np.ndarray]
    valid: np.ndarray | None = None


def float32_bytes(program: Program) -> int:
    """Bytes of the program's weights in float32."""
    return sum(4 * value.const_value.size for value in program.graph.initializers.values() if value.const_value)


def fits(program: Program) -> bool:
    """Whether the program is small enough to be compared with its own weights."""
    return float32_bytes(program) <= MEMORY_LIMIT


def check(program: Program, interface: Interface, module: Any, progress: Callable[[str], None]) -> str:
    """Compare the program with the torch module at four shapes.

    Args:
        program: The imported program.
        interface: Its interface.
        module: The torch module with the same weights, float32.
        progress: Told which shape is compared.

    Returns:
        A sentence with what was compared and the largest difference.

    Raises:
        ContractError: A difference beyond the tolerance, with shape and size of the difference.
    """
    cases = {Task.CAUSAL_LM: _causal_cases, Task.VISION: _vision_cases}.get(program.task, _encoder_cases)
    with Runner(program.model) as runner:
        return run_cases(program, runner, cases(module, interface, runner), progress)


def run_cases(program: Program, runner: Runner, cases: Iterable[Case], progress: Callable[[str], None]) -> str:
    """Compare every case; the sentence for the report.

    Raises:
        ContractError: A difference beyond the tolerance.
    """
    worst = 0.0
    names = []
    for case in cases:
        progress(f"comparing with torch: {case.name}")
        worst = max(worst, compare_case(program, case, runner.run(case.feeds)))
        names.append(case.name)
    return f"Compared with torch in onnxruntime at {', '.join(names)}: largest relative difference {worst:.1e}."


class Runner:
    """An onnxruntime CPU session over a model, its weights in a temporary folder."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model

    def open(self) -> Runner:
        """Make the session; `with` does it too.

        Raises:
            ContractError: onnxruntime refuses the graph.
        """
        import onnxruntime

        self._folder = tempfile.TemporaryDirectory(prefix="effc-check-")
        path = Path(self._folder.name) / "model.onnx"
        ir.save(self._model, path, external_data="weights.bin")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = FATAL
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            self._folder.cleanup()
            reason = " ".join(str(error).split())[:300]
            raise ContractError(f"onnxruntime does not load the graph: {reason}.") from error
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.inputs = {item.name for item in self.session.get_inputs()}
        return self

    def __enter__(self) -> Runner:
        return self if hasattr(self, "session") else self.open()

    def __exit__(self, *_: object) -> None:
        del self.session
        self._folder.cleanup()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; feeds the graph has no input for are left out.

        Raises:
            ContractError: onnxruntime cannot run the graph on them.
        """
        used = {name: array for name, array in feeds.items() if name in self.inputs}
        try:
            return dict(zip(self.outputs, self.session.run(None, used), strict=True))
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ContractError(f"onnxruntime does not run the graph: {reason}.") from error


def compare_case(program: Program, case: Case, actual: Mapping[str, np.ndarray]) -> float:
    """The largest difference, as a share of the reference's largest magnitude.

    Raises:
        ContractError: It exceeds the tolerance, or a shape differs.
    """
    worst = 0.0
    for name, expected in case.expected.items():
        got = actual[name]
        if case.valid is not None:
            expected, got = expected[case.valid], got[case.valid]
        if expected.shape != got.shape:
            raise ContractError(_message(program, case, name, f"shape {got.shape}, torch gives {expected.shape}"))
        difference, scale = _largest_difference(expected.astype(np.float64), got.astype(np.float64))
        tolerance = TOLERANCE.get(got.dtype, 1e-1) * scale
        if not difference <= tolerance:
            found = f"max difference {difference:.3e}, allowed {tolerance:.3e}"
            raise ContractError(_message(program, case, name, found))
        worst = max(worst, difference / scale)
    return worst


def _largest_difference(expected: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """The largest difference, and the largest finite magnitude of the reference (at least 1e-3).

    The same infinity, or NaN in both, is no difference: a model may hold weights that are not finite.
    """
    same = (expected == got) | (np.isnan(expected) & np.isnan(got))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(expected - got))
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    return float(difference.max(initial=0.0)), max(1e-3, float(scale))


def _message(program: Program, case: Case, output: str, found: str) -> str:
    shapes = ", ".join(
        f"{name}{list(array.shape)}" for name, array in case.feeds.items() if not name.startswith("past_key_values")
    )
    return (
        f"{program.source.name}: the imported graph differs from its source at {case.name} ({shapes}): "
        f"{output} has {found}. "
        "Import with check=False only to look at the graph; an engine made from it would be wrong."
    )


def _causal_cases(module: Any, interface: Interface, runner: Runner) -> Iterator[Case]:
    vocabulary = module.config.get_text_config().vocab_size
    rng = np.random.default_rng(0)
    empty = {
        name: np.zeros((1, tensor.shape[1], 0, tensor.shape[3]), np.float32)
        for name, tensor in interface.inputs.items()
        if name.startswith("past_key_values")
    }
    long = _long_length(module)
    plan = [
        ("an empty past", [7], 0, 7),
        ("a left-padded batch", [3, 13], 0, 13),
        ("one token with a past", [3, 13], 12, 1),
        ("a long past", [long], long - 3, 3),
    ]
    for name, lengths, past, seq in plan:
        total = past + seq
        mask = np.array([[0] * (total - length) + [1] * length for length in lengths], np.int64)
        ids = rng.integers(1, vocabulary, mask.shape)
        state = {key: np.repeat(array, len(lengths), axis=0) for key, array in empty.items()}
        positions = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)
        if past:
            first = _causal_feeds(ids[:, :past], mask[:, :past], positions[:, :past], state)
            outputs = runner.run(first)
            state = {key: outputs[key.replace("past_key_values", "present")] for key in state}
        feeds = _causal_feeds(ids[:, past:], mask, positions[:, past:], state)
        expected = _causal_reference(module, ids, mask, positions)[:, past:]
        yield Case(name, feeds, {"logits": expected}, mask[:, past:].astype(bool))


def _causal_feeds(
    ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, past: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}


def _causal_reference(module: Any, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Logits of one run over the whole text without a cache."""
    torch: Any = require("torch", "Comparing with torch")
    extra = {"position_ids": torch.from_numpy(positions)} if takes_positions(module) else {}
    with torch.no_grad():
        output = module(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), use_cache=False, **extra
        )
    return output.logits.float().numpy()


def _long_length(module: Any) -> int:
    """A text longer than the model's window, within its positions."""
    config = module.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    limit = getattr(config, "max_position_embeddings", None) or 1 << 20
    return int(min(max(65, min(window, 1024) + 9), limit))


def _encoder_cases(module: Any, interface: Interface, runner: Runner) -> Iterator[Case]:
    if "input_features" in interface.inputs:
        yield from _array_cases(module, interface, "input_features")
        return
    config = module.config.get_text_config()
    rng = np.random.default_rng(0)
    limit = (getattr(config, "max_position_embeddings", None) or 1 << 20) - 3
    plan = [
        ("one token", [1]),
        ("a padded batch", [3, 13]),
        ("full rows", [17, 17, 17]),
        ("a long row", [max(1, min(129, limit))]),
    ]
    for name, lengths in plan:
        width = max(lengths)
        mask = np.array([[1] * length + [0] * (width - length) for length in lengths], np.int64)
        # Some models take positions from the ids: padding must look like padding there.
        tokens = rng.integers(min(5, config.vocab_size - 1), config.vocab_size, mask.shape)
        ids = np.where(mask == 1, tokens, _pad(config))
        feeds = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in interface.inputs:
            feeds["token_type_ids"] = rng.integers(0, config.type_vocab_size, mask.shape)
        expected = _reference(module, interface, feeds)
        by_token = all(array.shape[:2] == mask.shape for array in expected.values())
        yield Case(name, feeds, expected, mask.astype(bool) if by_token else None)


def _pad(config: Any) -> int:
    pad = getattr(config, "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < config.vocab_size else 0


def _vision_cases(module: Any, interface: Interface, runner: Runner) -> Iterator[Case]:
    yield from _array_cases(module, interface, "pixel_values")


def _array_cases(module: Any, interface: Interface, name: str) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for batch in (1, 2, 3, 5):
        shape = (batch, *interface.inputs[name].shape[1:])
        feeds = {name: rng.standard_normal(shape, dtype=np.float32)}
        yield Case(f"batch {batch}", feeds, _reference(module, interface, feeds))


def _reference(module: Any, interface: Interface, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    torch: Any = require("torch", "Comparing with torch")
    with torch.no_grad():
        output = module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    return {name: getattr(output, name).float().numpy() for name in interface.outputs}
