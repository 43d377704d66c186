"""From a conversation to the text of a prompt: the model's Jinja chat template, in a sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from holdfast.core.errors import ConfigError, InvalidRequest, ModelError
from holdfast.gateway.protocol import ChatMessage, TextPart

_RESERVED = ("messages", "add_generation_prompt", "raise_exception", "strftime_now")
_DEVELOPER = re.compile("['\"]developer['\"]")
_MARK = "\ue000holdfast-end\ue001"
"""Put behind the message to be continued, to find its end in the rendered text."""


class ChatTemplate:
    """The template of one model, compiled. Rendering raises `InvalidRequest`, whatever goes wrong in the template:
    its input came with the request."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        """`source` is None for a model without one. Raises `ModelError` for a template that does not parse."""
        self._special_tokens = dict(special_tokens)
        self._knows_developer = source is not None and _DEVELOPER.search(source) is not None
        try:
            self._template = None if source is None else _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"chat template, line {error.lineno}: {error.message}") from error

    def render(
        self,
        messages: list[ChatMessage],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. `add_generation_prompt` (by default, unless the last message is continued) opens the
        assistant's turn; `continue_final_message` leaves the last message open instead. `extra` are further
        variables of the template."""
        if add_generation_prompt and continue_final_message:
            raise InvalidRequest(
                "`continue_final_message` and `add_generation_prompt` exclude each other",
                param="continue_final_message",
            )
        for name in extra or {}:
            if name in _RESERVED:
                raise InvalidRequest(f"`chat_template_kwargs`: {name!r} is reserved", param="chat_template_kwargs")
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions, or start the server with --chat-template",
                param="messages",
            )
        plain = [self._plain(message, index) for index, message in enumerate(messages)]
        if continue_final_message:
            if not plain[-1]["content"]:
                raise InvalidRequest("`continue_final_message`: the last message has no content", param="messages")
            plain[-1]["content"] += _MARK
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        variables = self._special_tokens | dict(extra or {})
        try:
            text = self._template.render(variables, messages=plain, add_generation_prompt=add_generation_prompt)
        except MemoryError:
            raise
        except Exception as error:
            raise InvalidRequest(f"the chat template failed: {error}", param="messages") from error
        if not continue_final_message:
            return text
        head, mark, _ = text.rpartition(_MARK)
        if not mark:
            raise InvalidRequest(
                "`continue_final_message`: this model's chat template drops the last message", param="messages"
            )
        return head

    def _plain(self, message: ChatMessage, index: int) -> dict[str, Any]:
        """The message as templates expect it: a role and a text."""
        role: str = message.role
        if role == "developer" and not self._knows_developer:
            role = "system"
        plain: dict[str, Any] = {"role": role, "content": _text(message, index)}
        for name in ("name", "reasoning_content"):
            value = getattr(message, name)
            if value is not None:
                plain[name] = value
        return plain


def template_source(option: str | None, from_model: str | None) -> str | None:
    """The template to use: `--chat-template` (a file's name, or the template itself) before the model's own."""
    if option is None:
        return from_model
    if "{" in option:
        return option
    try:
        return Path(option).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--chat-template {option}: {error}") from error


def _text(message: ChatMessage, index: int) -> str:
    """The content as one string; parts are lines of it."""
    if message.content is None:
        return ""
    if isinstance(message.content, str):
        return message.content
    texts: list[str] = []
    for place, part in enumerate(message.content):
        if not isinstance(part, TextPart):
            field = f"messages[{index}].content[{place}]"
            raise InvalidRequest(f"`{field}.type`: {part.type!r} is not supported, only 'text' is", param=field)
        texts.append(part.text)
    return "\n".join(texts)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; to serve, it is what it encloses."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """What `transformers` gives to templates, which is what they are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    # Jinja's own filter escapes HTML, which models were not trained on
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
