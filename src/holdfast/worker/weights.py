"""Whether a rank's weights are still what was loaded: checksums (XXH3) of all that lies in memory, matrix by matrix.

A thread of its own walks the memory, a slice at a time and most of the time idle, so that no step waits for it. On a
GPU a slice is copied to the host on a stream beside.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64

from holdfast.core.wire import WeightsChecked
from holdfast.models.layers import Weights
from holdfast.worker.runner import Runner

log = logging.getLogger(__name__)

SLICE_BYTES = 4_000_000
IDLENESS = 3
"""Times as long as a slice took the thread waits before the next."""
Sums = Mapping[str, tuple[Any, int]]
"""By name: what lies in memory, and its checksum."""


class WeightCheck:
    """Of one rank. A walk that begins at once learns what is right; `learn` has another one do so for what is new.
    `ask`, and, once `fd` is readable, `report`. `sums`: what was right before this."""

    def __init__(self, runner: Runner, rank: str, sums: Sums | None = None) -> None:
        self.fd = os.eventfd(0, os.EFD_SEMAPHORE)
        self._runner = runner
        self._rank = rank
        self.sums: Sums = sums or {}
        """What is right, of what was there at the last walk."""
        device = runner.decoder.weights.device
        self._beside = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        """Made once: torch has 32 and hands them out by turns, NCCL's among them."""
        self._cores = os.sched_getaffinity(0)  # before the first step binds this thread to one of them
        self._stop = threading.Event()
        self._asked: SimpleQueue[str | None] = SimpleQueue()
        self._reports: SimpleQueue[WeightsChecked] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="weights")
        self._thread.start()

    def learn(self) -> None:
        """Other matrices are here than before: what is new is right, and what is gone is let go."""
        self._asked.put("")

    def ask(self, key: str) -> None:
        """Compare all weights with what they were."""
        self._asked.put(key)

    def report(self) -> WeightsChecked:
        """What came of the oldest that was asked."""
        os.eventfd_read(self.fd)
        return self._reports.get()

    def close(self) -> None:
        """Before the process ends: a thread in the middle of torch would abort it."""
        self._stop.set()
        self._asked.put(None)
        self._thread.join()
        os.close(self.fd)

    def _work(self) -> None:
        os.sched_setaffinity(0, self._cores)  # of this thread
        self._attempt()
        while (key := self._asked.get()) is not None and not self._stop.is_set():
            begun = time.perf_counter()
            num_bytes, wrong = self._attempt()
            seconds = time.perf_counter() - begun
            if key:
                self._reports.put(WeightsChecked(self._rank, key, num_bytes, seconds, wrong))
                os.eventfd_write(self.fd, 1)

    def _attempt(self) -> tuple[int, list[str]]:
        try:
            return self._walk()
        except Exception as error:  # noqa: BLE001 - the thread's border: what cannot be read is not what was loaded
            log.error("weights cannot be read\n%s", traceback.format_exc())  # noqa: TRY400
            return 0, [f"cannot be read: {type(error).__name__}: {error}"]

    @torch.inference_mode()
    def _walk(self) -> tuple[int, list[str]]:
        """Bytes, and names of what has changed. What is seen for the first time is right."""
        num_bytes, wrong, sums = 0, [], dict[str, tuple[Any, int]]()
        for name, held in held_in(self._runner.decoder.weights).items():
            digest, begun = xxh3_64(), time.perf_counter()
            for data in slices(held, self._beside):
                digest.update(data)
                num_bytes += len(data)
                if self._stop.wait(IDLENESS * (time.perf_counter() - begun)):
                    return num_bytes, []
                begun = time.perf_counter()
            before, right = self.sums.get(name, (None, 0))
            sums[name] = (held, digest.intdigest())
            if before is held and right != sums[name][1]:
                wrong.append(name)
                sums[name] = (held, right)
        self.sums = sums
        return num_bytes, wrong


def held_in(weights: Weights) -> dict[str, Any]:
    """Matrices and norms by name, each once."""
    named = {**weights.packed, **weights.norms}
    return {name: held for name, held in named.items() if name != "head" or held is not named.get("embed")}


def slices(held: Any, beside: torch.cuda.Stream | None = None) -> Iterator[Any]:
    """Every byte of the tensors and arrays in a packed matrix, whatever its backend: uint8, piece by piece. A GPU's
    are copied on the stream `beside`."""
    for data in _arrays(held):
        flat = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
        flat = flat.detach().contiguous().flatten().view(torch.uint8)
        for start in range(0, len(flat), SLICE_BYTES):
            yield _on_host(flat[start : start + SLICE_BYTES], beside).numpy()


def _on_host(data: Tensor, beside: torch.cuda.Stream | None) -> Tensor:
    if beside is None:
        return data
    with torch.cuda.stream(beside):
        copy = data.to("cpu", non_blocking=True)
    beside.synchronize()
    return copy


def _arrays(held: Any) -> Iterator[Tensor | np.ndarray]:
    if isinstance(held, Tensor | np.ndarray):
        yield held
    elif isinstance(held, list | tuple):
        for part in held:
            yield from _arrays(part)
    elif is_dataclass(held):
        for field in fields(held):
            yield from _arrays(getattr(held, field.name))
