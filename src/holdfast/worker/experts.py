"""Experts that move: a worker reads those it lacks beside its steps, and changes over between two of them."""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from dataclasses import replace

import msgspec

from holdfast.core import wire
from holdfast.core.errors import ModelError
from holdfast.core.plan import Place
from holdfast.core.spec import ModelInfo
from holdfast.models.inspect import stamp_of
from holdfast.models.layers import Weights
from holdfast.models.load import move_experts
from holdfast.worker.runner import Runner

log = logging.getLogger(__name__)


class ExpertMover:
    """Of one rank, which reads the checkpoint of this `stamp` (see `stamp_of`) and no other. One move at a time:
    `place`, and, once `fd` is readable, `report`, then `use` or `drop`."""

    def __init__(self, model: ModelInfo, stamp: list[tuple[str, int, int, int]], runner: Runner, rank: str) -> None:
        self.fd = os.eventfd(0)
        self._model = model
        self._stamp = stamp
        self._runner = runner
        self.rank = rank
        self._cores = os.sched_getaffinity(0)  # before the first step binds this thread to one of them
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._loaded: Weights | None = None
        self._report: wire.ExpertsLoaded

    def place(self, message: wire.PlaceExperts) -> None:
        """Begin to read what is missing."""
        place = self._runner.decoder.place
        stages = [
            msgspec.structs.replace(stage, placements=placements)
            for stage, placements in zip(place.replica.stages, message.stages, strict=True)
        ]
        target = replace(place, replica=msgspec.structs.replace(place.replica, stages=tuple(stages)))
        self._thread = threading.Thread(target=self._load, args=(target,), name="experts")
        self._thread.start()

    def report(self) -> wire.ExpertsLoaded:
        """What came of it."""
        os.eventfd_read(self.fd)
        return self._report

    def use(self) -> None:
        """From the next step on; what is held no longer is let go."""
        assert self._loaded is not None, "nothing has been placed"
        self._runner.use_experts(self._loaded)
        self._loaded = None

    def drop(self) -> None:
        """What was read is not needed."""
        self._loaded = None

    def close(self) -> None:
        """Before the process ends: a thread in the middle of torch would abort it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        os.close(self.fd)

    def _load(self, target: Place) -> None:
        begun, before, num_read, error = time.perf_counter(), self._runner.decoder.weights, 0, ""
        os.sched_setaffinity(0, self._cores)  # of this thread
        try:
            loaded = move_experts(self._model, before, target, self._stop.is_set)
            if stamp_of(self._model) != self._stamp:
                raise ModelError(f"{self._model.path}: has changed since the service was started")
            self._loaded = loaded
            num_read = len(self._loaded.packed.keys() - before.packed.keys()) // 2  # an up and a down each
            log.info("read %d experts in %.2f s", num_read, time.perf_counter() - begun)
        except Exception as failure:  # noqa: BLE001 - the thread's border: told to the engine, which decides
            log.error("experts could not be read\n%s", traceback.format_exc())  # noqa: TRY400
            error = f"{type(failure).__name__}: {failure}"
        self._report = wire.ExpertsLoaded(self.rank, num_read, error)
        os.eventfd_write(self.fd, 1)
