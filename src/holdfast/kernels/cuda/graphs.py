"""What attention needs to know of a step, and steps of decodes as CUDA graphs.

A step in which every request computes one token has the same launches as any other with as many requests, so they are
captured once and replayed: for a few numbers of requests (a smaller batch is filled up with rows that read and write
no page), and for a few numbers of splits of the longest context.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.kernels.cuda.attention import SPLIT
from holdfast.kernels.interface import BatchLayout, Forward

log = logging.getLogger(__name__)

FEW_REQUESTS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of requests that have a graph; beyond them every `MORE_REQUESTS`."""
MORE_REQUESTS = 32
SPLITS = (1, 4, 16)
"""Numbers of splits that have a graph, beside the most there can be: of a graph for many more than a batch has, most
programs find nothing to do."""
CAPTURE_SECONDS = 60
"""How long a start may take longer for them."""


@dataclass(frozen=True, slots=True)
class StepTensors:
    """On the device."""

    starts: Tensor
    """int32 [B + 1]: where a request's tokens begin."""
    lens: Tensor
    """int32 [B]: context lengths."""
    num_splits: int
    """Of the longest decode; 0 without any."""
    prefills: bool
    """Whether a request computes more than one token."""


def step_tensors(layout: BatchLayout) -> StepTensors:
    decodes = [context for length, context in zip(layout.query_lens, layout.context_lens, strict=True) if length == 1]
    return StepTensors(
        _upload([0, *accumulate(layout.query_lens)], layout),
        _upload(layout.context_lens, layout),
        -(-max(decodes) // SPLIT) if decodes else 0,
        len(decodes) < len(layout.query_lens),
    )


def prefill_tiles(tokens: int, layout: BatchLayout) -> Tensor:
    """int32 [tiles, 2]: (request, first token of it) of every `tokens` tokens of a prefill."""
    tiles = [
        (request, first)
        for request, length in enumerate(layout.query_lens)
        if length > 1
        for first in range(0, length, tokens)
    ]
    return _upload(tiles, layout)


def _upload(numbers: object, layout: BatchLayout) -> Tensor:
    """int32, without waiting for the device."""
    tensor = torch.from_numpy(np.array(numbers, dtype=np.int32))
    device = layout.positions.device
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class DecodeInputs:
    """The inputs of a graph: `size` requests of one token, tables `width` blocks wide."""

    def __init__(self, size: int, width: int, num_splits: int, device: torch.device) -> None:
        self.token_ids, positions, slots = torch.zeros(3, size, dtype=torch.int64, device=device)
        tables = torch.zeros(size, width, dtype=torch.int32, device=device)
        self.layout = BatchLayout((1,) * size, (1,) * size, positions, slots, tables)
        lens = torch.zeros(size, dtype=torch.int32, device=device)
        starts = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.step = StepTensors(starts, lens, num_splits, prefills=False)
        self.layout.derived["cuda"] = self.step
        self.fill(self.token_ids[:0], self.layout, lens[:0])

    def fill(self, token_ids: Tensor, layout: BatchLayout, lens: Tensor) -> None:
        """Take in a step's; rows beyond them have no slot, no context, and token 0."""
        count, mine = len(token_ids), self.layout
        self.token_ids[:count], self.token_ids[count:] = token_ids, 0
        mine.positions[:count], mine.positions[count:] = layout.positions[:count], 0
        mine.slots[:count], mine.slots[count:] = layout.slots[:count], -1
        mine.block_tables[:count, : layout.block_tables.shape[1]] = layout.block_tables[:count]
        self.step.lens[:count], self.step.lens[count:] = lens, 0


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: DecodeInputs
    graph: torch.cuda.CUDAGraph
    result: Tensor


class GraphProgram:
    """`Forward`, by way of a graph where there is one. A result is valid until the next call. `keep`: what graphs
    read, beside inputs, weights and pages; held as long as they may run."""

    def __init__(self, forward: Forward, device: torch.device, keep: object = None) -> None:
        self._forward, self._device, self._keep = forward, device, keep
        self._graphs: dict[tuple[int, int], _Graph] = {}
        """By the number of requests, and of splits."""

    def capture(
        self,
        max_requests: int,
        max_context: int,
        block_size: int,
        progress: Callable[[float], None],
        agree: Callable[[bool], bool] | None = None,
    ) -> int:
        """Capture what steps of up to `max_requests` decodes need, the largest first, for at most `CAPTURE_SECONDS`;
        returns the number of graphs. What has none runs launch by launch: slower, the same bits. Ranks that `agree`
        have the same graphs: a step that one of them replays and another does not would never end."""
        sizes = sorted(
            {*(n for n in FEW_REQUESTS if n < max_requests), *range(96, max_requests, MORE_REQUESTS), max_requests}
        )
        most = -(-max_context // SPLIT)
        wanted = [(size, splits) for splits in sorted({*(n for n in SPLITS if n < most), most}) for size in sizes]
        pool, width, begin = torch.cuda.graph_pool_handle(), -(-max_context // block_size), time.monotonic()
        side = torch.cuda.Stream()
        for done, (size, splits) in enumerate(reversed(wanted)):
            in_time = time.monotonic() - begin <= CAPTURE_SECONDS
            if not (in_time if agree is None else agree(in_time)):
                log.warning(
                    "%d of %d CUDA graphs in %d s: some steps run launch by launch",
                    done,
                    len(wanted),
                    CAPTURE_SECONDS,
                )
                break
            graph = self._captured((size, width, splits), pool, side, together=agree is not None)
            if not (graph is not None if agree is None else agree(graph is not None)):
                log.warning(
                    "no memory for more than %d of %d CUDA graphs: some steps run launch by launch", done, len(wanted)
                )
                break
            assert graph is not None
            self._graphs[size, splits] = graph
            progress((done + 1) / len(wanted))
        return len(self._graphs)

    def _captured(
        self, shape: tuple[int, int, int], pool: Any, side: torch.cuda.Stream, *, together: bool
    ) -> _Graph | None:
        """None when there is no memory for it. `together`: before other ranks wait for this one in the kernels that
        are run beforehand, that raises; while they are captured nobody waits for anybody."""
        warm = False
        try:
            inputs = DecodeInputs(*shape, self._device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles the kernels, which cannot be done while a graph is captured
                self._forward(inputs.token_ids, inputs.layout)
            torch.cuda.current_stream().wait_stream(side)
            warm = True
            graph = torch.cuda.CUDAGraph()
            # other threads (NCCL's watchdog) may ask for their own events meanwhile
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                result = self._forward(inputs.token_ids, inputs.layout)
        except RuntimeError as error:  # the driver's, when it makes the graph, is no OutOfMemoryError
            if "out of memory" not in str(error) or (together and not warm):
                raise
            return None
        return _Graph(inputs, graph, result)

    def drop(self) -> None:
        """Let go of all graphs; steps run launch by launch. From any thread: a step that is under way may fail."""
        graphs, self._graphs = self._graphs, {}
        for each in graphs.values():
            each.graph.reset()

    def __call__(self, token_ids: Tensor, batch: BatchLayout) -> Tensor:
        graph = self._graph_for(batch)
        if graph is None:
            return self._forward(token_ids, batch)
        graph.inputs.fill(token_ids, batch, batch.derive("cuda", step_tensors).lens)
        graph.graph.replay()
        return graph.result[: len(token_ids)]

    def _graph_for(self, batch: BatchLayout) -> _Graph | None:
        if max(batch.query_lens) > 1:
            return None
        count, splits = len(batch.query_lens), -(-max(batch.context_lens) // SPLIT)
        graphs = self._graphs  # `drop` may replace them meanwhile
        fitting = [key for key in graphs if key[0] >= count and key[1] >= splits]
        return graphs[min(fitting)] if fitting else None
