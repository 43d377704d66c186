"""The token log: every accepted API call, what was asked of the engines for it, and every token they gave.

It is the truth; anything else can be lost and recomputed from it. A token enters it before it goes to the client.
What a client has been told is a position in it: `Reader`s follow entries from any position, as often as one likes.

It is written to a file (`gateway/logfile.py`) as it grows, so that the next gateway finds it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from holdfast.core.errors import ConfigError, TokenLogGap
from holdfast.core.points import Points
from holdfast.core.request import TokenLogprobs
from holdfast.core.wire import FinishReason, Submit, TokenOutput
from holdfast.gateway.logfile import LogFile

log = logging.getLogger(__name__)

Endpoint = Literal["completions", "chat/completions"]


class _Record(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What a file holds, in order."""


class Begun(_Record, frozen=True):
    """The first: whose log it is."""

    model: str
    version: int = 1


class Accepted(_Record, frozen=True):
    """A call as it was accepted. Its engine requests have ids that never return; the first is the call's key."""

    name: str
    """What its reply is called; clients may choose it, and choose it again."""
    endpoint: Endpoint
    body: bytes
    """JSON, as the client sent it."""
    created: int
    """Unix time."""
    submits: list[Submit]

    @property
    def key(self) -> str:
        return self.submits[0].request_id


class Came(_Record, frozen=True):
    """New tokens and ends, of any requests."""

    outputs: list[TokenOutput]


class Cut(_Record, frozen=True):
    """These engine requests end where they are: a stop string was found, or nobody reads them."""

    request_ids: list[str]


class Forgotten(_Record, frozen=True):
    """The call with this key is over."""

    key: str


_decode = msgspec.msgpack.Decoder(Begun | Accepted | Came | Cut | Forgotten).decode
_encode = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class LogEntry:
    """One engine request: what was asked and all that came for it. Once it has ended nothing is added.

    A *position* counts its tokens, and one more for its `finish`.
    """

    submit: Submit
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    finish: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    is_cut: bool = False
    readers: list[Reader] = field(default_factory=list)

    @property
    def has_ended(self) -> bool:
        return self.is_cut or self.finish is not None

    @property
    def end(self) -> int:
        """The position after everything."""
        return len(self.token_ids) + (self.finish is not None)

    def add(self, output: TokenOutput) -> None:
        """`output` begins where the entry ends."""
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + output.logprobs
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.start == 0:
            self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self.finish, self.stop_token_id, self.error = output.finish, output.stop_token_id, output.error
        for reader in self.readers:
            reader.wake(self)

    def between(self, start: int, stop: int) -> TokenOutput:
        """What lies between two positions, as one output."""
        finished, num_tokens = stop > len(self.token_ids), len(self.token_ids)
        return TokenOutput(
            self.submit.request_id,
            start,
            self.token_ids[start:stop],
            logprobs=None if self.logprobs is None else self.logprobs[start:stop],
            prompt_logprobs=self.prompt_logprobs if start == 0 else None,
            finish=self.finish if finished else None,
            stop_token_id=self.stop_token_id if stop >= num_tokens else None,
            num_cached_tokens=self.num_cached_tokens,
            error=self.error if finished else None,
        )


class Reader:
    """Follows entries from the positions it is given. One task may wait for it at a time."""

    def __init__(self, entries: Sequence[LogEntry], positions: Sequence[int] | None = None) -> None:
        self.entries = entries
        self._at = {e.submit.request_id: at for e, at in zip(entries, positions or [0] * len(entries), strict=True)}
        self._changed: dict[str, LogEntry] = {}
        self._news = asyncio.Event()
        for entry in entries:
            entry.readers.append(self)
            if entry.end > self._at[entry.submit.request_id]:
                self.wake(entry)

    def wake(self, entry: LogEntry) -> None:
        """Something was added to it."""
        self._changed[entry.submit.request_id] = entry
        self._news.set()

    async def get(self) -> list[TokenOutput]:
        """What was added since the last call, at most one output per entry; waits until there is something."""
        await self._news.wait()
        self._news.clear()
        changed, self._changed = self._changed, {}
        outputs = []
        for request_id, entry in changed.items():
            start, self._at[request_id] = self._at[request_id], entry.end
            outputs.append(entry.between(start, entry.end))
        return outputs

    def close(self) -> None:
        for entry in self.entries:
            entry.readers.remove(self)


