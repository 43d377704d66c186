"""The token log: for every live request its prompt, its parameters and every token it was given.

It is the truth; anything else can be lost and recomputed from it. A token enters it before it goes to the
client. It lives in memory for now, so it outlives the engine and the workers, not the gateway.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from holdfast.core.errors import TokenLogGap
from holdfast.core.request import SamplingParams
from holdfast.core.wire import FinishReason, TokenOutput


@dataclass(slots=True)
class LogEntry:
    """One engine request. `finish` is set with its last token, and nothing follows it."""

    prompt_token_ids: list[int]
    params: SamplingParams
    token_ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None


class TokenLog:
    """Entries by request id, from acceptance until the terminal reply was delivered or the client left."""

    def __init__(self) -> None:
        self._entries: dict[str, LogEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, request_id: str) -> LogEntry:
        return self._entries[request_id]

    def open(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        assert request_id not in self._entries, f"request id {request_id} is in use"
        self._entries[request_id] = LogEntry(prompt_token_ids, params)

    def append(self, output: TokenOutput) -> TokenOutput | None:
        """Record an output; return what is new in it, None when nothing is (a repeat, or an unknown request).

        Raises `TokenLogGap` when tokens between the log's end and the output's start are missing.
        """
        entry = self._entries.get(output.request_id)
        if entry is None or entry.finish is not None:
            return None
        known = len(entry.token_ids) - output.start
        if known < 0:
            raise TokenLogGap(
                f"request {output.request_id}: output starts at token {output.start}, "
                f"the log ends at {len(entry.token_ids)}"
            )
        if known >= len(output.token_ids) and output.finish is None:
            return None
        if known > 0:
            output = msgspec.structs.replace(
                output,
                start=len(entry.token_ids),
                token_ids=output.token_ids[known:],
                logprobs=None if output.logprobs is None else output.logprobs[known:],
            )
        entry.token_ids += output.token_ids
        entry.finish = output.finish
        return output

    def close(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        self._entries.pop(request_id, None)
