"""Reading the event stream of one request: bytes and the time they came in, an `Outcome` out. No clock, no socket."""

from __future__ import annotations

from typing import Any

import msgspec

from holdfast.bench.measure import Outcome


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


NOT_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not the JSON it wants."""

_decode = msgspec.json.Decoder(_Event).decode


class StreamReader:
    """Fills in the outcome of a request that was sent at `sent`. `sent` and `now` are of one clock, in seconds."""

    def __init__(self, outcome: Outcome, sent: float) -> None:
        self._outcome = outcome
        self._sent = sent
        self._rest = b""
        self._last_chunk: float | None = None
        self._usage: _Usage | None = None
        self._done = False

    def feed(self, data: bytes, now: float) -> None:
        """Take what one read of the socket gave: events, whole or in part. Events of one read came at one time.

        Raises one of `NOT_JSON` for an event that is not a JSON object of the expected shape.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self._done = True
            else:
                self._event(_decode(payload), now)
            self._outcome.e2el = now - self._sent

    def _event(self, event: _Event, now: float) -> None:
        outcome = self._outcome
        if event.error is not None:
            outcome.error = f"error in the stream: {error_text(event.error)}"
        if event.usage is not None:
            self._usage = event.usage
        for choice in event.choices or ():
            outcome.finish_reason = choice.finish_reason or outcome.finish_reason
            delta = choice.delta
            if choice.text or (delta and (delta.content or delta.reasoning or delta.reasoning_content)):
                if self._last_chunk is None:
                    outcome.ttft = now - self._sent
                else:
                    outcome.chunk_gaps.append(now - self._last_chunk)
                self._last_chunk = now

    def close(self) -> None:
        """The stream is over: count the tokens, and say so if it ended as no answer ends."""
        outcome = self._outcome
        outcome.output_tokens = outcome.num_chunks
        if self._usage is not None:
            outcome.input_tokens = self._usage.prompt_tokens
            outcome.output_tokens = self._usage.completion_tokens
        if outcome.error is not None:
            return
        if outcome.finish_reason in ("abort", "error"):
            outcome.error = f"finish_reason {outcome.finish_reason}"
        elif outcome.finish_reason is None and not self._done:
            outcome.error = "the stream ended early"


def error_text(error: Any) -> str:
    """The message in an OpenAI error, or whatever was sent instead, in one line."""
    if isinstance(error, dict):
        error = error.get("error", error)
    if isinstance(error, dict):
        error = error.get("message", error)
    return " ".join(str(error).split())[:300]
