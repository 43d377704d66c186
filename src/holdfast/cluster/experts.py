"""Where the experts of a replica are, as its engine sees it: watched by their load, moved while serving."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from holdfast.core import wire
from holdfast.core.plan import ReplicaPlan, StagePlan
from holdfast.core.spec import DecoderSpec
from holdfast.parallel.placement import groups_of, imbalance, loads_of_groups, owners_of, rebalance_stage

log = logging.getLogger(__name__)

Chosen = npt.NDArray[np.int64]
"""How often each expert of a stage's layers was chosen since the start: [layers, E]."""
Loads = npt.NDArray[np.float64]
"""The same, what is long ago counting less."""


@dataclass(slots=True)
class Move:
    """Experts on their way: ranks load what they lack, then all change over at once."""

    target: ReplicaPlan
    num_missing: int
    """Ranks that have not said that they are ready."""
    begun: float = field(default_factory=time.monotonic)
    num_loaded: int = 0
    """Experts, in each rank."""
    error: str = ""


class ExpertBalancer:
    """Of one replica, cut by `plan`: every `interval` steps it spreads the load measured so far, which counts half as
    much at each look, with `redundant` extra copies of experts in each layer. `read(stage)` gives the counts since
    the start. What it returns is for all workers of the replica."""

    def __init__(
        self,
        spec: DecoderSpec,
        plan: ReplicaPlan,
        interval: int,
        redundant: int,
        read: Callable[[int], list[list[int]]],
        *,
        planner: Executor,
    ) -> None:
        self.plan = plan
        self._spec = spec
        self._interval = interval
        self._redundant = redundant
        self._read = read
        self._due = interval
        self._failures = 0
        """In a row: each doubles the time to the next try."""
        self._planner = planner
        self._planned: Future[tuple[StagePlan, ...]] | None = None
        self._counted = self._counts()
        self._loads: list[Loads] = [np.zeros(counts.shape) for counts in self._counted]
        self._move: Move | None = None

    def _counts(self) -> list[Chosen]:
        return [np.array(self._read(stage), dtype=np.int64) for stage in range(len(self.plan.stages))]

    def step_done(self) -> None:
        """Count a step."""
        self._due -= 1

    def look(self) -> wire.PlaceExperts | None:
        """When it is time, and worth it: experts to move. What that is, the planner finds out beside the steps."""
        if self._planned is not None and self._planned.done():
            stages, self._planned = self._planned.result(), None
            return self._begin(stages)
        if self._due <= 0 and self._move is None and self._planned is None:
            self._due = self._interval << min(self._failures, 10)
            before, self._counted = self._counted, self._counts()
            grown = [now - then for now, then in zip(self._counted, before, strict=True)]
            self._loads = [0.5 * load + more for load, more in zip(self._loads, grown, strict=True)]
            self._planned = self._planner.submit(self._spread_out, self.plan.stages, self._loads)
        return None

    def _spread_out(self, stages: Sequence[StagePlan], loads: Sequence[Loads]) -> tuple[StagePlan, ...]:
        """The stages as they should be."""
        layers = [self._by_layer(*each) for each in zip(stages, loads, strict=True)]
        target = tuple(
            rebalance_stage(stage, some, self._redundant) for stage, some in zip(stages, layers, strict=True)
        )
        if target != tuple(stages):
            log.info(
                "experts: the busiest ranks compute %.2f times the mean of a stage; moving some to make that %.2f",
                _spread(stages, layers),
                _spread(target, layers),
            )
        return target

    def _begin(self, stages: tuple[StagePlan, ...]) -> wire.PlaceExperts | None:
        if stages == self.plan.stages:
            return None
        target = msgspec.structs.replace(self.plan, stages=stages)
        self._move = Move(target, target.num_ranks)
        return wire.PlaceExperts(tuple(stage.placements for stage in stages))

    def _by_layer(self, stage: StagePlan, loads: Loads) -> dict[int, list[float]]:
        """Of layers with experts that several groups of ranks share out."""
        if len(groups_of(stage)) == 1:
            return {}
        layers = zip(range(*stage.layers), loads, strict=True)
        return {layer: some.tolist() for layer, some in layers if self._spec.layers[layer].moe}

    def loaded(self, message: wire.ExpertsLoaded) -> wire.UseExperts | wire.DropExperts | None:
        """A rank is ready. After the last one all change over; or none, when one could not."""
        move = self._move
        assert move is not None, message
        move.num_missing -= 1
        move.num_loaded += message.num_loaded
        move.error = move.error or message.error
        if move.num_missing:
            return None
        self._move = None
        if move.error:
            self._failures += 1
            log.warning("experts stay where they are: %s", move.error)
            return wire.DropExperts()
        self.plan, self._failures = move.target, 0
        log.info("experts moved: %d read in %.2f s", move.num_loaded, time.monotonic() - move.begun)
        return wire.UseExperts()


def _spread(stages: Sequence[StagePlan], loads: Sequence[Mapping[int, list[float]]]) -> float:
    """The busiest group's load over the mean of its stage, averaged over layers."""
    found = [
        imbalance(loads_of_groups(some, owners_of(stage, layer), len(groups_of(stage))))
        for stage, layers in zip(stages, loads, strict=True)
        for layer, some in layers.items()
    ]
    return float(np.mean(found)) if found else 1.0
