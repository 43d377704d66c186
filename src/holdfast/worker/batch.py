"""What a worker knows of its requests, and the tensors of one step made from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from holdfast.core.wire import NewRequest, Step
from holdfast.kernels.interface import BatchLayout


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
    def wants_prompt_logprobs(self) -> bool:
        request = self.request
        return request.params.prompt_logprobs is not None and len(request.token_ids) == request.num_prompt_tokens


class Requests:
    """The requests this worker holds, kept up to date by step diffs. A `NewRequest` is the worker's own once it is
    decoded: its lists of tokens and blocks grow in place."""

    def __init__(self) -> None:
        self._held: dict[str, NewRequest] = {}

    def apply(self, step: Step) -> list[Work]:
        """Take in a step; returns what it computes, in the step's order."""
        for request_id in step.dropped:
            self._held.pop(request_id, None)
        starts = []
        for new in step.new:
            self._held[new.request_id] = new
            starts.append((new, new.num_computed))
        for continued in step.continued:
            request = self._held[continued.request_id]
            request.token_ids.extend(continued.new_token_ids)
            request.block_ids.extend(continued.new_block_ids)
            starts.append((request, continued.num_computed))
        return [
            Work(request, start, start + count)
            for (request, start), count in zip(starts, step.num_tokens, strict=True)
        ]

    def forget(self, step: Step) -> None:
        """Drop every request a failed step named."""
        for request_id in [r.request_id for r in step.new] + [r.request_id for r in step.continued]:
            self._held.pop(request_id, None)


def layout(work: list[Work], block_size: int, device: torch.device) -> tuple[Tensor, BatchLayout]:
    """Token ids int64 [T] and the layout of a step."""
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
    rows = torch.from_numpy(np.array((token_ids, positions, slots), dtype=np.int64)).to(device)
    batch = BatchLayout(
        query_lens=tuple(part.stop - part.start for part in work),
        context_lens=tuple(part.stop for part in work),
        positions=rows[1],
        slots=rows[2],
        block_tables=torch.from_numpy(tables).to(device),
    )
    return rows[0], batch
