"""Reading event streams: any cut of the bytes, chunks of several tokens, and every way a stream can go wrong."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.bench.measure import Outcome
from holdfast.bench.stream import NOT_JSON, StreamReader, error_text


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(text: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}], model="m")


def delta(finish: str | None = None, **delta: str) -> bytes:
    return event(choices=[{"index": 0, "delta": delta, "finish_reason": finish}])


USAGE = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11})
DONE = b"data: [DONE]\n\n"


def read(*reads: tuple[float, bytes]) -> Outcome:
    """The outcome of a request sent at 10.0 s whose stream came in these (time, bytes)."""
    outcome = Outcome(0, 0.0, asked_tokens=4)
    reader = StreamReader(outcome, sent=10.0)
    for now, data in reads:
        reader.feed(data, now)
    reader.close()
    return outcome


def test_a_stream_of_completions() -> None:
    found = read(
        (10.25, text("a")), (10.5, text("b")), (11.0, text("c")), (11.25, text("", "length") + USAGE), (11.5, DONE)
    )
    assert found.ok
    assert found.ttft == 0.25
    assert found.chunk_gaps == [0.25, 0.5]
    assert found.e2el == 1.5
    assert (found.input_tokens, found.output_tokens, found.finish_reason) == (7, 4, "length")


def test_a_stream_of_chat_starts_with_a_role_which_is_no_text() -> None:
    found = read(
        (10.25, delta(role="assistant", content="")),
        (10.5, delta(content="Hi")),
        (11.0, delta(finish="stop", content="!")),
        (11.0, DONE),
    )
    assert (found.ttft, found.chunk_gaps) == (0.5, [0.5])
    assert found.output_tokens == 2, "without usage, chunks are counted"


def test_reasoning_is_text() -> None:
    found = read((10.5, delta(reasoning_content="hm")), (11.0, delta(finish="stop", content="ok")))
    assert (found.ttft, found.chunk_gaps) == (0.5, [0.5])


def test_events_of_one_read_came_at_one_time() -> None:
    found = read((10.5, text("a") + text("b", "stop")))
    assert (found.ttft, found.chunk_gaps) == (0.5, [0.0])


def test_carriage_returns_comments_and_other_fields_are_allowed() -> None:
    found = read((10.5, b": ping\r\nevent: x\r\n\r\n" + text("é").replace(b"\n", b"\r\n")), (11.0, DONE))
    assert found.ok
    assert found.num_chunks == 1


@given(cuts=st.lists(st.integers(0, 2000), max_size=30))
def test_any_cut_of_the_bytes_reads_the_same(cuts: list[int]) -> None:
    data = text("a") + text("é\u2028") + text("", "stop") + USAGE + DONE
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    found = read(*((10.5, data[start:end]) for start, end in pairwise(edges)))
    assert found == read((10.5, data))
    assert found.num_chunks == 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the stream ended early"),
        (text("a"), "the stream ended early"),
        (text("a", "abort") + DONE, "finish_reason abort"),
        (text("a", "error") + DONE, "finish_reason error"),
        (text("a") + event(error={"message": "lost the replica", "code": 500}) + DONE, "lost the replica"),
        (event(error="bad") + DONE, "bad"),
    ],
)
def test_what_ended_as_no_answer_ends_has_failed(data: bytes, reason: str) -> None:
    found = read((10.5, data))
    assert found.error is not None
    assert reason in found.error


@pytest.mark.parametrize(
    "payload", [b"<html>", b'{"choices":[{"text":"\xff\xfe"}]}', b'{"x":' + b"[" * 100_000, b"[]"]
)
def test_what_is_no_event_is_an_error_that_the_client_expects(payload: bytes) -> None:
    """Any other would end the whole measurement."""
    with pytest.raises(NOT_JSON):
        read((10.5, b"data: " + payload + b"\n\n"))


def test_choices_may_be_null() -> None:
    found = read((10.25, event(choices=None)), (10.5, text("a", "stop")), (11.0, DONE))
    assert (found.ok, found.ttft) == (True, 0.5)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ({"error": {"message": "too\n long", "type": "x"}}, "too long"),
        ({"message": "no"}, "no"),
        ({"error": "plain"}, "plain"),
        ({"detail": "Not Found"}, "{'detail': 'Not Found'}"),
        ("gone", "gone"),
    ],
)
def test_errors_are_told_in_one_line(error: object, line: str) -> None:
    assert error_text(error) == line
