"""Runs operations at once, or puts them down while a step is being recorded."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from holdfast.kernels.cpu import structs
from holdfast.kernels.cpu.library import Library
from holdfast.kernels.cpu.memory import new_tensor
from holdfast.kernels.cpu.program import Program, Recording
from holdfast.kernels.cpu.step import PARTIAL_FLOATS, StepBatch
from holdfast.kernels.interface import BatchLayout, Forward, Heads


class Guard(Protocol):
    """Watches over what a program waits for."""

    def arm(self) -> int:
        """Before a program is run: the address of the int64 that ends it once it is not 0."""
        ...

    def check(self) -> None:
        """After it: raises `CollectiveFailed` if it was ended."""
        ...


class _Recorder(threading.local):
    """What the calls of this thread are put down in; those of other threads run meanwhile."""

    recording: Recording | None = None


class Executor:
    """A team of threads, and where the results of operations go.

    `pinned`: bind each thread to a core, the caller's too. Raises `ConfigError` when there are no threads to be had.
    """

    def __init__(self, library: Library, threads: int, *, pinned: bool) -> None:
        self.library = library
        cores = sorted(os.sched_getaffinity(0))  # more threads than that share them
        cpus = [cores[i % len(cores)] for i in range(threads)] if pinned else None
        self._team = library.start_team(threads, cpus)
        # not at exit: another thread may be in the middle of a run
        weakref.finalize(self, library.stop_team, self._team).atexit = False
        self._partial = np.empty(PARTIAL_FLOATS, dtype=np.float32)
        self.partial = self._partial.ctypes.data
        """Where attention leaves the states of splits."""
        self._recorder = _Recorder()
        self.guard: Guard | None = None
        """Of operations that wait for other processes."""
        self.moves: int | None = None
        """Address of an int64 that counts pieces of operations, for whoever watches."""

    def new(self, rows: int, width: int, dtype: torch.dtype, *, dense: bool = False) -> Tensor:
        """[rows, width], uninitialised; `dense`: without room between the rows."""
        if (recording := self._recorder.recording) is not None:
            return recording.workspace.tensor(rows, width, dtype, dense=dense)
        return torch.empty(rows, width, dtype=dtype) if dense else new_tensor(rows, width, dtype)

    def result(self, rows: int, width: int, dtype: torch.dtype, add_to: Tensor | None = None) -> Tensor:
        """`add_to`, which is float32, or a new tensor."""
        if add_to is None:
            return self.new(rows, width, dtype)
        assert (add_to.shape, add_to.dtype) == ((rows, width), torch.float32), (add_to.shape, add_to.dtype)
        return add_to

    def run(self, operation: ctypes.Structure, rows: int, keep: tuple[Any, ...] = ()) -> None:
        """Over `rows` rows. `keep`: what the operation points to and a recording has to hold."""
        if (recording := self._recorder.recording) is not None:
            recording.add(operation, rows, keep)
        else:
            self.run_all((structs.Op * 1)(structs.op(operation)), structs.Batch(rows=rows))

    def run_all(self, ops: ctypes.Array[structs.Op], batch: structs.Batch) -> None:
        """In order. Raises what the guard raises."""
        batch.moves = self.moves
        if self.guard is None:
            self.library.run(self._team, ops, batch)
            return
        batch.failed = self.guard.arm()
        self.library.run(self._team, ops, batch)
        self.guard.check()

    def run_step(
        self,
        operations: Sequence[ctypes.Structure],
        rows: int,
        heads: Heads,
        batch: BatchLayout,
        keep: tuple[Any, ...],
    ) -> None:
        """Operations on the heads of a step's rows that need to know where those belong: in one run, since what one
        leaves in `partial` for the next would be overwritten by another thread's attention."""
        assert rows == sum(batch.query_lens), f"{rows} rows for a step of {sum(batch.query_lens)}"
        max_items = PARTIAL_FLOATS // (heads.num_heads * (heads.head_dim + 2))
        if (recording := self._recorder.recording) is not None:
            for operation in operations:
                recording.add(operation, rows, keep)
            recording.max_items = min(recording.max_items, max_items)
            return
        step = batch.derive(f"cpu step {max_items}", lambda layout: StepBatch(layout, max_items))
        ops = (structs.Op * len(operations))(*map(structs.op, operations))
        self.run_all(ops, step.c)

    def record(self, forward: Forward, max_tokens: int) -> Program:
        """See `Kernels.record`."""
        assert self._recorder.recording is None, "a recording within a recording"
        recording = Recording(max_tokens)
        recording.kept.append(self)
        self._recorder.recording = recording
        try:
            result = forward(recording.token_ids, recording.layout)
        finally:
            self._recorder.recording = None
        return Program(recording, result, self)
