"""Text from tokens as they come: whole characters only, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What decoders put for bytes that are no complete character yet."""
CONTEXT = 6
"""Prompt tokens decoded along, so that a decoder sees that the text does not begin with the first new token."""
PATIENCE = 16
"""Pending tokens after which text before an incomplete character is no longer held back."""
GIVE_UP = 64
"""Pending tokens after which an incomplete character is taken for real garbage."""


class Detokenizer:
    """Turns token ids into text piece by piece.

    The pieces joined are the decoded whole. A window of tokens is decoded each time, from a point where text was
    complete: decoders treat the first token of a sequence specially (sentencepiece drops its space), and one
    character may be spread over several tokens (byte-level and byte-fallback vocabularies).

    Args:
        decode: Decodes a sequence of ids.
        prompt: Ids the text continues.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(prompt[-CONTEXT:])
        self._start = 0
        self._complete = len(self._ids)
        self._sent = 0

    def push(self, token: int) -> str:
        """Text that is certain once `token` has come; may be empty."""
        self._ids.append(token)
        text = self._pending()
        pending = len(self._ids) - self._complete
        if not text:
            # A skipped token: the window stays, or the next one would look like the first of a text.
            return ""
        if not text.endswith(REPLACEMENT) or pending > GIVE_UP:
            return self._advance(text)
        if pending <= PATIENCE:
            return ""
        stable = text.rstrip(REPLACEMENT)
        piece = stable[self._sent :]
        self._sent = max(self._sent, len(stable))
        return piece

    def flush(self) -> str:
        """What is left at the end; an incomplete character appears as U+FFFD."""
        return self._advance(self._pending())

    def _pending(self) -> str:
        """Text of the tokens after the last complete point."""
        known = self._decode(self._ids[self._start : self._complete])
        text = self._decode(self._ids[self._start :])
        if text.startswith(known):
            return text[len(known) :]
        # New bytes changed how the old ones decode: what was said stays, the new tokens speak for themselves.
        return self._decode(self._ids[self._complete :])

    def _advance(self, text: str) -> str:
        piece = text[self._sent :]
        self._start, self._complete, self._sent = self._complete, len(self._ids), 0
        return piece


class StopFilter:
    """Passes text through up to the first stop string, holding back what may be the beginning of one.

    Args:
        stops: Stop strings, none of them empty.

    Attributes:
        stopped: Whether a stop string was seen; nothing passes after it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """Text that cannot be part of a stop string any more."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` and is shorter than it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
