"""What of a model each rank of a plan holds: the shares by which memory, and work, are divided.

Two ways to them: from plain degrees (`even_shares`), as a search tries them by the thousand, and from a
`core.plan.ReplicaPlan` with stages and shards as uneven as they come (`shares_of_replica`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from holdfast.core.errors import ConfigError
from holdfast.core.plan import Range, RankShard, ReplicaPlan, StagePlan
from holdfast.parallel.placement import groups_of, held_by, owners_of
from holdfast.planner.shapes.shape import ModelShape


@dataclass(frozen=True, slots=True)
class RankShare:
    """One rank's share of every layer of its stage. Shares are parts of 1; what they make of a layer's heads is
    rounded up to whole ones, so a KV head that several ranks read is held by each of them."""

    layers: Range
    query_heads: float = 1.0
    kv_heads: float = 1.0
    columns: float = 1.0
    """Of the MLPs, shared experts among them."""
    vocab: float = 1.0
    """Of the rows of the embeddings and the head."""
    experts: float = 1.0
    """Of the routed experts of a layer; with placements, the mean over the layers of the stage."""
    expert_columns: float = 1.0
    """Of the columns of each routed expert that is held."""
    is_first: bool = True
    """Holds embeddings."""
    is_last: bool = True
    """Holds the head."""
    ranks_in_stage: int = 1


def even_layers(num_layers: int, pipeline: int) -> tuple[int, ...]:
    """Layers of each stage, what is left over in the first ones, as `parallel.cuts.split` has it."""
    return tuple(num_layers // pipeline + (stage < num_layers % pipeline) for stage in range(pipeline))


def even_shares(
    num_layers: int,
    *,
    tensor: int | Sequence[int] = 1,
    pipeline: int = 1,
    expert: int = 1,
    layers: Sequence[int] = (),
    cut_vocab: bool = True,
) -> tuple[RankShare, ...]:
    """The share of the fullest rank of every stage; ranks of a stage differ by what does not divide, no more.

    `tensor`: ranks of every stage, or of each. `expert`: groups that share out the experts; each expert is cut over
    the `tensor / expert` ranks of its group. More groups than `tensor` are spread over data-parallel replicas too,
    and experts are whole (DeepSeek's deployment, arXiv:2412.19437, 3.4). `layers`: of each stage, when they are not
    even. `cut_vocab`: whether embeddings and head are cut, or whole on every rank of their stage.

    Raises `ConfigError` for degrees that cannot be.
    """
    degrees = (tensor,) * pipeline if isinstance(tensor, int) else tuple(tensor)
    counts = tuple(layers) or even_layers(num_layers, max(pipeline, 1))
    _check_degrees(num_layers, degrees, pipeline, expert, counts)
    borders = (0, *accumulate(counts))
    shares = []
    for stage, (bounds, degree) in enumerate(zip(pairwise(borders), degrees, strict=True)):
        part = 1 / degree
        shares.append(
            RankShare(
                layers=bounds,
                query_heads=part,
                kv_heads=part,
                columns=part,
                vocab=part if cut_vocab else 1.0,
                experts=1 / expert,
                expert_columns=min(1.0, expert / degree),
                is_first=stage == 0,
                is_last=stage == pipeline - 1,
                ranks_in_stage=degree,
            )
        )
    return tuple(shares)


def _check_degrees(
    num_layers: int, degrees: tuple[int, ...], pipeline: int, expert: int, layers: tuple[int, ...]
) -> None:
    if pipeline < 1 or pipeline > num_layers:
        raise ConfigError(
            f"pipeline degree {pipeline}: must be at least 1 and at most the model's {num_layers} layers"
        )
    if len(degrees) != pipeline or min(degrees) < 1:
        raise ConfigError(f"tensor degrees {degrees}: must be {pipeline} numbers of at least 1, one for each stage")
    if expert < 1:
        raise ConfigError(f"expert degree {expert}: must be at least 1")
    if len(layers) != pipeline or sum(layers) != num_layers or min(layers) < 1:
        raise ConfigError(
            f"layers {layers}: must be {pipeline} numbers of at least 1 that sum to the model's {num_layers}"
        )


def shares_of_replica(shape: ModelShape, replica: ReplicaPlan) -> tuple[RankShare, ...]:
    """The share of every rank of a replica, stage by stage, rank by rank. What a range is a part of, the ranges of
    the other ranks of its stage say: together they hold everything."""
    last = len(replica.stages) - 1
    return tuple(
        _share_of(shape, stage, shard, is_first=index == 0, is_last=index == last)
        for index, stage in enumerate(replica.stages)
        for shard in stage.ranks
    )


def _share_of(shape: ModelShape, stage: StagePlan, shard: RankShard, *, is_first: bool, is_last: bool) -> RankShare:
    ranks = stage.ranks
    return RankShare(
        layers=stage.layers,
        query_heads=_part(shard.query_heads, [rank.query_heads for rank in ranks]),
        kv_heads=_part(shard.kv_heads, [rank.kv_heads for rank in ranks]),
        columns=_part(shard.mlp_shards, [rank.mlp_shards for rank in ranks]),
        vocab=_part(shard.vocab, [rank.vocab for rank in ranks]),
        experts=_experts_held(shape, stage, ranks.index(shard)),
        expert_columns=_part(shard.expert_shards, [rank.expert_shards for rank in ranks]),
        is_first=is_first,
        is_last=is_last,
        ranks_in_stage=len(ranks),
    )


def _part(some: Range, everyone: Sequence[Range]) -> float:
    """Of what all ranges together make."""
    total = max(last for _, last in everyone)
    return (some[1] - some[0]) / total if total else 0.0


def _experts_held(shape: ModelShape, stage: StagePlan, index: int) -> float:
    """The part of a layer's experts that a rank holds, the mean over the stage's layers that have some."""
    routed = [layer for layer in range(*stage.layers) if shape.layers[layer].experts is not None]
    if not routed:
        return 0.0
    group = next(number for number, ranks in enumerate(groups_of(stage)) if index in ranks)
    owners = [owners_of(stage, layer) for layer in routed]
    return sum(len(held_by(some, group)) / len(some) for some in owners) / len(routed)
