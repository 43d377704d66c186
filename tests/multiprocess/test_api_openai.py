"""The API through OpenAI's own client, against real processes: that what it documents is what happens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from support.service import Service

MODEL = "demo"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


def ask(client: openai.OpenAI, **fields: Any) -> ChatCompletion:
    return client.chat.completions.create(model=MODEL, **{"messages": QUESTION, "temperature": 0, **fields})


def complete(client: openai.OpenAI, prompt: Any = "The capital of France is", **fields: Any) -> Completion:
    return client.completions.create(model=MODEL, prompt=prompt, **{"temperature": 0, "max_tokens": 8, **fields})


def text_of_stream(stream: Any) -> str:
    return "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)


def test_chat_answers_and_ends(client: openai.OpenAI) -> None:
    reply = ask(client)
    [choice] = reply.choices
    assert "Paris" in (choice.message.content or "")
    assert choice.finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_chat_stream_is_the_same_text_in_openais_order(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    whole = ask(client)
    *with_choices, last = chunks
    deltas = [chunk.choices[0].delta for chunk in with_choices]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in with_choices] == [None] * (len(with_choices) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in with_choices)
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_logprobs_carry_bytes(client: openai.OpenAI) -> None:
    [choice] = ask(client, logprobs=True, top_logprobs=3).choices
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    said = b"".join(bytes(token.bytes or []) for token in tokens)
    assert said.decode().startswith(choice.message.content or "?")
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob <= 0, "greedy takes the most likely"


def test_completion_with_logprobs(client: openai.OpenAI) -> None:
    [choice] = complete(client, logprobs=2).choices
    assert choice.text.startswith(" Paris")
    assert choice.logprobs is not None
    tokens, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
    assert "".join(tokens) == choice.text
    assert [choice.text[start : start + len(token)] for token, start in zip(tokens, offsets, strict=True)] == tokens
    assert len(choice.logprobs.token_logprobs or []) == len(tokens) == 8
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs or [])


def test_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    [scored] = complete(client, max_tokens=0, echo=True, logprobs=1).choices
    assert scored.text == "The capital of France is"
    assert scored.logprobs is not None
    assert scored.logprobs.tokens == ["The", " capital", " of", " France", " is"]
    first, *others = scored.logprobs.token_logprobs or []
    assert first is None
    assert all(logprob <= 0 for logprob in others)
    [continued] = complete(client, max_tokens=1, echo=True, logprobs=1).choices
    assert continued.text == scored.text + " Paris"
    assert continued.logprobs is not None
    assert (continued.logprobs.token_logprobs or [])[:-1] == pytest.approx([None, *others], abs=1e-4)


def test_prompts_as_text_and_as_tokens_agree(client: openai.OpenAI) -> None:
    def tokens(text: str) -> list[int]:
        reply = client.post("/../tokenize", body={"prompt": text, "add_special_tokens": True}, cast_to=dict[str, Any])
        found: list[int] = reply["tokens"]
        return found

    texts = ["The capital of France is", "Two plus two is"]
    from_text = complete(client, texts)
    from_tokens = complete(client, [tokens(text) for text in texts])
    assert [choice.text for choice in from_text.choices] == [choice.text for choice in from_tokens.choices]
    assert [choice.index for choice in from_text.choices] == [0, 1]
    assert complete(client, tokens(texts[0])).choices[0].text == from_text.choices[0].text


def test_n_with_a_seed_reproduces(client: openai.OpenAI) -> None:
    def draw(**fields: Any) -> list[str]:
        reply = complete(client, "Once upon a time", temperature=1.0, max_tokens=12, **fields)
        return [choice.text for choice in reply.choices]

    four = draw(n=4, seed=11)
    assert len(set(four)) == 4
    assert draw(n=4, seed=11) == four
    assert draw(n=1, seed=11) == four[:1], "the first choice has the request's own seed"
    assert draw(n=4, seed=12) != four
    assert draw() != draw()


def test_stop_strings_across_tokens(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=40).choices[0].text
    stop = whole[12:20]
    cut = whole[: whole.index(stop)]
    reply = complete(client, max_tokens=40, stop=[stop, "\x00"])
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (cut, "stop")
    streamed = complete(client, max_tokens=40, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut
    included = complete(client, max_tokens=40, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert included.choices[0].text == cut + stop


def test_stop_token_ids_and_min_tokens(client: openai.OpenAI) -> None:
    whole = complete(client, extra_body={"return_token_ids": True}).choices[0]
    token_ids: list[int] = whole.token_ids
    third = token_ids[2]
    stopped = complete(client, extra_body={"stop_token_ids": [third], "return_token_ids": True}).choices[0]
    at = token_ids.index(third)
    assert stopped.token_ids == token_ids[: at + 1]
    assert stopped.finish_reason == "stop"
    assert whole.text.startswith(stopped.text)
    longer = complete(client, extra_body={"stop_token_ids": [third], "min_tokens": 5}, max_tokens=5)
    assert longer.choices[0].finish_reason == "length"


def test_a_stream_never_splits_a_character(client: openai.OpenAI) -> None:
    # the bias makes the model speak in single bytes, so that characters span tokens, and some are broken
    fields: dict[str, Any] = {"logit_bias": {str(token_id): 12 for token_id in range(30, 260)}, "temperature": 1.0}
    extra = {"ignore_eos": True, "skip_special_tokens": False, "return_token_ids": True}
    asked: Any = [{"role": "user", "content": "Repeat: \U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467 漢字 é"}]
    stream = ask(client, messages=asked, stream=True, seed=5, max_tokens=40, extra_body=extra, **fields)
    text, token_ids = "", []
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            token_ids += getattr(choice, "token_ids", None) or []
    whole = client.post("/../detokenize", body={"tokens": token_ids}, cast_to=dict[str, Any])
    assert len(token_ids) == 40
    assert text == whole["prompt"]
    assert not text.isascii()


def test_equal_prompts_share_the_prefix_cache(client: openai.OpenAI) -> None:
    prompt = "A long story about a lighthouse keeper and her seven cats. " * 6
    first, second = complete(client, prompt), complete(client, prompt)
    assert first.choices[0].text == second.choices[0].text
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= 64


def test_requests_do_not_disturb_each_other(client: openai.OpenAI) -> None:
    def story(index: int) -> str:
        stream = ask(
            client,
            messages=[{"role": "user", "content": f"Tell me about the number {index}."}],
            stream=True,
            max_tokens=12,
            temperature=0.8,
            seed=index,
        )
        return text_of_stream(stream)

    alone = [story(index) for index in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(story, range(6))) == alone


def test_models_are_listed(client: openai.OpenAI, server: Service) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.completions.create(model="gpt-4", prompt="a")
