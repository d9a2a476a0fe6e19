"""The engine's tokenizer: text to ids and back, special tokens, chat prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from effc.errors import EngineError, UsageError
from effc.runtime import chat
from effc.runtime.assets import Assets

FILE = "tokenizer.json"
PROBE, ANSWER = "a", "\ue000answer\ue001"
"""What a user said before, and where the assistant's words are, in a conversation of which only the end is wanted."""
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Wraps `tokenizer.json`. Padding and truncation stored in it are switched off: the caller decides both.

    Args:
        assets: The engine's text files.

    Raises:
        EngineError: There is no `tokenizer.json`, or it is damaged.
    """

    def __init__(self, assets: Assets) -> None:
        data = assets.read(FILE)
        if data is None:
            raise EngineError(
                f"{assets.path(FILE)}: is missing, so this engine takes and gives token ids only. "
                "Build it from a folder that has a tokenizer.json."
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception
            raise EngineError(f"{assets.path(FILE)}: is damaged ({error}). Build the engine again.") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._assets = assets
        self._config = {**assets.json_object("special_tokens_map.json"), **assets.json_object("tokenizer_config.json")}

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def max_length(self) -> int | None:
        """Longest input the tokenizer's configuration allows, in tokens, or None."""
        value = self._config.get("model_max_length")
        # "No limit" is written as a huge number.
        return int(value) if isinstance(value, int | float) and 0 < value < 1e9 else None

    def special_tokens(self) -> dict[str, str]:
        """Name (`bos_token`, …) -> text of the special tokens that are set."""
        found = {}
        for name in SPECIAL:
            value = self._config.get(name)
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str):
                found[name] = text
        return found

    def special_id(self, name: str) -> int | None:
        """Id of the special token `name` (`pad_token`, …), or None."""
        text = self.special_tokens().get(name)
        return None if text is None else self._tokenizer.token_to_id(text)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens the tokenizer adds around it.

        Raises:
            UsageError: It is no text, or holds what UTF-8 cannot express.
        """
        return list(self._tokenizer.encode(_text(text), add_special_tokens=add_special_tokens).ids)

    def encode_start(self, text: str) -> list[int]:
        """Token ids of a text that others will follow: with the special tokens before it, without those after it.

        Raises:
            UsageError: It is no text, or holds what UTF-8 cannot express.
            EngineError: The tokenizer does more to a text than put special tokens around it.
        """
        whole, plain = self.encode(text), self.encode(text, add_special_tokens=False)
        for end in range(len(plain), len(whole) + 1):
            if whole[end - len(plain) : end] == plain:
                return whole[:end]
        raise EngineError(
            f"{self._assets.path(FILE)}: changes the tokens of a text when it adds special ones, so the beginning of a "
            "prompt cannot be told from its end. Give token ids."
        )

    def encode_batch(self, texts: Sequence[str], max_length: int | None) -> list[tuple[list[int], list[int]]]:
        """Token ids and type ids of texts, each cut to `max_length` tokens, special ones included.

        Raises:
            UsageError: One is no text, or holds what UTF-8 cannot express.
        """
        texts = [_text(text) for text in texts]
        if max_length is not None:
            self._tokenizer.enable_truncation(max_length)
        try:
            encodings = self._tokenizer.encode_batch(texts)
        finally:
            self._tokenizer.no_truncation()
        return [(encoding.ids, encoding.type_ids) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether the engine has a chat template."""
        return chat.find_template(self._assets) is not None

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next words begin.

        Raises:
            UsageError: The engine has no chat template, or it refuses the conversation.
        """
        # The template writes the special tokens itself; the tokenizer must not add them again.
        return self.encode(self._chat_text(messages), add_special_tokens=False)

    def chat_turn(self, text: str, system: str | None = None) -> list[int]:
        """Token ids between the assistant's words and its next ones, with what the user says in between.

        Args:
            text: What the user says.
            system: The system message of the conversation.

        Raises:
            UsageError: The engine has no chat template, or one that does not show what the assistant said.
        """
        messages = [] if system is None else [{"role": "system", "content": system}]
        roles = {"user": PROBE, "assistant": ANSWER}
        messages += [{"role": role, "content": content} for role, content in roles.items()]
        _, found, rest = self._chat_text([*messages, {"role": "user", "content": text}]).partition(ANSWER)
        if not found:
            raise UsageError(
                "the engine's chat template does not show what the assistant said, so no turn can follow it. "
                "Go on without chat, in the model's own format."
            )
        return self.encode(rest, add_special_tokens=False)

    def _chat_text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        template = chat.find_template(self._assets)
        if template is None:
            raise UsageError(
                "this engine has no chat template (chat_template.jinja, or in tokenizer_config.json). "
                "Generate without chat, from a prompt in the model's own format."
            )
        return chat.render(template, messages, self.special_tokens())


def _text(text: str) -> str:
    """The text itself, which the library can take: bytes that were no UTF-8 arrive as lone surrogates."""
    if not isinstance(text, str):
        raise UsageError(f"a text is of type {type(text).__name__}, not str. Give text.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"the text {text[:40]!r} is not UTF-8 at character {error.start}"
        raise UsageError(f"{what}. Convert it first.") from error
    return text
