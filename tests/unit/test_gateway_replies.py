"""Pieces and replies: what outputs of the engine become, in OpenAI's shapes."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.core.boot import Endpoints
from holdfast.core.errors import QueueFull, StepFailed
from holdfast.core.request import TokenLogprobs
from holdfast.core.wire import TokenOutput
from holdfast.gateway.generation import Generation, Piece
from holdfast.gateway.metrics import Metrics
from holdfast.gateway.openai import ServedModel, chat_job, completion_job
from holdfast.gateway.protocol import ChatCompletionRequest, CompletionRequest
from holdfast.gateway.replies import ChatReply, CompletionReply, error_body, event
from holdfast.gateway.router import Router
from holdfast.gateway.tokenlog import LogEntry, TokenLog
from support.gateway import byte_tokenizer, served_model


class Talk(Generation):
    """A generation that is never submitted: its outputs come from the test."""

    def feed(self, *token_ids: int, **fields: Any) -> Piece:
        choice, piece = self.choices[0], Piece(0)
        choice.feed(TokenOutput(choice.request_id, choice.num_tokens, list(token_ids), **fields), piece)
        return piece


Start = Callable[..., Awaitable[Talk]]


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Router]:
    router = Router(Endpoints(str(tmp_path)), TokenLog(), Metrics("tiny"), max_live=8)
    yield router
    router.close()


@pytest.fixture
def model(tmp_path: Path) -> ServedModel:
    return served_model(byte_tokenizer(tmp_path))


@pytest.fixture
def complete(model: ServedModel, router: Router) -> Start:
    async def complete(**fields: object) -> Talk:
        request = CompletionRequest.model_validate({"prompt": "abc"} | fields)
        return Talk(await completion_job(request, model, "id"), [], router, model.tokenizer)

    return complete


@pytest.fixture
def chat(model: ServedModel, router: Router) -> Start:
    async def chat(**fields: object) -> Talk:
        request = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "x"}]} | fields)
        return Talk(await chat_job(request, model, "id"), [], router, model.tokenizer)

    return chat


def scored(*token_ids: int) -> list[TokenLogprobs]:
    return [TokenLogprobs(token_id, -0.5, 2, [(97, -0.25), (98, float("-inf"))]) for token_id in token_ids]


async def test_a_stop_string_ends_a_choice_within_an_output(complete: Start) -> None:
    talk = await complete(stop="lo w")
    piece = talk.feed(*b"hello", finish=None)
    assert piece.text == "hel"
    piece = talk.feed(*b" world")
    assert (piece.text, piece.finish_reason, piece.stop_reason) == ("", "stop", "lo w")
    assert talk.choices[0].num_tokens == 7, "tokens behind the stop string do not count"


async def test_what_a_stop_string_held_back_comes_with_the_end(complete: Start) -> None:
    talk = await complete(stop="lower")
    assert talk.feed(*b"hello").text == "hel"
    piece = talk.feed(*b"w\xf0\x9f", finish="length")
    assert (piece.text, piece.finish_reason) == ("low\ufffd", "length")


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "ab")])
async def test_a_stop_token_is_silent_unless_asked_for(complete: Start, include: bool, text: str) -> None:
    talk = await complete(stop_token_ids=[98], include_stop_str_in_output=include)
    piece = talk.feed(*b"ab", finish="stop", stop_token_id=98)
    assert (piece.text, piece.token_ids, piece.stop_reason) == (text, [97, 98], 98)


async def test_completion_logprobs(complete: Start, model: ServedModel) -> None:
    talk = await complete(logprobs=2)
    reply = CompletionReply(talk.job, "tiny", model.tokenizer, 0)
    piece = talk.feed(0xC3, 0xA9, 99, logprobs=scored(0xC3, 0xA9, 99), finish="length")
    [choice] = reply.whole(talk, [piece])["choices"]
    assert choice["text"] == "éc"
    assert choice["logprobs"] == {
        "tokens": ["bytes:\\xc3", "bytes:\\xa9", "c"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [
            {"bytes:\\xc3": -0.5, "b": -9999.0, "a": -0.25},
            {"bytes:\\xa9": -0.5, "b": -9999.0, "a": -0.25},
            {"c": -0.5, "b": -9999.0, "a": -0.25},
        ],
        "text_offset": [0, 0, 1],
    }
    json.dumps(choice, allow_nan=False)


@pytest.mark.parametrize("max_tokens", [0, 2])
async def test_echo_puts_the_prompt_first(complete: Start, model: ServedModel, max_tokens: int) -> None:
    talk = await complete(echo=True, logprobs=0, max_tokens=max_tokens)
    reply = CompletionReply(talk.job, "tiny", model.tokenizer, 0)
    piece = talk.feed(100, logprobs=scored(100), prompt_logprobs=scored(98, 99), finish="length")
    [choice] = reply.whole(talk, [piece])["choices"]
    output = "d" if max_tokens else ""
    assert choice["text"] == "abc" + output
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c", *output]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5] + [-0.5] * len(output)
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"b": -0.5}]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3][: 3 + len(output)]


async def test_completion_chunks_tell_of_the_prompt_once(complete: Start, model: ServedModel) -> None:
    talk = await complete(stream=True, return_token_ids=True, prompt_logprobs=1)
    reply = CompletionReply(talk.job, "tiny", model.tokenizer, 0)
    chunks = reply.chunks(talk, talk.feed(0xC3, prompt_logprobs=scored(98, 99)))
    chunks += reply.chunks(talk, talk.feed(0xA9))
    chunks += reply.chunks(talk, talk.feed(99, finish="length"))
    first, *others = [chunk["choices"][0] for chunk in chunks]
    assert first["prompt_token_ids"] == [97, 98, 99]
    assert [set(entry or {}) for entry in first["prompt_logprobs"]] == [set(), {"97", "98"}, {"97", "99"}]
    assert len(others) == 2
    assert all(not {"prompt_token_ids", "prompt_logprobs"} & set(choice) for choice in others)
    assert [choice["token_ids"] for choice in (first, *others)] == [[0xC3], [0xA9], [99]]


async def test_a_stream_tells_of_the_prompt_before_there_is_text(complete: Start, model: ServedModel) -> None:
    talk = await complete(stream=True, prompt_logprobs=0)
    reply = CompletionReply(talk.job, "tiny", model.tokenizer, 0)
    [chunk] = reply.chunks(talk, talk.feed(0xC3, prompt_logprobs=scored(98, 99)))
    assert len(chunk["choices"][0]["prompt_logprobs"]) == 3


async def test_alternatives_of_the_prompt_are_as_many_as_asked_for(complete: Start, model: ServedModel) -> None:
    # with echo the engine is asked for the larger of `logprobs` and `prompt_logprobs`
    talk = await complete(echo=True, logprobs=2, prompt_logprobs=1)
    assert talk.job.submits[0].params.prompt_logprobs == 2
    reply = CompletionReply(talk.job, "tiny", model.tokenizer, 0)
    piece = talk.feed(100, logprobs=scored(100), prompt_logprobs=scored(99, 99), finish="length")
    [choice] = reply.whole(talk, [piece])["choices"]
    assert [set(entry or {}) for entry in choice["prompt_logprobs"]] == [set(), {"97", "99"}, {"97", "99"}]
    assert set(choice["logprobs"]["top_logprobs"][1]) == {"a", "b", "c"}


async def test_chat_chunks_tell_of_the_prompt_once(chat: Start, model: ServedModel) -> None:
    talk = await chat(stream=True, return_token_ids=True, prompt_logprobs=1)
    reply = ChatReply(talk.job, "tiny", model.tokenizer, 0)
    first, *others = reply.chunks(talk, talk.feed(97, prompt_logprobs=scored(99)))
    others += reply.chunks(talk, talk.feed(98, finish="length"))
    assert first["prompt_token_ids"] == talk.job.prompts[0].token_ids
    assert set(first["prompt_logprobs"][1]) == {"97", "99"}
    assert [chunk["choices"][0].get("token_ids") for chunk in others] == [[97], [98], None]
    assert all(not {"prompt_token_ids", "prompt_logprobs"} & set(chunk) for chunk in others)


async def test_chat_chunks_in_order(chat: Start, model: ServedModel) -> None:
    talk = await chat(stream=True, stream_options={"include_usage": True})
    reply = ChatReply(talk.job, "tiny", model.tokenizer, 0)
    chunks = reply.chunks(talk, talk.feed(*b"hi"))
    chunks += reply.chunks(talk, talk.feed(259, finish="stop", stop_token_id=259))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"] for choice in choices] == [{"role": "assistant", "content": ""}, {"content": "hi"}, {}]
    assert [choice["finish_reason"] for choice in choices] == [None, None, "stop"]
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    last = reply.usage_chunk(talk)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)


async def test_half_a_character_sends_nothing(chat: Start, model: ServedModel) -> None:
    talk = await chat(stream=True)
    reply = ChatReply(talk.job, "tiny", model.tokenizer, 0)
    reply.chunks(talk, talk.feed(97))
    assert reply.chunks(talk, talk.feed(0xC3)) == []
    [chunk] = reply.chunks(talk, talk.feed(0xA9))
    assert chunk["choices"][0]["delta"] == {"content": "é"}


async def test_chat_logprobs_and_prompt_logprobs(chat: Start, model: ServedModel) -> None:
    talk = await chat(logprobs=True, top_logprobs=1, prompt_logprobs=2, return_token_ids=True)
    reply = ChatReply(talk.job, "tiny", model.tokenizer, 0)
    whole = reply.whole(talk, [talk.feed(257, logprobs=scored(257), prompt_logprobs=scored(99), finish="length")])
    [choice] = whole["choices"]
    assert choice["logprobs"]["content"] == [
        {
            "token": "hel",
            "logprob": -0.5,
            "bytes": [104, 101, 108],
            "top_logprobs": [{"token": "a", "logprob": -0.25, "bytes": [97]}],
        }
    ]
    assert choice["token_ids"] == [257]
    assert whole["prompt_token_ids"] == talk.job.prompts[0].token_ids
    assert whole["prompt_logprobs"][0] is None
    assert whole["prompt_logprobs"][1]["99"] == {"logprob": -0.5, "rank": 2, "decoded_token": "c"}
    assert whole["prompt_logprobs"][1]["97"]["rank"] == 1


def test_events_are_one_line_of_json() -> None:
    assert event({"a": "é\n"}) == 'data: {"a":"é\\n"}\n\n'.encode()


def test_errors_in_openais_shape() -> None:
    full = error_body(QueueFull("full", code="queue_full"))["error"]
    assert full == {"message": "full", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    assert error_body(StepFailed("rank 0"))["error"]["message"] == "rank 0"
    assert "secret" not in error_body(RuntimeError("secret"))["error"]["message"]


@pytest.mark.parametrize("end", "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
def test_an_event_is_one_line_whatever_a_client_takes_for_a_lines_end(end: str) -> None:
    line, *rest = event({"text": f"a{end}é"}).decode().splitlines()
    assert rest == [""]
    assert json.loads(line.removeprefix("data: ")) == {"text": f"a{end}é"}


@pytest.mark.parametrize("stop", [None, "lo w", "o w\u00f6", "rld"])
@pytest.mark.parametrize("ends", [{"finish": "length"}, {"finish": "stop", "stop_token_id": 98}, {}])
async def test_from_any_position_on_a_reader_is_told_the_rest(
    model: ServedModel, router: Router, stop: str | None, ends: dict[str, Any]
) -> None:
    """What one who read token by token had been told by then, and what one who comes back there is told, are one."""
    asked = {"prompt": "abc", "stop_token_ids": [98]} | ({"stop": stop} if stop else {})
    job = await completion_job(CompletionRequest.model_validate(asked), model, "id")
    entry = LogEntry(job.submits[0])
    token_ids = list("hello w\u00f6rld b".encode())

    def reader(after: int = 0) -> Generation:
        return Generation(job, [entry], router, model.tokenizer, [after])

    async def told_by(generation: Generation) -> list[Piece]:
        """All that there is now."""
        pieces = []
        async for some in generation.pieces():
            pieces += some
            if generation.choices[0].num_tokens >= len(entry.token_ids):
                break
        return pieces

    first, told = reader(), [(0, "", [])]
    for index, token_id in enumerate(token_ids):
        last = index == len(token_ids) - 1
        entry.add(TokenOutput(entry.submit.request_id, index, [token_id], **(ends if last else {})))
        if first.choices[0].finished:
            continue
        pieces = first.pieces()
        for piece in await anext(pieces):
            before, text, reasons = told[-1]
            reasons = [*reasons, piece.finish_reason] if piece.finish_reason else reasons
            told.append((before + 1 + bool(piece.finish_reason), text + piece.text, reasons))
    _, all_text, all_reasons = told[-1]
    for at, text, reasons in told:
        rest = [] if at > len(token_ids) + 1 else await told_by(reader(at))
        assert text + "".join(piece.text for piece in rest) == all_text
        assert reasons + [piece.finish_reason for piece in rest if piece.finish_reason] == all_reasons
