"""Replies in OpenAI's shapes: whole ones, and chunks of a stream. Plain dicts, encoded by msgspec: a chunk per
token must cost little."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from holdfast.core.errors import HoldfastError, RequestError
from holdfast.core.request import TokenLogprobs
from holdfast.gateway.generation import Generation, Piece
from holdfast.gateway.openai import Job
from holdfast.gateway.tokenizer import Tokenizer

to_json = msgspec.json.encode

_LINE_ENDS = {end.encode(): f"\\u{ord(end):04x}".encode() for end in "\x85\u2028\u2029"}
"""JSON may hold these as they are, but clients that use `str.splitlines` (httpx's `iter_lines`) end lines there."""

LEAST_LOGPROB = -9999.0
"""JSON has no -Infinity."""

Json = dict[str, Any]


def error_body(error: BaseException) -> Json:
    """OpenAI's error object."""
    if isinstance(error, RequestError):
        return {"error": {"message": str(error), "type": error.kind, "param": error.param, "code": error.code}}
    message = str(error) if isinstance(error, HoldfastError) else "the server failed; its log says why"
    return {"error": {"message": message, "type": "internal_server_error", "param": None, "code": None}}


def event(body: Json, at: str | None = None) -> bytes:
    """One server-sent event: one line to every client, whatever it takes for a line's end. `at`: its id."""
    encoded = to_json(body)
    for end, escaped in _LINE_ENDS.items():
        encoded = encoded.replace(end, escaped)
    return (b"" if at is None else b"id: " + at.encode() + b"\n") + b"data: " + encoded + b"\n\n"


DONE = b"data: [DONE]\n\n"


class Reply:
    """How one job is answered. Subclasses know the endpoint's shapes."""

    id_prefix: str
    object: str
    chunk_object: str

    def __init__(self, job: Job, model_name: str, tokenizer: Tokenizer, created: int) -> None:
        self.job = job
        self._tokenizer = tokenizer
        self._head: Json = {"id": job.request_id, "created": created, "model": model_name}

    def whole(self, generation: Generation, pieces: list[Piece]) -> Json:
        """The reply without streaming; `pieces` are whole choices, in order."""
        raise NotImplementedError

    def chunks(self, generation: Generation, piece: Piece) -> list[Json]:
        """What one piece sends."""
        raise NotImplementedError

    def skip(self, indices: set[int]) -> None:
        """These choices have begun: their client has been told so."""
        raise NotImplementedError

    def usage_chunk(self, generation: Generation) -> Json:
        """The last chunk, when the client asked for usage."""
        return self._chunk(generation, []) | {"usage": generation.usage()}

    def _chunk(self, generation: Generation, choices: list[Json]) -> Json:
        chunk = self._head | {"object": self.chunk_object, "choices": choices}
        if self.job.stream_options.continuous_usage_stats:
            chunk["usage"] = generation.usage()
        elif self.job.stream_options.include_usage:
            chunk["usage"] = None
        return chunk

    def _extras(self, piece: Piece) -> Json:
        return {"token_ids": piece.token_ids} if self.job.request.return_token_ids else {}

    def _of_prompt(self, generation: Generation, index: int) -> Json:
        """What the client asked to hear of a choice's prompt; said once, at the beginning. `prompt_logprobs` are
        vLLM's: per token an object by token id; null for the first, which nothing predicts."""
        request = self.job.request
        told: Json = {}
        if request.prompt_logprobs is not None:
            entries = generation.choices[index].prompt_logprobs or []
            told["prompt_logprobs"] = [None, *(self._by_token_id(entry) for entry in entries)]
        if request.return_token_ids:
            told["prompt_token_ids"] = self.job.prompt_of(index).token_ids
        return told

    def _by_token_id(self, entry: TokenLogprobs) -> Json:
        top = entry.top[: self.job.request.prompt_logprobs]
        ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(top, 1)]
        return {
            str(token_id): {
                "logprob": finite(logprob),
                "rank": rank,
                "decoded_token": self._tokenizer.token_text(token_id),
            }
            for token_id, logprob, rank in [*ranked, (entry.token_id, entry.logprob, entry.rank)]
        }


