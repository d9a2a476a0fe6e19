"""A prompt that is being continued: its tokens and text so far, and what ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from effc.errors import UsageError
from effc.runtime.detokenize import Detokenizer, StopFilter
from effc.runtime.prompts import Prompt

if TYPE_CHECKING:
    from effc.runtime.session import Engine

Stream = Callable[[int, str], None]


@dataclass(frozen=True)
class Generation:
    """One continued prompt.

    Attributes:
        text: What follows the prompt; ends before the stop string, has no special tokens.
        token_ids: The generated ids, the one that ended it (EOS, or the end of a stop string) included.
        finish_reason: `eos`, `stop` (a stop string came) or `length` (max_new_tokens, or the model's limit).
        prompt_tokens: Tokens of the prompt, without padding and prefix.
        kept_tokens: Tokens of it that the model read; fewer where the engine shortens prompts.
        prefill_seconds: Time the batch took to shorten and read its prompts, up to the first logits.
        decode_seconds: Time from there to the end of this row.
        prefix_tokens: Tokens before the prompt that came from a prefix.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    kept_tokens: int
    prefill_seconds: float
    decode_seconds: float
    prefix_tokens: int = 0


@dataclass
class Continuation:
    """One prompt in progress."""

    index: int
    prompt: Prompt
    steps: int
    eos: frozenset[int]
    detokenizer: Detokenizer
    stop: StopFilter
    stream: Stream | None
    finish_reason: str = ""
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def accept(self, token: int) -> None:
        """Take the next token and see whether the row ends with it."""
        self.ids.append(token)
        if token in self.eos:
            self.finish_reason = "eos"
        else:
            self._emit(self.stop.push(self.detokenizer.push(token)))
            if self.stop.stopped:
                self.finish_reason = "stop"
            elif len(self.ids) == self.steps:
                self.finish_reason = "length"
        if self.finish_reason in ("eos", "length"):
            self._finish_text()

    def _finish_text(self) -> None:
        """Give out what was held back; it may still complete a stop string."""
        self._emit(self.stop.push(self.detokenizer.flush()))
        if self.stop.stopped:
            self.finish_reason = "stop"
        self._emit(self.stop.flush())

    def _emit(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)
            if self.stream is not None:
                self.stream(self.index, piece)

    def generation(self, prefix_tokens: int) -> Generation:
        """The result."""
        text = "".join(self.pieces)
        counts, seconds = (len(self.prompt.ids), len(self.prompt.kept)), (self.prefill_seconds, self.decode_seconds)
        return Generation(text, self.ids, self.finish_reason, *counts, *seconds, prefix_tokens)


def check_lengths(max_new_tokens: int, stop: Sequence[str]) -> None:
    """Refuse what cannot end a text.

    Raises:
        UsageError: There is to be no token, or a stop string is empty.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}; give at least 1.")
    if isinstance(stop, str):
        raise UsageError("stop is a string; give a list of strings.")
    if not all(stop):
        raise UsageError("stop holds an empty string; it would end every text at once. Leave it out.")


def check_seed(seed: int | None) -> None:
    """Refuse a seed below 0.

    Raises:
        UsageError: It is.
    """
    if seed is not None and seed < 0:
        raise UsageError(f"seed is {seed}; give at least 0.")


def decoder(engine: Engine, needed: bool) -> Callable[[Sequence[int]], str]:
    """The tokenizer's `decode`; of an engine without one, no text, unless text is needed.

    Raises:
        EngineError: It is needed, and there is no tokenizer.
    """
    return engine.tokenizer.decode if engine.has_tokenizer or needed else _no_text


def _no_text(ids: Sequence[int]) -> str:
    return ""


def most_steps(tokens: int, max_new_tokens: int, limit: int | None) -> int:
    """Tokens a row may get after so many. The last one is not fed again, so a prompt at the limit still gets one."""
    return max_new_tokens if limit is None else min(max_new_tokens, limit - tokens + 1)
