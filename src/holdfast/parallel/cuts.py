"""How a model can be cut: even plans made from degrees, any plan checked."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise

import msgspec

from holdfast.core.errors import ConfigError
from holdfast.core.plan import PipelineBatching, Place, Plan, Range, RankShard, ReplicaPlan, StagePlan
from holdfast.core.spec import DecoderSpec
from holdfast.parallel.placement import check_experts
from holdfast.parallel.shards import MLP_SHARDS, check_ranges, head_shards, num_expert_shards, num_mlp_shards

MOST_REPLICAS = 64
_VOCAB_UNIT = 64
"""Rows of the vocabulary that stay together."""


def split(count: int, weights: Sequence[int]) -> list[Range]:
    """`count` things in consecutive ranges, as near to the weights as whole things allow, what is left over in the
    first; every part gets one at least when there are enough."""
    total, least = sum(weights), min(1, count // len(weights))
    spare = count - least * len(weights)
    ends = [-(-spare * part // total) + least * (i + 1) for i, part in enumerate(accumulate(weights))]
    return list(pairwise((0, *ends)))


def make_plan(
    spec: DecoderSpec,
    *,
    tensor: int | Sequence[int] = 1,
    pipeline: int = 1,
    data: int = 1,
    expert: int | None = None,
    layers: Sequence[int] = (),
    pipeline_batching: PipelineBatching = "asynchronous",
    shard_weights: bool = False,
) -> Plan:
    """Even shards: `pipeline` stages (of so many `layers` each, when they are said), of `tensor` ranks each (or as
    many as the sequence says), in `data` replicas. `expert`: groups of ranks that share out the experts, each
    cut over the ranks of its group; None: one group, or, where experts are too small to be cut so often, one per
    rank. Raises `ConfigError` for what cannot be."""
    degrees = [tensor] * pipeline if isinstance(tensor, int) else list(tensor)
    if layers and (len(layers) != pipeline or sum(layers) != spec.num_layers or min(layers) < 1):
        given = ",".join(map(str, layers))
        raise ConfigError(
            f"--pipeline-layers {given}: must be {pipeline} numbers of at least 1 "
            f"(--pipeline-parallel-size) that sum to the model's {spec.num_layers} layers"
        )
    if pipeline > spec.num_layers:
        raise ConfigError(f"--pipeline-parallel-size {pipeline}: the model has {spec.num_layers} layers")
    stages, first_rank = [], 0
    for bounds, degree in zip(_layer_ranges(spec, pipeline, layers), degrees, strict=True):
        stages.append(StagePlan(bounds, _even_shards(spec, degree, expert, first_rank)))
        first_rank += degree
    plan = Plan((ReplicaPlan(tuple(stages)),) * data, pipeline_batching, shard_weights=shard_weights)
    check_plan(plan, spec, "the plan")
    return plan


def _layer_ranges(spec: DecoderSpec, pipeline: int, layers: Sequence[int]) -> list[Range]:
    if layers:
        return list(pairwise((0, *accumulate(layers))))
    return split(spec.num_layers, [1] * pipeline)


def _even_shards(spec: DecoderSpec, degree: int, expert: int | None, first_rank: int) -> tuple[RankShard, ...]:
    if not 1 <= degree <= max_degree(spec):
        raise ConfigError(
            f"--tensor-parallel-size {degree}: must be at least 1 and at most {max_degree(spec)} for this model "
            f"({spec.num_heads} query heads, {spec.mlp_size} MLP columns, both in at most {MLP_SHARDS} shards)"
        )
    heads = query_head_ranges(spec, [1] * degree)
    per_group = spec.num_heads // spec.num_kv_heads
    mlp = split(num_mlp_shards(spec), [1] * degree)
    vocab = _vocab_ranges(spec.vocab_size, degree)
    experts = _expert_shards(spec, degree, expert)
    return tuple(
        RankShard(
            first_rank + index,
            heads[index],
            (heads[index][0] // per_group, -(-heads[index][1] // per_group)),
            mlp[index],
            vocab[index],
            *experts[index],
        )
        for index in range(degree)
    )


def _vocab_ranges(rows: int, degree: int) -> list[Range]:
    unit = _VOCAB_UNIT if rows >= _VOCAB_UNIT * degree else 1
    units = split(-(-rows // unit), [1] * degree)
    return [(first * unit, min(last * unit, rows)) for first, last in units]


def max_degree(spec: DecoderSpec) -> int:
    """The most ranks that can share a layer: each owns a virtual shard of everything at least."""
    return min(len(head_shards(spec)), MLP_SHARDS, num_mlp_shards(spec))


def query_head_ranges(spec: DecoderSpec, weights: Sequence[int]) -> list[Range]:
    """Query heads for ranks of these weights: whole KV heads' where there are enough, else parts of one KV head's."""
    groups, ends = spec.num_kv_heads, head_shards(spec)
    per_group, per_shard = spec.num_heads // groups, len(ends) // groups
    if len(weights) <= groups:
        return [(first * per_group, last * per_group) for first, last in split(groups, weights)]
    borders, ranges = (0, *ends), []
    for group, (first, last) in enumerate(split(len(weights), [1] * groups)):
        for some in split(per_shard, weights[first:last]):
            ranges.append((borders[group * per_shard + some[0]], borders[group * per_shard + some[1]]))
    return ranges


def _expert_shards(spec: DecoderSpec, degree: int, expert: int | None) -> list[tuple[tuple[int, ...], Range]]:
    """Experts and their shards, rank by rank: `expert` groups of ranks, each with its share of the experts."""
    if spec.moe is None:
        if expert not in {None, 1}:
            raise ConfigError(f"--expert-parallel-size {expert}: the model has no experts")
        return [((), (0, 0))] * degree
    if expert is None:
        expert = _fewest_groups(degree, num_expert_shards(spec))
        if expert > spec.moe.num_experts:
            raise ConfigError(
                f"--tensor-parallel-size {degree}: {spec.moe.num_experts} experts, which can be cut in "
                f"{num_expert_shards(spec)}, are not enough for so many ranks"
            )
    if degree // max(expert, 1) > num_expert_shards(spec):
        raise ConfigError(
            f"--expert-parallel-size {expert}: leaves {degree // max(expert, 1)} ranks for each expert, "
            f"which can be cut in {num_expert_shards(spec)}"
        )
    if expert < 1 or degree % expert or expert > spec.moe.num_experts:
        raise ConfigError(
            f"--expert-parallel-size {expert}: must divide --tensor-parallel-size {degree}, "
            f"and be at most the {spec.moe.num_experts} experts"
        )
    shards = split(num_expert_shards(spec), [1] * (degree // expert))
    owned = split(spec.moe.num_experts, [1] * expert)
    return [(tuple(range(*some)), shard) for some in owned for shard in shards]


def _fewest_groups(degree: int, most_ranks: int) -> int:
    """Even groups of `degree` ranks, of up to `most_ranks` each."""
    return next(groups for groups in range(1, degree + 1) if degree % groups == 0 and degree // groups <= most_ranks)


# --- without a rank ---


def replan(spec: DecoderSpec, lost: Place) -> ReplicaPlan | None:
    """The same replica on the ranks that are left: the others of its stage share out what it had; where it was alone,
    its layers go to the other stages. None: it was the last. Raises `ConfigError` when the model cannot be cut so.
    """
    stages = list(lost.replica.stages)
    if len(lost.ranks) > 1:
        stages[lost.stage] = StagePlan(lost.layers, _fewer(spec, lost.ranks))
    else:
        del stages[lost.stage]
        if not stages:
            return None
        ranges = split(spec.num_layers, [stage.layers[1] - stage.layers[0] for stage in stages])
        stages = [StagePlan(layers, stage.ranks) for layers, stage in zip(ranges, stages, strict=True)]
    numbered, first = [], 0
    for stage in stages:
        ranks = tuple(msgspec.structs.replace(shard, rank=first + index) for index, shard in enumerate(stage.ranks))
        numbered.append(msgspec.structs.replace(stage, ranks=ranks))
        first += len(ranks)
    replica = ReplicaPlan(tuple(numbered))
    check_plan(Plan((replica,)), spec, "the plan without it")
    return replica


def _fewer(spec: DecoderSpec, ranks: Sequence[RankShard]) -> tuple[RankShard, ...]:
    """Even shards for one rank less, experts in as many groups as before or one less, if that can be; else in as few
    as there can be."""
    degree, groups = len(ranks) - 1, len({shard.experts for shard in ranks})
    for expert in (groups, groups - 1):
        if spec.moe is not None and expert >= 1 and degree % expert == 0:
            with contextlib.suppress(ConfigError):
                return _even_shards(spec, degree, expert, 0)
    return _even_shards(spec, degree, None, 0)


# --- what a plan must be ---


def check_plan(plan: Plan, spec: DecoderSpec, name: str) -> None:
    """Raise `ConfigError`, which names what is wrong, unless the plan holds all of the model, cut where it can be."""
    if not 1 <= len(plan.replicas) <= MOST_REPLICAS:
        raise ConfigError(f"{name}: {len(plan.replicas)} replicas: must be at least 1 and at most {MOST_REPLICAS}")
    if not 0 <= plan.microbatches <= 64:
        raise ConfigError(f"{name}: microbatches {plan.microbatches}: must be at least 0 and at most 64")
    if plan.shard_weights and (len(plan.replicas) == 1 or len(set(plan.replicas)) > 1):
        raise ConfigError(f"{name}: shard_weights: needs several replicas (--data-parallel-size), all cut alike")
    if plan.devices and [len(some) for some in plan.devices] != [some.num_ranks for some in plan.replicas]:
        raise ConfigError(f"{name}: devices: must be one number for each rank of each replica")
    if any(number < 0 for some in plan.devices for number in some):
        raise ConfigError(f"{name}: devices: must be at least 0")
    for number, replica in enumerate(plan.replicas):
        where = f"{name}: replica {number}"
        check_ranges([stage.layers for stage in replica.stages], spec.num_layers, f"{where}: layers")
        ranks = [shard.rank for stage in replica.stages for shard in stage.ranks]
        for rank, count in Counter(ranks).items():
            if count > 1:
                raise ConfigError(f"{where}: rank {rank} is there {count} times")
        if sorted(ranks) != list(range(len(ranks))):
            raise ConfigError(f"{where}: ranks are {sorted(ranks)}, must be 0 to {len(ranks) - 1}")
        for index, stage in enumerate(replica.stages):
            _check_stage(stage, spec, f"{where}, stage {index}")


def _check_stage(stage: StagePlan, spec: DecoderSpec, where: str) -> None:
    if not stage.ranks:
        raise ConfigError(f"{where}: has no ranks")
    if len(stage.ranks) > max_degree(spec):
        raise ConfigError(f"{where}: {len(stage.ranks)} ranks, this model can be cut over {max_degree(spec)} at most")
    check_ranges([shard.query_heads for shard in stage.ranks], spec.num_heads, f"{where}: query_heads")
    check_ranges([shard.mlp_shards for shard in stage.ranks], num_mlp_shards(spec), f"{where}: mlp_shards")
    check_ranges([shard.vocab for shard in stage.ranks], spec.vocab_size, f"{where}: vocab")
    per_group, ends = spec.num_heads // spec.num_kv_heads, {0, *head_shards(spec)}
    for shard in stage.ranks:
        (first, last), rank = shard.query_heads, f"{where}: rank {shard.rank}"
        if not {first, last} <= ends:
            raise ConfigError(f"{rank}: query_heads {first}, {last}: heads can be cut at {sorted(ends)} only")
        read = (first // per_group, -(-last // per_group))
        if read[1] - read[0] > 1 and (first % per_group or last % per_group):
            raise ConfigError(f"{rank}: query_heads {first}, {last}: more than one KV head's must be whole KV heads'")
        if shard.kv_heads != read:
            raise ConfigError(f"{rank}: kv_heads {shard.kv_heads}: its query heads read {read}")
    check_experts(stage, spec, where)