class ChatReply(Reply):
    """chat.completion and chat.completion.chunk."""

    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, job: Job, model_name: str, tokenizer: Tokenizer, created: int) -> None:
        super().__init__(job, model_name, tokenizer, created)
        self._opened: set[int] = set()

    def skip(self, indices: set[int]) -> None:
        self._opened |= indices

    def whole(self, generation: Generation, pieces: list[Piece]) -> Json:
        choices = [
            {
                "index": piece.index,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": self._logprobs(piece),
                "finish_reason": piece.finish_reason,
                "stop_reason": piece.stop_reason,
                **self._extras(piece),
            }
            for piece in pieces
        ]
        reply = self._head | {"object": self.object, "choices": choices, "usage": generation.usage()}
        return reply | self._of_prompt(generation, 0)

    def chunks(self, generation: Generation, piece: Piece) -> list[Json]:
        chunks: list[Json] = []

        def say(delta: Json, **fields: Any) -> None:
            choice = {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": None} | fields
            chunks.append(self._chunk(generation, [choice]))

        if piece.index not in self._opened:
            say({"role": "assistant", "content": ""})
            if not self._opened:
                chunks[0] |= self._of_prompt(generation, piece.index)
            self._opened.add(piece.index)
        if piece.text or piece.logprobs or (piece.token_ids and self.job.request.return_token_ids):
            say({"content": piece.text}, logprobs=self._logprobs(piece), **self._extras(piece))
        if piece.finish_reason is not None:
            say({}, finish_reason=piece.finish_reason, stop_reason=piece.stop_reason)
        return chunks

    def _logprobs(self, piece: Piece) -> Json | None:
        if self.job.logprobs is None:
            return None
        return {
            "content": [
                self._token(entry.token_id, entry.logprob)
                | {"top_logprobs": [self._token(*each) for each in entry.top[: self.job.logprobs]]}
                for entry in piece.logprobs
            ],
            "refusal": None,
        }

    def _token(self, token_id: int, logprob: float) -> Json:
        return {
            "token": self._tokenizer.token_text(token_id),
            "logprob": finite(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


class CompletionReply(Reply):
    """text_completion, whole and in chunks."""

    id_prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, job: Job, model_name: str, tokenizer: Tokenizer, created: int) -> None:
        super().__init__(job, model_name, tokenizer, created)
        self._unopened = set(range(len(job.submits)))
        self._echoes: list[tuple[str, list[str]]] = [self._echo_of(index) for index in range(len(job.prompts))]

    def skip(self, indices: set[int]) -> None:
        self._unopened -= indices

    def whole(self, generation: Generation, pieces: list[Piece]) -> Json:
        choices = [self._choice(generation, piece) for piece in pieces]
        return self._head | {"object": self.object, "choices": choices, "usage": generation.usage()}

    def chunks(self, generation: Generation, piece: Piece) -> list[Json]:
        choice = self._choice(generation, piece)
        return [self._chunk(generation, [choice])] if any(choice[key] for key in choice.keys() - {"index"}) else []

    def _choice(self, generation: Generation, piece: Piece) -> Json:
        """One entry of `choices`; the first of each choice is about the prompt, too."""
        if self.job.discard_output:
            piece = Piece(piece.index, finish_reason=piece.finish_reason and "length")
        text, logprobs = piece.text, self._logprobs(piece)
        first = piece.index in self._unopened
        self._unopened.discard(piece.index)
        if first and self.job.echo:
            text = self._echoes[piece.index // self.job.n][0] + text
            if logprobs is not None:
                logprobs = _joined(self._prompt_part(generation, piece.index), logprobs)
        choice: Json = {
            "index": piece.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
            **self._extras(piece),
        }
        return choice | self._of_prompt(generation, piece.index) if first else choice

    def _echo_of(self, index: int) -> tuple[str, list[str]]:
        """The prompt's text, and the part of it that each of its tokens completes."""
        if not self.job.echo:
            return "", []
        prompt = self.job.prompts[index]
        skip = prompt.text is None and self.job.skip_special_tokens  # a text is echoed as it came
        parts = self._tokenizer.decode_parts(prompt.token_ids, skip_special_tokens=skip)
        return ("".join(parts) if prompt.text is None else prompt.text), parts

    def _logprobs(self, piece: Piece) -> Json | None:
        if self.job.logprobs is None:
            return None
        echoed = len(self._echoes[piece.index // self.job.n][0])
        return {
            "tokens": [self._tokenizer.token_text(token_id) for token_id in piece.token_ids],
            "token_logprobs": [finite(entry.logprob) for entry in piece.logprobs],
            "top_logprobs": [self._by_text(entry) for entry in piece.logprobs],
            "text_offset": [echoed + offset for offset in piece.offsets],
        }

    def _prompt_part(self, generation: Generation, index: int) -> Json:
        token_ids = self.job.prompt_of(index).token_ids
        parts = self._echoes[index // self.job.n][1]
        entries = (generation.choices[index].prompt_logprobs or [])[: len(token_ids) - 1]
        offsets = [0]
        for part in parts[:-1]:
            offsets.append(offsets[-1] + len(part))
        return {
            "tokens": [self._tokenizer.token_text(token_id) for token_id in token_ids],
            "token_logprobs": [None, *(finite(entry.logprob) for entry in entries)],
            "top_logprobs": [None, *(self._by_text(entry) for entry in entries)],
            "text_offset": offsets,
        }

    def _by_text(self, entry: TokenLogprobs) -> dict[str, float]:
        """The alternatives, and the token itself when it is not among them."""
        shown = [*entry.top[: self.job.logprobs], (entry.token_id, entry.logprob)]
        return {self._tokenizer.token_text(token_id): finite(logprob) for token_id, logprob in reversed(shown)}


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


def _joined(first: Json, second: Json) -> Json:
    return {key: first[key] + second[key] for key in first}
