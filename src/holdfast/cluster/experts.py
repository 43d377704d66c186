"""Where the experts of a replica are, as its engine sees it: watched by their load, moved while serving."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from holdfast.core import wire
from holdfast.core.plan import Place, ReplicaPlan, StagePlan, places
from holdfast.core.spec import DecoderSpec
from holdfast.parallel.placement import groups_of, imbalance, loads_of_groups, owners_of, rebalance_stage

log = logging.getLogger(__name__)

Chosen = npt.NDArray[np.int64]
"""How often each expert of a stage's layers was chosen since the start: [layers, E]."""


@dataclass(slots=True)
class Move:
    """Experts on their way: ranks load what they lack, then all change over at once."""

    number: int
    target: ReplicaPlan
    missing: set[str]
    """Ranks that have not said that they are ready."""
    begun: float = field(default_factory=time.monotonic)
    num_loaded: int = 0
    error: str = ""


class ExpertBalancer:
    """Every `interval` steps it spreads the load measured since then. `read(stage)` counts, `send` reaches a worker.
    Each layer has `redundant` experts more than once."""

    def __init__(  # noqa: PLR0917
        self,
        spec: DecoderSpec,
        plan: ReplicaPlan,
        interval: int,
        redundant: int,
        read: Callable[[int], Chosen],
        send: Callable[[Place, wire.PlaceExperts | wire.UseExperts], None],
        replica: int,
    ) -> None:
        self.plan = plan
        self._spec = spec
        self._interval = interval
        self._redundant = redundant
        self._read = read
        self._send = send
        self._replica = replica
        self._steps = 0
        self._moves = 0
        self._before = self._counts()
        self._move: Move | None = None

    def _counts(self) -> list[Chosen]:
        return [self._read(stage) for stage in range(len(self.plan.stages))]

    def step_done(self) -> None:
        """Count a step; begin to move experts when it is time, and worth it."""
        self._steps += 1
        if self._move is not None or self._steps % self._interval:
            return
        counts = self._counts()
        grown = [now - before for now, before in zip(counts, self._before, strict=True)]
        self._before = counts
        loads = [self._by_layer(stage, some) for stage, some in zip(self.plan.stages, grown, strict=True)]
        stages = [
            rebalance_stage(stage, some, self._redundant) for stage, some in zip(self.plan.stages, loads, strict=True)
        ]
        pairs = list(zip(self.plan.stages, stages, loads, strict=True))
        if all(owners_of(old, layer) == owners_of(new, layer) for old, new, some in pairs for layer in some):
            return
        log.info(
            "experts: the busiest ranks compute %.2f times the mean of their stage; moving some to make that %.2f",
            *(
                np.mean([_spread(stage, some) for stage, some in each])
                for each in ([(old, some) for old, _, some in pairs], [(new, some) for _, new, some in pairs])
            ),
        )
        self._begin(msgspec.structs.replace(self.plan, stages=tuple(stages)))

    def _by_layer(self, stage: StagePlan, counts: Chosen) -> dict[int, Chosen]:
        """Of layers with experts that several groups of ranks share out, and where anything was computed."""
        if len(groups_of(stage)) == 1:
            return {}
        layers = range(*stage.layers)
        return {layer: some for layer, some in zip(layers, counts, strict=True) if self._spec.layers[layer].moe}

    def _begin(self, target: ReplicaPlan) -> None:
        self._moves += 1
        everywhere = places(target)
        self._move = Move(self._moves, target, {self._name(place) for place in everywhere})
        for place in everywhere:
            self._send(place, wire.PlaceExperts(self._moves, place.plan.placements))

    def loaded(self, message: wire.ExpertsLoaded) -> None:
        """A rank is ready. After the last one all change over; or none, when one could not."""
        move = self._move
        assert move is not None, message
        move.missing.discard(message.rank)
        move.num_loaded += message.num_loaded
        move.error = move.error or message.error
        if move.missing:
            return
        for place in places(move.target):
            self._send(place, wire.UseExperts(move.number, never=bool(move.error)))
        self._move = None
        if move.error:
            log.warning("experts stay where they are: %s", move.error)
            return
        self.plan = move.target
        log.info("experts moved: %d read in %.2f s", move.num_loaded, time.monotonic() - move.begun)

    def _name(self, place: Place) -> str:
        return f"{self._replica}.{place.name}"


def _spread(stage: StagePlan, loads: Mapping[int, Chosen]) -> float:
    """The busiest group's load over the mean, averaged over layers."""
    groups = len(groups_of(stage))
    found = [imbalance(loads_of_groups(some, owners_of(stage, layer), groups)) for layer, some in loads.items()]
    return float(np.mean(found)) if found else 1.0
