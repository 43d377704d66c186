"""One API call while it runs: outputs of the engine become pieces of text, choice by choice."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import msgspec

from holdfast.core.errors import InvalidRequest, StepFailed, Unavailable
from holdfast.core.request import TokenLogprobs
from holdfast.core.wire import TokenOutput
from holdfast.gateway.detokenizer import Detokenizer, StopStrings
from holdfast.gateway.openai import Job
from holdfast.gateway.router import Router
from holdfast.gateway.tokenizer import Tokenizer
from holdfast.gateway.tokenlog import LogEntry, Reader


@dataclass(slots=True)
class Piece:
    """What came for one choice: tokens, and the text that may go out because of them."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Characters of output before each token."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    """The stop string, or the stop token that the client named, that ended the choice."""

    def __bool__(self) -> bool:
        return bool(self.text or self.token_ids or self.finish_reason)

    def extend(self, later: Piece) -> None:
        """Append what came later for the same choice."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.offsets += later.offsets
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


class Choice:
    """The text of one engine request."""

    def __init__(self, index: int, job: Job, tokenizer: Tokenizer) -> None:
        self.index = index
        self.request_id = job.submits[index].request_id
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.finished = False
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        params = job.submits[index].params
        self._min_tokens = params.min_tokens
        self._stop_token_ids = params.stop_token_ids
        self._include_stop = bool(job.request.include_stop_str_in_output)
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=job.skip_special_tokens)
        self._stops = StopStrings(job.stop, include=self._include_stop)
        self._num_chars = 0

    def feed(self, output: TokenOutput, piece: Piece) -> None:
        """Add an output to `piece`. A stop string ends the choice in the middle of an output, too."""
        if output.start == 0:
            self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        for position, token_id in enumerate(output.token_ids):
            is_last = position == len(output.token_ids) - 1
            silent = is_last and output.stop_token_id is not None and not self._include_stop
            self._add(token_id, piece, silent=silent)
            if output.logprobs is not None:
                piece.logprobs.append(output.logprobs[position])
            if self._stops.found is not None:
                self._finish(piece, "stop", self._stops.found)
                return
        if output.finish is not None:
            rest = self._stops.push(self._detokenizer.flush())
            piece.text += rest + self._stops.flush()
            asked = output.stop_token_id if output.stop_token_id in self._stop_token_ids else None
            self._finish(piece, output.finish, self._stops.found or asked)

    def _add(self, token_id: int, piece: Piece, *, silent: bool) -> None:
        self.num_tokens += 1
        piece.token_ids.append(token_id)
        piece.offsets.append(self._num_chars)
        text = "" if silent else self._detokenizer.push(token_id)
        self._num_chars += len(text)
        piece.text += self._stops.push(text, may_stop=self.num_tokens > self._min_tokens)

    def _finish(self, piece: Piece, finish_reason: str, stop_reason: int | str | None) -> None:
        self.finished = True
        self.finish_reason = "stop" if isinstance(stop_reason, str) else finish_reason
        self.stop_reason = stop_reason
        piece.finish_reason, piece.stop_reason = self.finish_reason, stop_reason


class Generation:
    """A job as one reader sees it: what its entries in the token log hold and get, from given positions on. The text
    before them is made again, and not told again. `close()` must follow."""

    def __init__(
        self,
        job: Job,
        entries: Sequence[LogEntry],
        router: Router,
        tokenizer: Tokenizer,
        after: Sequence[int] | None = None,
    ) -> None:
        """Raises `InvalidRequest` for positions `after` that the log has not come to."""
        self.job = job
        self.choices = [Choice(index, job, tokenizer) for index in range(len(job.submits))]
        self._by_id = {choice.request_id: choice for choice in self.choices}
        self._router = router
        self._after = list(after) if after is not None else [0] * len(entries)
        ends = [entry.end + entry.is_cut for entry in entries]
        if len(self._after) != len(ends) or any(at > end for at, end in zip(self._after, ends, strict=True)):
            raise InvalidRequest(
                f"after {positions(self._after)}: the request's choices are at {positions(ends)}", param="after"
            )
        self._reader = Reader(entries)
        self.is_over = False
        """Every choice has finished, or one could not."""

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What arrived since the last time, at most one piece per choice, until every choice has finished.

        Raises `Unavailable` or `StepFailed` when the engine could not finish.
        """
        num_open = len(self.choices)
        while num_open:
            pieces: dict[int, Piece] = {}
            for output in await self._reader.get():
                choice = self._by_id[output.request_id]
                if choice.finished:
                    continue
                if output.finish == "error":
                    self.is_over = True
                    reason, is_up = str(output.error), self._router.status == "ready"
                    raise StepFailed(reason) if is_up else Unavailable(reason, retry_after=1)
                pieces[choice.index] = self._feed(choice, output)
                if choice.finished:
                    num_open -= 1
                    self.is_over = not num_open
                    if output.finish is None:
                        self._router.abort([choice.request_id], reason="stop")
            yield [piece for piece in pieces.values() if piece]

    def _feed(self, choice: Choice, output: TokenOutput) -> Piece:
        """What of an output goes out: nothing that lies before the position asked for."""
        told, piece = self._after[choice.index], Piece(choice.index)
        known = min(told - choice.num_tokens, len(output.token_ids))
        if known > 0:
            ends = known == len(output.token_ids)
            first, rest = split(output, known)
            choice.feed(output if ends else first, Piece(choice.index))
            if choice.finished:
                if told <= choice.num_tokens:
                    piece.finish_reason, piece.stop_reason = choice.finish_reason, choice.stop_reason
                return piece
            if ends:
                return piece
            output = rest
        choice.feed(output, piece)
        return piece

    def close(self) -> None:
        self._reader.close()

    def usage(self) -> dict[str, object]:
        """OpenAI's usage object. A prompt counts once, however many choices it has."""
        first_choices = self.choices[:: self.job.n]
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.job.prompts)
        completion_tokens = 0 if self.job.discard_output else sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(choice.num_cached_tokens for choice in first_choices)},
        }


def split(output: TokenOutput, count: int) -> tuple[TokenOutput, TokenOutput]:
    """Its first tokens, and the rest with its end."""
    first = msgspec.structs.replace(
        output,
        token_ids=output.token_ids[:count],
        logprobs=None if output.logprobs is None else output.logprobs[:count],
        finish=None,
        stop_token_id=None,
    )
    rest = msgspec.structs.replace(
        output,
        start=output.start + count,
        token_ids=output.token_ids[count:],
        logprobs=None if output.logprobs is None else output.logprobs[count:],
    )
    return first, rest


def positions(of_choices: Sequence[int]) -> str:
    """Positions of a call's choices as clients see them: numbers with commas between."""
    return ",".join(map(str, of_choices))
