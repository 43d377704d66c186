"""A recorded step: the operations of one forward pass, run in C for any step of up to so many tokens.

As with a CUDA graph, the recording fixes every address: inputs are copied into buffers of its own, intermediate
results lie in its workspace. What differs between steps (how many rows, whose they are, where their blocks are) is in
`struct batch`, which operations read when they run.
"""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.kernels.cpu.memory import Workspace
from holdfast.kernels.cpu.step import StepBatch
from holdfast.kernels.cpu.structs import Op, op
from holdfast.kernels.interface import BatchLayout

if TYPE_CHECKING:
    from holdfast.kernels.cpu.executor import Executor


class Recording:
    """What a forward pass puts down, and the inputs it is given meanwhile."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.workspace = Workspace()
        self.token_ids = torch.zeros(max_tokens, dtype=torch.int64)
        positions, slots = torch.zeros(2, max_tokens, dtype=torch.int64)
        tables = torch.zeros(1, 1, dtype=torch.int32)
        self.layout = BatchLayout((max_tokens,), (max_tokens,), positions, slots, tables)
        self.max_items = sys.maxsize
        self.ops: list[Op] = []
        self.kept: list[Any] = []
        """What the operations point to and the workspace does not hold: weights, pages, tables, the kernels."""

    def add(self, operation: ctypes.Structure, rows: int, keep: tuple[Any, ...]) -> None:
        """Over all rows of the step: how many those are is known when it is run."""
        assert rows == self.max_tokens, f"an operation on {rows} rows cannot be recorded for steps of any size"
        self.ops.append(op(operation))
        self.kept.append(keep)


class Program:
    """`Forward` without Python's share. The result's memory is the program's, valid until the next call; so are the
    inputs': one caller at a time."""

    def __init__(self, recording: Recording, result: Tensor, executor: Executor) -> None:
        self._recording = recording
        self._result = result
        self._executor = executor
        self._ops = (Op * len(recording.ops))(*recording.ops)

    def __call__(self, token_ids: Tensor, batch: BatchLayout) -> Tensor:
        rows = token_ids.shape[0]
        most = self._recording.max_tokens
        assert rows <= most, f"{rows} tokens in a step recorded for {most}"
        self._recording.token_ids[:rows] = token_ids
        self._recording.layout.positions[:rows] = batch.positions
        step = StepBatch(batch, self._recording.max_items)
        self._executor.run_all(self._ops, step.c)
        return self._result[:rows]
