"""Renders chat templates, the Jinja programs that come with a tokenizer, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from effc.errors import EngineError, UsageError
from effc.runtime.assets import Assets


class GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Keep the body, drop the mark."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _RefusedError(Exception):
    """The template refused the conversation."""


def find_template(assets: Assets) -> str | None:
    """The engine's chat template: `chat_template.jinja`, `chat_template.json` or in `tokenizer_config.json`.

    Where several are named, `default` is taken.
    """
    text = assets.text("chat_template.jinja")
    if text is not None:
        return text
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = assets.json_object(name).get("chat_template")
        if isinstance(template, list):
            named = {item["name"]: item["template"] for item in template if {"name", "template"} <= set(item)}
            template = named.get("default")
        if isinstance(template, str):
            return template
    return None


def render(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """Text of a conversation up to where the assistant's next words begin.

    Args:
        template: Jinja source. It may use what Hugging Face gives its templates: `raise_exception`,
            `strftime_now`, the filter `tojson`, loop controls and `generation` blocks.
        messages: Mappings with `role` and `content`.
        variables: Further names, the special tokens mostly.

    Raises:
        UsageError: The template refuses the conversation.
        EngineError: The template is damaged or does what the sandbox forbids.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=messages, add_generation_prompt=True, **variables)
    except _RefusedError as error:
        raise UsageError(f"the chat template refuses the conversation: {error}.") from error
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise EngineError(
            f"the engine's chat template fails: {type(error).__name__}: {error}. "
            "Render the prompt yourself and generate without chat."
        ) from error


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which no template of a language model wants.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
