"""What a worker knows of its requests, and the tensors of one step made from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from holdfast.core.wire import NewRequest, Step
from holdfast.kernels.interface import BatchLayout
from holdfast.worker.transfer import upload


@dataclass(frozen=True, slots=True)
class Work:
    """One request's part of a step: tokens [start, stop) are computed; sampled if they reach its last token."""

    request: NewRequest
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        return self.stop == len(self.request.token_ids)

    @property
    def reaches_unknown(self) -> bool:
        """Whether its last token is one that only the device knows."""
        return self.request.token_ids[self.stop - 1] == UNKNOWN

    @property
    def wants_prompt_logprobs(self) -> bool:
        request = self.request
        return request.params.prompt_logprobs is not None and len(request.token_ids) == request.num_prompt_tokens


class Requests:
    """The requests this worker holds, kept up to date by step diffs. A `NewRequest` is the worker's own once it is
    decoded: its lists of tokens and blocks grow in place."""

    def __init__(self) -> None:
        self._held: dict[str, NewRequest] = {}

    def __iter__(self) -> Iterator[NewRequest]:
        return iter(self._held.values())

    def apply(self, step: Step) -> list[Work]:
        """Take in a step; returns what it computes, in the step's order."""
        for request_id in step.dropped:
            self._held.pop(request_id, None)
        starts: list[tuple[NewRequest | None, int]] = []
        for new in step.new:
            self._held[new.request_id] = new
            starts.append((new, new.num_computed))
        for continued in step.continued:
            request = self._held.get(continued.request_id)
            if request is not None:
                first, tokens = continued.first_new, continued.new_token_ids
                request.token_ids[first : first + len(tokens)] = tokens
                request.block_ids.extend(continued.new_block_ids)
            starts.append((request, continued.num_computed))
        return [
            Work(request, start, start + count)
            for (request, start), count in zip(starts, step.num_tokens, strict=True)
            if request is not None
        ]

    def forget(self, step: Step) -> None:
        """Drop every request a failed step named."""
        for request_id in [r.request_id for r in step.new] + [r.request_id for r in step.continued]:
            self._held.pop(request_id, None)


UNKNOWN = -1
"""Stands for a token that has been sampled, while only the device knows it."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens int64 [R] on the device, and the row of each request's."""

    token_ids: Tensor
    rows: dict[str, int]


def layout(
    work: list[Work], block_size: int, device: torch.device, drawn: Drawn | None = None
) -> tuple[Tensor, BatchLayout]:
    """Token ids int64 [T] and the layout of a step; unknown tokens are taken from `drawn`."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    widest = max(-(-part.stop // block_size) for part in work)
    tables = np.zeros((len(work), widest), dtype=np.int32)
    for row, part in enumerate(work):
        blocks, stretch = part.request.block_ids, range(part.start, part.stop)
        num_blocks = -(-part.stop // block_size)
        tables[row, :num_blocks] = blocks[:num_blocks]
        token_ids += part.request.token_ids[part.start : part.stop]
        positions += stretch
        slots += [blocks[position // block_size] * block_size + position % block_size for position in stretch]
    rows = upload(np.array((token_ids, positions, slots), dtype=np.int64), device)
    if UNKNOWN in token_ids:
        assert drawn is not None, "a token that nobody knows"
        # the last token of a request, and so of its part of the step
        ends = [end for end in accumulate(part.stop - part.start for part in work) if token_ids[end - 1] == UNKNOWN]
        sources = [drawn.rows[part.request.request_id] for part in work if part.reaches_unknown]
        at = upload(np.array((ends, sources), dtype=np.int64), device)
        rows[0, at[0] - 1] = drawn.token_ids[at[1]]
    batch = BatchLayout(
        query_lens=tuple(part.stop - part.start for part in work),
        context_lens=tuple(part.stop for part in work),
        positions=rows[1],
        slots=rows[2],
        block_tables=upload(tables, device),
    )
    return rows[0], batch
