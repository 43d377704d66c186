"""The API calls that the token log holds: who reads them, and how long they are kept when nobody does.

A call is accepted, read and forgotten within one HTTP exchange. Two kinds stay longer: those whose client asked for
it (`stream_options.resumable`), so that it may come back after its connection broke, and those that an earlier
gateway accepted: they run to their end, and whoever comes back for them gets the rest.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from holdfast.core.errors import HoldfastError, NotFound
from holdfast.gateway.generation import Generation
from holdfast.gateway.openai import Job, Prompt, ServedModel, chat_job, completion_job
from holdfast.gateway.protocol import ChatCompletionRequest, CompletionRequest, parse_body
from holdfast.gateway.replies import ChatReply, CompletionReply, Reply
from holdfast.gateway.router import Router
from holdfast.gateway.tokenizer import Tokenizer
from holdfast.gateway.tokenlog import Accepted, Endpoint, LogEntry, TokenLog

logger = logging.getLogger(__name__)

SHAPES: dict[Endpoint, type[Reply]] = {"completions": CompletionReply, "chat/completions": ChatReply}


@dataclass(slots=True)
class Call:
    accepted: Accepted
    job: Job
    entries: list[LogEntry]
    stays: bool
    """When its reader has left."""
    must_finish: bool = False
    """Whether or not somebody comes back."""
    num_readers: int = 0
    is_over: bool = False
    idle_since: float = field(default_factory=time.monotonic)
    """When the last reader left, or it was over with nobody reading."""
    finisher: asyncio.Task[None] | None = None
    """Reads it to its end for nobody."""


class Calls:
    """By what their replies are called; of calls with the same name the latest."""

    def __init__(self, log: TokenLog, router: Router, window: float) -> None:
        """`window`: seconds that a call stays when nobody reads it."""
        self._log = log
        self._router = router
        self._window = window
        self._by_name: dict[str, Call] = {}
        self._staying: dict[str, Call] = {}
        """By key."""

    @property
    def log_failure(self) -> str | None:
        """Why the log's file does not hold everything, if it does not."""
        return self._log.failure

    def accept(self, job: Job, endpoint: Endpoint, body: bytes, created: int, arrived: float) -> Call:
        """Raises `RequestError` when the router refuses."""
        accepted = Accepted(job.request_id, endpoint, body, created, job.submits)
        call = Call(accepted, job, self._router.submit(accepted, arrived), stays=bool(job.stream_options.resumable))
        self._by_name[job.request_id] = call
        return call

    def find(self, name: str) -> Call:
        """Raises `NotFound`."""
        if (call := self._by_name.get(name)) is None:
            raise NotFound(
                f"no request {name!r} is held: requests are kept while they run and, with `stream_options.resumable` "
                f"or when the service was started again meanwhile, for {self._window:g} s after that",
                code="request_not_found",
            )
        return call

    def read(self, call: Call, tokenizer: Tokenizer, after: Sequence[int] | None = None) -> Generation:
        """One more reader, from the positions `after` on. `leave` must follow. Raises `InvalidRequest` for positions
        that there are not."""
        generation = Generation(call.job, call.entries, self._router, tokenizer, after)
        call.num_readers += 1
        return generation

    def reply(self, call: Call, model: ServedModel) -> Reply:
        """What shapes its replies."""
        return SHAPES[call.accepted.endpoint](call.job, model.name, model.tokenizer, call.accepted.created)

    def leave(self, call: Call, generation: Generation, tokenizer: Tokenizer) -> None:
        """A reader has all, or has gone. A call that nobody reads is cancelled, unless it stays: then it runs on."""
        generation.close()
        call.num_readers -= 1
        call.is_over = call.is_over or generation.is_over
        call.idle_since = time.monotonic()
        if call.num_readers:
            return
        if not call.stays:
            self._forget(call)
            return
        self._staying[call.accepted.key] = call
        if not call.is_over and call.finisher is None:
            self._finish_unread(call, tokenizer)

    async def resume(self, model: ServedModel) -> None:
        """Take up what the log holds of an earlier gateway's calls."""
        for accepted in list(self._log.calls.values()):
            try:
                job = await job_of(accepted, model)
            except HoldfastError:
                logger.exception("request %s cannot be taken up", accepted.name)
                self._log.forget(accepted.key)
                continue
            call = Call(accepted, job, self._router.resume(accepted), stays=True, must_finish=True)
            self._by_name[accepted.name] = self._staying[accepted.key] = call
            self._finish_unread(call, model.tokenizer)
        self._router.all_resumed()
        if self._staying:
            logger.warning("%d requests of an earlier gateway are taken up", len(self._staying))

    async def sweep(self) -> None:
        """Forget calls that nobody has come back for, for ever; those of an earlier gateway when they are over."""
        while True:
            await asyncio.sleep(max(0.05, min(1.0, self._window / 4)))
            now = time.monotonic()
            for call in list(self._staying.values()):
                unread = not call.num_readers and (call.is_over or not call.must_finish)
                if unread and now - call.idle_since >= self._window:
                    self._forget(call)

    def close(self) -> None:
        for call in self._staying.values():
            if call.finisher is not None:
                call.finisher.cancel()

    def _finish_unread(self, call: Call, tokenizer: Tokenizer) -> None:
        """Somebody has to find stop strings and the end."""

        async def finish() -> None:
            generation = Generation(call.job, call.entries, self._router, tokenizer)
            try:
                async for _ in generation.pieces():
                    pass
            except HoldfastError as error:
                logger.warning("request %s: %s", call.job.request_id, error)
            finally:
                generation.close()
                call.is_over, call.idle_since = True, time.monotonic()

        call.finisher = asyncio.create_task(finish())

    def _forget(self, call: Call) -> None:
        self._staying.pop(call.accepted.key, None)
        if call.finisher is not None:
            call.finisher.cancel()  # nothing more comes for it
        if self._by_name.get(call.accepted.name) is call:
            del self._by_name[call.accepted.name]
        self._router.forget(call.accepted)


async def job_of(accepted: Accepted, model: ServedModel) -> Job:
    """What was accepted, once more, with the very tokens and seeds it had. Raises `RequestError`."""
    if accepted.endpoint == "completions":
        job = await completion_job(parse_body(CompletionRequest, accepted.body), model, accepted.name)
    else:
        job = await chat_job(parse_body(ChatCompletionRequest, accepted.body), model, accepted.name)
    prompts = [
        Prompt(submit.prompt_token_ids, prompt.text)
        for submit, prompt in zip(accepted.submits[:: job.n], job.prompts, strict=True)
    ]
    return replace(job, submits=accepted.submits, prompts=prompts)
