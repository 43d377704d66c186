"""Experts that move: a worker reads those it lacks beside its steps, and changes over between two of them."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace

import msgspec

from holdfast.core import wire
from holdfast.core.plan import Place
from holdfast.core.spec import ModelInfo
from holdfast.models.layers import Weights
from holdfast.models.load import move_experts
from holdfast.worker.runner import Runner

log = logging.getLogger(__name__)


class ExpertMover:
    """Of one rank. `say` tells the engine, from the thread that reads."""

    def __init__(
        self, model: ModelInfo, runner: Runner, rank: str, say: Callable[[wire.ExpertsLoaded], None]
    ) -> None:
        self._model = model
        self._runner = runner
        self._rank = rank
        self._say = say
        self._loaded: dict[int, Weights] = {}
        """By the number of the placement."""

    def place(self, message: wire.PlaceExperts) -> None:
        """Begin to read what is missing."""
        threading.Thread(target=self._load, args=(message,), name="experts", daemon=True).start()

    def use(self, message: wire.UseExperts) -> None:
        """From the next step on; what is held no longer is let go."""
        weights = self._loaded.pop(message.number)
        if not message.never:
            self._runner.use_experts(weights)

    def _load(self, message: wire.PlaceExperts) -> None:
        begun, before = time.perf_counter(), self._runner.decoder.weights
        number, error, read = message.number, "", 0
        try:
            weights = move_experts(self._model, before, _placed(before.place, message))
            read = len(weights.packed.keys() - before.packed.keys()) // 2  # an up and a down each
            log.info("read %d experts in %.2f s", read, time.perf_counter() - begun)
        except Exception as failure:  # noqa: BLE001 - the thread's border: told to the engine, which decides
            log.error("experts could not be read\n%s", traceback.format_exc())  # noqa: TRY400
            error, weights = f"{type(failure).__name__}: {failure}", before
        self._loaded[number] = weights
        self._say(wire.ExpertsLoaded(number, self._rank, read, error))


def _placed(place: Place, message: wire.PlaceExperts) -> Place:
    stages = list(place.replica.stages)
    stages[place.stage] = msgspec.structs.replace(place.plan, placements=message.placements)
    return replace(place, replica=msgspec.structs.replace(place.replica, stages=tuple(stages)))
