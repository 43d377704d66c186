"""What a plan still does when one of its ranks is lost and does not come back.

Its replica goes on without it, as recovery has it (`replan`): the others of its stage share out what it had, layers
go to where more ranks are. So a lone TP8 is not lost with one device, if seven have the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from holdfast.planner.candidates import Candidate, DeviceGroup, balanced
from holdfast.planner.estimate import Estimate, Question, estimate

MOST_REPLICAS = 8
"""Of more, what one of them still does makes no difference worth reckoning."""


def with_spare(question: Question, some: Estimate) -> Estimate:
    """The estimate with `reshaped` filled in: of all stages that could lose a rank, the worst."""
    candidate = some.candidate
    copies = len(candidate.replicas)
    # What replicas hold together is missing in each of them: one replica's work is lost until others have loaded it.
    if some.served is None or copies > MOST_REPLICAS or candidate.shard_weights or candidate.shared_experts:
        return some
    each = max(some.concurrency // copies, 1)
    alone = replace(question, goal=replace(question.goal, concurrency=each))
    whole = estimate(alone, replace(candidate, replicas=(candidate.stages,))).throughput
    left = [
        estimate(alone, smaller).throughput / whole if smaller else 0.0
        for smaller in _without_one(question, candidate)
    ]
    return replace(some, reshaped=min(1.0, *left))


def _without_one(question: Question, candidate: Candidate) -> Iterator[Candidate | None]:
    """One replica without a rank of each kind of stage; None: it cannot be cut so."""
    groups = candidate.stages
    seen: set[tuple[object, ...]] = set()
    for stage, group in enumerate(groups):
        kind = (group.device, group.degree, group.slowest_link)
        if kind in seen:
            continue
        seen.add(kind)
        yield _cut_anew(question, candidate, _lessened(groups, stage))


def _lessened(groups: tuple[DeviceGroup, ...], stage: int) -> tuple[DeviceGroup, ...]:
    group = groups[stage]
    fewer = (replace(group, places=group.places[:-1]),) if group.degree > 1 else ()
    return (*groups[:stage], *fewer, *groups[stage + 1 :])


def _cut_anew(question: Question, candidate: Candidate, groups: tuple[DeviceGroup, ...]) -> Candidate | None:
    if not groups:
        return None
    num_layers = question.shape.num_layers
    per_layer = [1 / group.degree for group in groups]
    layers = balanced(num_layers, per_layer, [0] * len(groups), [num_layers] * len(groups))
    assert layers is not None, "fewer stages than before have room for a layer each"
    return Candidate((groups,), tuple(layers), candidate.expert_parallel)
