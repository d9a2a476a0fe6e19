"""The pipeline text: `lossless-weights,kv-cache{scheme=zipcache,ratio=0.6}`, parsed to passes and printed back.

Grammar:

    pipeline := [ pass { "," pass } ]
    pass     := name [ "{" [ option { "," option } ] "}" ]
    option   := name "=" value
    value    := item { "|" item }          (more than one item makes a tuple)
    item     := number | true | false | none | word | quoted string

Options are checked against the fields of the pass: an unknown one, or a value of the wrong type, is an
error that shows the text with a caret under the place.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from effc.errors import UsageError
from effc.passes.base import Pass
from effc.passes.registry import pass_class

_TOKEN = re.compile(
    r"""(?P<space>\s+)|(?P<string>"(?:[^"\\]|\\.)*")|(?P<punct>[{},=|])|(?P<word>[^\s{},=|"]+)""", re.VERBOSE
)
_WORDS = {"true": True, "false": False, "none": None}


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """Parse pipeline text to pass objects.

    Raises:
        UsageError: With a caret under the offending place and the choices.
    """
    return _Parser(text).pipeline()


def format_pipeline(passes: Sequence[Pass]) -> str:
    """Print passes as pipeline text; options that have their default are left out."""
    return ",".join(format_pass(one) for one in passes)


def format_pass(one: Pass) -> str:
    """Print one pass as pipeline text."""
    options = [
        f"{item.name.replace('_', '-')}={_format_value(getattr(one, item.name))}"
        for item in dataclasses.fields(one)  # type: ignore[arg-type]
        if getattr(one, item.name) != item.default
    ]
    return one.name + ("{" + ",".join(options) + "}" if options else "")


def _format_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "|".join(_format_value(item) for item in value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and (
        value == "" or re.search(r'[\s{},=|"]', value) or value in _WORDS or _number(value) is not None
    ):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)


def _number(word: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return None


class _Parser:
    """Recursive descent over the tokens, each kept with its column for the caret."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        self.next = 0
        column = 0
        while column < len(text):
            token = _TOKEN.match(text, column)
            if token is None:
                raise self.error(column, "this string has no closing quote")
            if token.lastgroup != "space":
                self.tokens.append((str(token.lastgroup), token.group(), column))
            column = token.end()
        self.tokens.append(("end", "", len(text)))

    def error(self, column: int, message: str) -> UsageError:
        return UsageError(f"pipeline text: {message}\n  {self.text}\n  {' ' * column}^")

    def take(self) -> tuple[str, str, int]:
        token = self.tokens[self.next]
        self.next += token[0] != "end"
        return token

    def accept(self, punctuation: str) -> bool:
        found = self.tokens[self.next][:2] == ("punct", punctuation)
        self.next += found
        return found

    def pipeline(self) -> tuple[Pass, ...]:
        passes: list[Pass] = []
        if self.tokens[0][0] == "end":
            return ()
        while True:
            passes.append(self.one_pass())
            kind, word, column = self.take()
            if kind == "end":
                return tuple(passes)
            if word != ",":
                raise self.error(column, f"expected ',' or the end, found {word!r}")

    def one_pass(self) -> Pass:
        kind, name, column = self.take()
        if kind != "word":
            raise self.error(column, "expected the name of a pass")
        try:
            cls = pass_class(name)
        except UsageError as error:
            raise self.error(column, str(error)) from None
        options = self.options(cls) if self.accept("{") else {}
        try:
            return cls(**options)
        except UsageError as error:
            raise self.error(column, str(error)) from None

    def options(self, cls: type[Pass]) -> dict[str, Any]:
        options: dict[str, Any] = {}
        while not self.accept("}"):
            if options and not self.accept(","):
                _, word, column = self.take()
                raise self.error(column, f"expected ',' or '}}', found {word or 'the end'!r}")
            name, value, column = self.option(cls)
            if name in options:
                raise self.error(column, f"option {name.replace('_', '-')!r} is given twice")
            options[name] = value
        return options

    def option(self, cls: type[Pass]) -> tuple[str, Any, int]:
        kind, word, column = self.take()
        if kind != "word":
            raise self.error(column, "expected the name of an option")
        types_by_name = typing.get_type_hints(cls)
        fields = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
        name = word.replace("-", "_")
        if name not in fields:
            choices = [item.replace("_", "-") for item in fields]
            near = get_close_matches(word, choices, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise self.error(
                column, f"pass {cls.name!r} has no option {word!r}.{hint} Options: {', '.join(choices) or 'none'}."
            )
        if not self.accept("="):
            raise self.error(self.tokens[self.next][2], f"expected '=' after option {word!r}")
        at = self.tokens[self.next][2]
        items = [self.item()]
        while self.accept("|"):
            items.append(self.item())
        try:
            return name, _coerce(items, types_by_name[name]), column
        except TypeError as error:
            raise self.error(at, f"option {word!r} {error}") from None

    def item(self) -> Any:
        kind, word, column = self.take()
        if kind == "string":
            return re.sub(r"\\(.)", r"\1", word[1:-1])
        if kind != "word":
            raise self.error(column, "expected a value")
        if word in _WORDS:
            return _WORDS[word]
        number = _number(word)
        return word if number is None else number


def _coerce(items: list[Any], kind: Any) -> Any:
    """Fit parsed items to an annotated type, or raise TypeError with the rest of a sentence."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        for choice in typing.get_args(kind):
            try:
                return _coerce(items, choice)
            except TypeError:
                continue
        raise TypeError(f"does not take {_format_value(tuple(items))}")
    if typing.get_origin(kind) is tuple:
        return tuple(_coerce([item], typing.get_args(kind)[0]) for item in items)
    if len(items) > 1:
        raise TypeError("takes one value")
    return _coerce_one(items[0], kind)


def _coerce_one(item: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        if item not in choices:
            raise TypeError(f"takes one of {', '.join(map(str, choices))}, not {_format_value(item)}")
        return item
    if kind is type(None) and item is None:
        return None
    if kind is float and isinstance(item, int) and not isinstance(item, bool):
        return float(item)
    if kind is str and isinstance(item, (int, float)) and not isinstance(item, bool):
        return str(item)
    if type(item) is not kind:
        expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
        raise TypeError(f"takes {expected.get(kind, kind)}, not {_format_value(item)}")
    return item
