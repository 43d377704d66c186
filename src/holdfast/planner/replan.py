"""A replica that has lost a rank, cut anew for those that are left."""

from __future__ import annotations

from itertools import accumulate, pairwise

from holdfast.core.plan import Place, ReplicaPlan, StagePlan
from holdfast.core.spec import DecoderSpec
from holdfast.parallel import cuts
from holdfast.planner.candidates import balanced


def replan(spec: DecoderSpec, lost: Place) -> ReplicaPlan | None:
    """The same replica without the rank `lost`; None: it was the last.

    The others of its stage share out what it had, and layers go to where more ranks are, so that no stage takes
    longer for its layers than it must: after TP2 × PP2 has lost one, a third of the layers stays with the lone rank.
    Raises `ConfigError` when the model cannot be cut so.
    """
    smaller = cuts.replan(spec, lost)
    if smaller is None or len(smaller.stages) == 1:
        return smaller
    per_layer = [1 / len(stage.ranks) for stage in smaller.stages]
    layers = balanced(spec.num_layers, per_layer, [0] * len(per_layer), [spec.num_layers] * len(per_layer))
    if layers is None:
        return smaller
    moved = with_layers(smaller, layers)
    return min((smaller, moved), key=slowest_stage)


def with_layers(replica: ReplicaPlan, layers: list[int]) -> ReplicaPlan:
    """The same ranks with other layers. Placements of experts that are told by layer are dropped: ranks hold again
    what their shards say."""
    borders = pairwise((0, *accumulate(layers)))
    return ReplicaPlan(
        tuple(StagePlan(bounds, stage.ranks) for bounds, stage in zip(borders, replica.stages, strict=True))
    )


def slowest_stage(replica: ReplicaPlan) -> float:
    """Layers per rank of the stage that has most."""
    return max((stage.layers[1] - stage.layers[0]) / len(stage.ranks) for stage in replica.stages)
