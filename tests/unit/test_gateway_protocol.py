"""Bodies of requests: every field works, or is refused by name."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from holdfast.core.errors import InvalidRequest
from holdfast.gateway.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, parse_body

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
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "content": "", "audio": {"id": "x"}}]}, "messages[0].audio"),
        ({"echo": True}, "echo"),
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


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": None, "response_format": None, "reasoning_effort": None},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]},
        {"parallel_tool_calls": False, "store": False, "service_tier": "auto", "verbosity": "medium"},
        {"messages": [{"role": "assistant", "content": "x", "refusal": None, "tool_calls": [], "annotations": []}]},
    ],
)
def test_unsupported_fields_pass_where_they_ask_for_nothing(fields: dict[str, object]) -> None:
    parse_body(ChatCompletionRequest, json.dumps(CHAT | fields).encode())


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (CompletionRequest, {"prompt": [0.5] * 5000}, "prompt[0]"),
        (CompletionRequest, {"prompt": [[0.5]] * 5000}, "prompt[0][0]"),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": [0.5] * 5000}, "stop_token_ids[0]"),
        (CompletionRequest, {"prompt": "a", "stop": [1] * 5000}, "stop[0]"),
        (ChatCompletionRequest, {"messages": [{}] * 5000}, "messages[0].role"),
        (
            ChatCompletionRequest,
            {"messages": [{"role": "user", "content": [{}] * 5000}]},
            "messages[0].content[0].type",
        ),
        (DetokenizeRequest, {"tokens": [0.5] * 5000}, "tokens[0]"),
    ],
)
def test_a_list_stops_at_its_first_fault(kind: type[CompletionRequest], body: dict[str, object], param: str) -> None:
    """Guards the event loop: collecting a million faults took seconds, and a gigabyte."""
    with pytest.raises(InvalidRequest) as refused:
        parse_body(kind, json.dumps(body).encode())
    assert refused.value.param == param
    found = refused.value.__context__
    assert isinstance(found, ValidationError)
    assert found.error_count() < 10


@pytest.mark.parametrize(
    "fields", [{f"x{i}": 1 for i in range(1001)}, {"logit_bias": {str(token_id): 999 for token_id in range(1001)}}]
)
def test_many_faults_are_not_told_one_by_one(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match="more than 1000 faults"):
        parse_body(CompletionRequest, json.dumps({"prompt": "a"} | fields).encode())


def test_logit_bias_has_a_limit() -> None:
    with pytest.raises(InvalidRequest, match="at most 1024") as refused:
        parse_body(
            CompletionRequest, json.dumps({"prompt": "a", "logit_bias": {str(i): 1 for i in range(1025)}}).encode()
        )
    assert refused.value.param == "logit_bias"


def test_a_deeply_nested_body_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        parse_body(ChatCompletionRequest, b'{"chat_template_kwargs": {"a": ' + b"[" * 100_000)


@pytest.mark.parametrize("prompt", ["a", "", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_every_form_of_prompt(prompt: object) -> None:
    assert parse_body(CompletionRequest, json.dumps({"prompt": prompt}).encode()).prompt == prompt
