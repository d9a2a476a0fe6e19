"""A dialogue with a causal language model: turns that go on from one cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from effc.errors import UsageError
from effc.runtime import limits
from effc.runtime.batch import TokenRows, check_interface, check_task, prompt_chunk
from effc.runtime.continuation import Continuation, Generation, check_lengths, check_seed, decoder, most_steps
from effc.runtime.detokenize import Detokenizer, StopFilter
from effc.runtime.prompts import Prompt
from effc.runtime.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from effc.runtime.session import Engine


class Dialogue:
    """Turns of a user and of the model, in one cache.

    With an engine whose cache keeps the tokens that surprised the model most (the pass
    `sparse-attention{scheme=retain}`), a dialogue may go on for ever (SirLLM, Yao et al. 2024, arXiv 2405.12528): every
    token, of user and model, is scored by its surprise, and at each new turn all scores so far are multiplied by
    `decay`. Any other engine keeps what it always keeps, up to its longest text.

    Args:
        engine: An engine of task `causal-lm` with a cache.
        decay: From 0 (only what is new counts) to 1 (nothing is forgotten for its age).
        chat: Put texts into the model's chat template. Off, the turns are one text.
        system: System message, with `chat`.
        temperature: 0 for greedy; see `Sampling` for this and the next three.
        top_k: Keep the k best tokens; 0 for all.
        top_p: Keep the best tokens of this total probability; 1 for all.
        repetition_penalty: 1 for none; counts all tokens of the dialogue.
        seed: Makes sampling repeatable.

    Raises:
        UsageError: An option is out of its range, or the task does not generate.
        EngineError: The engine has no cache, or takes more than tokens.

    Attributes:
        turns: Turns that are over.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        decay: float = 0.9,
        chat: bool = False,
        system: str | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> None:
        check_task(engine)
        check_interface(engine)
        check_seed(seed)
        if not 0 <= decay <= 1:
            raise UsageError(f"decay is {decay}; give a number from 0 to 1.")
        if system is not None and not chat:
            raise UsageError("a system message needs chat: only the model's chat template has a place for it.")
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
        self.turns = 0
        self._engine = engine
        self._decay = decay
        self._chat = chat
        self._system = system
        self._sampler = Sampler(sampling, [[]], seed)
        self._limit = limits.token_limit(engine.manifest)
        self._rows = TokenRows(engine, [0], self._limit)
        self._unread: list[int] = []  # what the model said last, and has not read itself
        self._whole = True

    @property
    def length(self) -> int:
        """Tokens that the model has read so far, those that left the cache included."""
        return self._rows.state.length

    @property
    def scores(self) -> np.ndarray | None:
        """Surprise of each of these tokens in nats, decayed, float32; None where the engine does not ask for it."""
        return None if self._rows.scores is None else self._rows.scores.values(self.length)[0]

    def say(
        self,
        turn: str | Sequence[int],
        *,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        stream: Callable[[str], None] | None = None,
    ) -> Generation:
        """Say something, and let the model answer.

        Args:
            turn: A text, or token ids, which are taken as they are.
            max_new_tokens: Most tokens of the answer.
            stop: Strings that end it.
            stream: Called with text as soon as it is certain.

        Returns:
            The answer. Its `prompt_tokens` are those read in this turn.

        Raises:
            UsageError: The turn is empty, or too long for what the engine has left; or the turn before was broken off.
            EngineError: The engine has no tokenizer where one is needed, or fails while running.
        """
        check_lengths(max_new_tokens, stop)
        if not self._whole:
            raise UsageError("the last turn was broken off, so the cache ends anywhere. Begin a new dialogue.")
        decode = decoder(self._engine, bool(stop) or stream is not None)
        ids = self._ids(turn)
        tokens = self.length + len(ids)
        if self._limit is not None and tokens > self._limit:
            raise UsageError(
                f"the dialogue has {self.length} tokens and this turn {len(ids)}, the engine takes {self._limit} in "
                "all. Begin a new dialogue, or build an engine for endless ones: "
                "--passes 'sparse-attention{scheme=retain}'."
            )
        eos = limits.eos_ids(self._engine.manifest.config, self._engine.assets)
        steps = most_steps(tokens, max_new_tokens, self._limit)
        pieces = None if stream is None else (lambda _, piece: stream(piece))
        text = (Detokenizer(decode, ids), StopFilter(stop))
        answer = Continuation(0, Prompt(ids, ids, 0.0), steps, eos, *text, pieces)
        self._whole = False
        self._answer(answer)
        self._whole = True
        self._unread = answer.ids[-1:]
        self.turns += 1
        return answer.generation(0)

    def _answer(self, answer: Continuation) -> None:
        if self._rows.scores is not None and self.turns:
            self._rows.scores.decay(self._decay)
        self._sampler.add(0, answer.prompt.ids)
        begun = time.perf_counter()
        logits = self._read(answer.prompt.ids)
        read = time.perf_counter()
        while True:
            answer.accept(self._sampler.choose(0, logits[0]))
            answer.prefill_seconds, answer.decode_seconds = read - begun, time.perf_counter() - read
            if answer.finish_reason:
                return
            logits = self._rows.read(np.array([answer.ids[-1:]], np.int64))

    def _read(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [1, vocabulary] after a turn, read in parts."""
        array = np.array([ids], np.int64)
        chunk = prompt_chunk(self._engine, 1, len(ids))
        logits = np.empty(0)
        for start in range(0, len(ids), chunk):
            logits = self._rows.read(array[:, start : start + chunk], wanted=start + chunk >= len(ids))
        return logits

    def _ids(self, turn: str | Sequence[int]) -> list[int]:
        """What the model reads in a turn: the end of its own last words, then those of the user."""
        if not isinstance(turn, str):
            if self._chat:
                raise UsageError("the turn is a list of ids; chat takes texts.")
            return [*self._unread, *limits.checked_ids(self._engine.manifest.config, "the turn", turn)]
        if not turn:
            raise UsageError("the turn is empty. Say something.")
        tokenizer = self._engine.tokenizer
        if self._chat and self.turns:
            ids = tokenizer.chat_turn(turn, self._system)
            # The template writes the end of the model's turn itself.
            ended = self._unread[:1] == ids[:1] or self._unread_ends()
            return ids if ended else [*self._unread, *ids]
        if self._chat:
            system = [] if self._system is None else [{"role": "system", "content": self._system}]
            return tokenizer.chat_prompt([*system, {"role": "user", "content": turn}])
        ids = [*self._unread, *tokenizer.encode(turn, add_special_tokens=self.turns == 0)]
        if len(ids) == len(self._unread):
            raise UsageError(f"the tokenizer makes no tokens of {turn!r}.")
        return ids

    def _unread_ends(self) -> bool:
        eos = limits.eos_ids(self._engine.manifest.config, self._engine.assets)
        return bool(eos & set(self._unread))
