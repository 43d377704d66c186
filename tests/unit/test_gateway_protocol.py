"""Bodies of requests: every field works, or is refused by name."""

from __future__ import annotations

import json

import pytest

from holdfast.core.errors import InvalidRequest
from holdfast.gateway.protocol import NEUTRAL, ChatCompletionRequest, CompletionRequest, parse_body

CHAT = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b'{"prompt": "a"', None, "not valid JSON"),
        (b'{"prompt": "\xff"}', None, "not valid JSON"),
        (b'{"prompt": "\\ud800"}', None, "not valid JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature", "finite"),
        (b'{"prompt": "a", "top_p": 1e999}', "top_p", "finite"),
        (b'{"prompt": "a", "logit_bias": {"1": Infinity}}', "logit_bias", "finite"),
        (b"[]", None, "object"),
        (b"{}", "prompt", "missing"),
        (b'{"prompt": "a", "max_tokens": "5"}', "max_tokens", "valid integer; got '5'"),
        (b'{"prompt": "a", "max_tokens": true}', "max_tokens", "valid integer"),
        (b'{"prompt": "a", "max_tokens": -1}', "max_tokens", "greater than or equal to 0"),
        (b'{"prompt": "a", "top_p": 0}', "top_p", "greater than 0"),
        (b'{"prompt": "a", "n": 0}', "n", "greater than or equal to 1"),
        (b'{"prompt": "a", "stop": ""}', "stop", "at least 1 character"),
        (b'{"prompt": []}', "prompt", "at least 1 item"),
        (b'{"prompt": [1, "a"]}', "prompt[1]", "valid integer; got 'a'"),
        (b'{"prompt": [[1], [-1]]}', "prompt[1][0]", "greater than or equal to 0"),
        (b'{"prompt": "a", "warp": 9}', "warp", "not a known field"),
        (b'{"prompt": "a", "stream_options": {}}', "stream_options", "needs `stream`"),
        (b'{"prompt": "a", "suffix": "b"}', "suffix", "not supported yet"),
    ],
)
def test_bad_completion_bodies_name_the_field(body: bytes, param: str | None, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refusal:
        parse_body(CompletionRequest, body)
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "warp": 1}]}, "messages[0].warp"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x" * 1001]}, "stop[0]"),
    ],
)
def test_bad_chat_bodies_name_the_field(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_body(ChatCompletionRequest, json.dumps(CHAT | fields).encode())
    assert refusal.value.param == param


def test_neutral_values_of_unsupported_fields_pass() -> None:
    fields = ChatCompletionRequest.model_fields
    for name, values in NEUTRAL.items():
        for value in (None, *values):
            if name in fields:
                parse_body(ChatCompletionRequest, json.dumps(CHAT | {name: value}).encode())


def test_a_deeply_nested_body_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        parse_body(ChatCompletionRequest, b'{"chat_template_kwargs": {"a": ' + b"[" * 100_000)


@pytest.mark.parametrize("prompt", ["a", "", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_every_form_of_prompt(prompt: object) -> None:
    assert parse_body(CompletionRequest, json.dumps({"prompt": prompt}).encode()).prompt == prompt