class TokenLog:
    """Entries by request id and calls by key, from acceptance until they are forgotten. `file`: where they are
    written as well; what it holds of an earlier gateway's is taken up. `model`: whose tokens these are.

    A file that cannot be written (no room) does not stop the service: what it lacks is written once it can be.
    """

    RETRY_SECONDS = 5.0
    LEAST_BYTES = 64_000_000
    """A file that has grown to so much, and to four times what mattered when it was begun, is begun anew."""

    def __init__(self, file: LogFile | None = None, model: str = "") -> None:
        """Raises `ConfigError` when the file holds unfinished calls of another model."""
        self.calls: dict[str, Accepted] = {}
        self._entries: dict[str, LogEntry] = {}
        self._file, self._model = file, model
        self._points = Points("gateway")
        self.failure: str | None = None
        """Why the file does not hold everything."""
        self._retry_at = 0.0
        self._most_bytes = self.LEAST_BYTES
        if file is not None:
            try:
                self._load(file)
            except (msgspec.DecodeError, LookupError) as error:
                file.close()
                raise ConfigError(f"{file.path}: not a token log that this version can read: {error}") from error
            self._begin_anew(file)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, request_id: str) -> LogEntry:
        return self._entries[request_id]

    def entries_of(self, call: Accepted) -> list[LogEntry]:
        return [self._entries[submit.request_id] for submit in call.submits]

    def open(self, call: Accepted) -> None:
        assert not any(submit.request_id in self._entries for submit in call.submits), "a request id is in use"
        self._open(call)
        self._write(call)

    def append(self, outputs: Iterable[TokenOutput]) -> list[TokenOutput]:
        """Record outputs; return what is new in them: nothing of a repeat, an unknown or an ended request.

        Where tokens between the entry's end and the output's start are missing, the request ends with an error.
        """
        new = [each for output in outputs if (each := self._new_in(output)) is not None]
        if new:
            self._write(Came(new))  # first: then the client may have it
            self._points.reach("logged")
            for output in new:
                self._entries[output.request_id].add(output)
        return new

    def cut(self, request_ids: Iterable[str]) -> None:
        """These end where they are. Nobody is told."""
        cut = [name for name in request_ids if name in self._entries and not self._entries[name].has_ended]
        for name in cut:
            self._entries[name].is_cut = True
        if cut:
            self._write(Cut(cut))

    def forget(self, key: str) -> None:
        """A call is over; an unknown one is ignored."""
        if (call := self.calls.pop(key, None)) is not None:
            for submit in call.submits:
                del self._entries[submit.request_id]
            self._write(Forgotten(key))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self, call: Accepted) -> None:
        self.calls[call.key] = call
        for submit in call.submits:
            self._entries[submit.request_id] = LogEntry(submit)

    def _new_in(self, output: TokenOutput) -> TokenOutput | None:
        entry = self._entries.get(output.request_id)
        if entry is None or entry.has_ended:
            return None
        known = len(entry.token_ids) - output.start
        if known < 0:
            gap = TokenLogGap(
                f"request {output.request_id}: output starts at token {output.start}, "
                f"the log ends at {len(entry.token_ids)}"
            )
            return TokenOutput(output.request_id, len(entry.token_ids), [], finish="error", error=str(gap))
        if known >= len(output.token_ids) and output.finish is None:
            return None
        if known > 0:
            output = msgspec.structs.replace(
                output,
                start=len(entry.token_ids),
                token_ids=output.token_ids[known:],
                logprobs=None if output.logprobs is None else output.logprobs[known:],
            )
        return output

    # --- the file ---

    def _load(self, file: LogFile) -> None:
        for data in file.read():
            match _decode(data):
                case Begun(model):
                    whose = model
                case Accepted() as call:
                    self._open(call)
                case Came(outputs):
                    for output in outputs:
                        self._entries[output.request_id].add(output)
                case Cut(request_ids):
                    for request_id in request_ids:
                        self._entries[request_id].is_cut = True
                case Forgotten(key):
                    for submit in self.calls.pop(key).submits:
                        del self._entries[submit.request_id]
        if self.calls and whose != self._model:
            file.close()
            raise ConfigError(
                f"{file.path}: {len(self.calls)} unfinished requests of another model or other settings ({whose}); "
                "serve that one to finish them, or remove the file"
            )

    def _state(self) -> Iterator[bytes]:
        """Records that say all there is."""
        yield _encode(Begun(self._model))
        for call in self.calls.values():
            yield _encode(call)
            entries = self.entries_of(call)
            yield _encode(Came([entry.between(0, entry.end) for entry in entries if entry.end]))
            yield _encode(Cut([entry.submit.request_id for entry in entries if entry.is_cut]))

    def _begin_anew(self, file: LogFile) -> None:
        try:
            file.replace(self._state())
        except OSError as error:
            self._fail(error)
            return
        if self.failure is not None:
            log.warning("the token log is written again: %s", file.path)
        self.failure = None
        self._most_bytes = max(self.LEAST_BYTES, 4 * file.size)

    def _write(self, record: _Record) -> None:
        """Before its content counts, but for calls and ends that a new file holds anyway."""
        file = self._file
        if file is None:
            return
        if self.failure is not None:
            if time.monotonic() >= self._retry_at:
                self._begin_anew(file)
                if self.failure is None and isinstance(record, Came):
                    self._write(record)
            return
        try:
            file.append(_encode(record))
        except OSError as error:
            self._fail(error)
            return
        if file.size > self._most_bytes:
            self._begin_anew(file)
            if isinstance(record, Came):
                self._write(record)

    def _fail(self, error: OSError) -> None:
        self._retry_at = time.monotonic() + self.RETRY_SECONDS
        if self.failure is None:
            log.error("the token log cannot be written, requests would not survive the gateway now: %s", error)
        self.failure = str(error)
