"""Chat templates: what a conversation becomes, and that a template's failure is the request's, never the server's."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.core.errors import ConfigError, InvalidRequest, ModelError
from holdfast.gateway.chat import ChatTemplate, template_source
from holdfast.gateway.protocol import ChatMessage
from support.gateway import CHATML

LLAMA2 = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}{{ bos_token + '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content | trim + eos_token }}{% endif %}{% endfor %}"
)
TRAINING = """\
{% for message in messages %}
    {% if message.role == "assistant" %}
        {% generation %}
{{ message.content }}{{ eos_token }}
        {% endgeneration %}
        {% continue %}
    {% endif %}
{{ message.role }}: {{ message | tojson }}
{% endfor %}
"""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def said(role: str, content: object) -> ChatMessage:
    return ChatMessage.model_validate({"role": role, "content": content})


def test_generation_prompt_by_default_and_on_demand() -> None:
    template = ChatTemplate(CHATML, {})
    messages = [said("user", "hi")]
    turn = "<|im_start|>user\nhi<|im_end|>\n"
    assert template.render(messages) == turn + "<|im_start|>assistant\n"
    assert template.render(messages, add_generation_prompt=False) == turn


def test_continue_final_message_leaves_it_open() -> None:
    template = ChatTemplate(LLAMA2, SPECIAL)
    messages = [said("user", "hi"), said("assistant", "Sure, ")]
    # the template trims the content, the mark behind it keeps what was written
    assert template.render(messages, continue_final_message=True) == "<s>[INST] hi [/INST] Sure, "
    with pytest.raises(InvalidRequest, match="exclude each other"):
        template.render(messages, continue_final_message=True, add_generation_prompt=True)


def test_special_tokens_and_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert ChatTemplate(LLAMA2, SPECIAL).render([said("user", parts)]) == "<s>[INST] a\nb [/INST]"


def test_extensions_templates_are_written_for() -> None:
    rendered = ChatTemplate(TRAINING, SPECIAL).render([said("user", "<é>"), said("assistant", "ok")])
    assert rendered == 'user: {"role": "user", "content": "<é>"}\nok</s>\n'


def test_developer_is_system_where_the_template_knows_none() -> None:
    own = "{% for m in messages %}{{ 'D' if m.role == 'developer' else m.role }}{% endfor %}"
    assert ChatTemplate(CHATML, {}).render([said("developer", "x")]).startswith("<|im_start|>system\n")
    assert ChatTemplate(own, {}).render([said("developer", "x")]) == "D"


def test_kwargs_reach_the_template_but_do_not_replace_the_conversation() -> None:
    template = ChatTemplate("{{ 'think' if enable_thinking else 'no' }}{{ bos_token }}", SPECIAL)
    assert template.render([said("user", "x")], extra={"enable_thinking": True}) == "think<s>"
    with pytest.raises(InvalidRequest, match="'messages' is reserved"):
        template.render([said("user", "x")], extra={"messages": []})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LLAMA2, "roles must alternate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ missing.field }}", "missing"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_failing_template_is_a_bad_request(source: str, message: str) -> None:
    template = ChatTemplate(source, SPECIAL)
    with pytest.raises(InvalidRequest, match=message):
        template.render([said("assistant", "x")])


def test_a_part_that_is_not_text_is_refused_by_its_type() -> None:
    template = ChatTemplate(CHATML, {})
    image = {"type": "image_url", "image_url": {"url": "x"}}
    with pytest.raises(InvalidRequest, match="image_url") as refusal:
        template.render([said("user", "a"), said("user", [{"type": "text", "text": "b"}, image])])
    assert refusal.value.param == "messages[1].content[1]"


def test_without_a_template_chat_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        ChatTemplate(None, {}).render([said("user", "x")])


def test_a_template_that_does_not_parse_names_the_line() -> None:
    with pytest.raises(ModelError, match="chat template, line 2"):
        ChatTemplate("\n{% if %}", {})


def test_the_option_is_a_file_or_the_template_itself(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("from file")
    model = "from model"
    assert template_source(None, model) == model
    assert template_source(None, None) is None
    assert template_source("{{ x }}", model) == "{{ x }}"
    assert template_source(str(file), model) == "from file"
    with pytest.raises(ConfigError, match="--chat-template"):
        template_source(str(tmp_path / "absent"), model)
