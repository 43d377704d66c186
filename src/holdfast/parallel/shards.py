"""Who owns what: the virtual shards a model is made of, how ranks divide them, and the tree in which their sums meet.

Contract 1: what is summed over a row-parallel matrix's K is cut into virtual shards that depend on the model
alone. Each is summed by itself; the sums meet in one binary tree. A rank owns consecutive shards, sums the largest
subtrees it owns whole (its *pieces*), and the pieces of all ranks are joined as the tree says: the same additions
whatever the ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from holdfast.core.errors import ConfigError
from holdfast.core.plan import PipelineBatching, Plan, Range, RankShard, ReplicaPlan, StagePlan
from holdfast.core.spec import DecoderSpec

MLP_SHARDS = 8
"""Virtual shards of an MLP's columns, and at least of the attention output where it has so many query heads: the
largest tensor-parallel degree."""
MOST_REPLICAS = 64
_SHARD_UNIT = 32
"""Columns that stay together where they can: quantized ones share a scale, and vectors are whole."""
_VOCAB_UNIT = 64
"""Rows of the vocabulary that stay together."""


# --- virtual shards ---


def head_shards(spec: DecoderSpec) -> tuple[int, ...]:
    """Ends of the virtual shards of the attention output, in query heads: those of one KV head each, and, with few KV
    heads, cut further, but not within 32 columns where quantized ones share a scale."""
    per_group = spec.num_heads // spec.num_kv_heads
    whole = per_group * spec.head_dim % _SHARD_UNIT == 0
    unit = _SHARD_UNIT // math.gcd(_SHARD_UNIT, spec.head_dim) if whole else 1
    cuts = min(-(-MLP_SHARDS // spec.num_kv_heads), per_group // unit)
    ends = [per_group // unit * (cut + 1) // cuts * unit for cut in range(cuts)]
    return tuple(group * per_group + end for group in range(spec.num_kv_heads) for end in ends)


def attention_shards(spec: DecoderSpec) -> tuple[int, ...]:
    """The same in columns; () for a single one."""
    ends = tuple(end * spec.head_dim for end in head_shards(spec))
    return ends if len(ends) > 1 else ()


def mlp_shards(columns: int) -> tuple[int, ...]:
    """Ends of the `MLP_SHARDS` virtual shards of F columns: even, in whole units of 32 when F is made of them; ()
    for a single one."""
    unit = _SHARD_UNIT if columns % _SHARD_UNIT == 0 else 1
    ends = sorted({columns // unit * (index + 1) // MLP_SHARDS * unit for index in range(MLP_SHARDS)} - {0})
    return tuple(ends) if len(ends) > 1 else ()


def num_mlp_shards(spec: DecoderSpec) -> int:
    """Of the layers without experts; as many as can be, when there are none."""
    if all(layer.moe for layer in spec.layers):
        return MLP_SHARDS
    return len(mlp_shards(spec.mlp_size)) or 1


def num_expert_shards(spec: DecoderSpec) -> int:
    return 0 if spec.moe is None else len(mlp_shards(spec.moe.expert_mlp_size)) or 1


def columns_of(shards: Range, ends: tuple[int, ...], columns: int) -> Range:
    """The columns of a range of the virtual shards that end at `ends`."""
    borders = (0, *(ends or (columns,)))
    return borders[shards[0]], borders[shards[1]]


# --- the tree ---


@dataclass(frozen=True, slots=True)
class Tree:
    """How the pieces of all ranks, in order, are joined."""

    pieces: tuple[tuple[Range, ...], ...]
    """Of each rank: ranges of virtual shards."""
    joins: tuple[int, ...]
    """After each piece, over all ranks: how often the two latest sums become one."""


def tree_of(ranges: Sequence[Range], total: int) -> Tree:
    """The tree over `total` virtual shards, of which each rank owns a range; together all, in order."""
    pieces = tuple(tuple(_pieces(owned, (0, total))) for owned in ranges)
    joins: list[int] = []
    _count_joins((0, total), {piece for some in pieces for piece in some}, joins)
    return Tree(pieces, tuple(joins))


def _halves(node: Range) -> tuple[Range, Range]:
    """To the left the largest power of two that leaves something to the right: a binary counter's tree."""
    middle = node[0] + (1 << (node[1] - node[0] - 1).bit_length() - 1)
    return (node[0], middle), (middle, node[1])


def _pieces(owned: Range, node: Range) -> Iterator[Range]:
    if owned[0] <= node[0] and node[1] <= owned[1]:
        yield node
    elif owned[0] < node[1] and node[0] < owned[1]:
        for half in _halves(node):
            yield from _pieces(owned, half)


def _count_joins(node: Range, pieces: set[Range], joins: list[int]) -> None:
    if node in pieces:
        joins.append(0)
        return
    for half in _halves(node):
        _count_joins(half, pieces, joins)
    joins[-1] += 1


# --- plans ---


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
    plan = Plan((ReplicaPlan(tuple(stages)),) * data, pipeline_batching)
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


# --- what a plan must be ---


def check_plan(plan: Plan, spec: DecoderSpec, name: str) -> None:
    """Raise `ConfigError`, which names what is wrong, unless the plan holds all of the model, cut where it can be."""
    if not 1 <= len(plan.replicas) <= MOST_REPLICAS:
        raise ConfigError(f"{name}: {len(plan.replicas)} replicas: must be at least 1 and at most {MOST_REPLICAS}")
    if not 0 <= plan.microbatches <= 64:
        raise ConfigError(f"{name}: microbatches {plan.microbatches}: must be at least 0 and at most 64")
    for number, replica in enumerate(plan.replicas):
        where = f"{name}: replica {number}"
        _cover([stage.layers for stage in replica.stages], spec.num_layers, f"{where}: layers")
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
    _cover([shard.query_heads for shard in stage.ranks], spec.num_heads, f"{where}: query_heads")
    _cover([shard.mlp_shards for shard in stage.ranks], num_mlp_shards(spec), f"{where}: mlp_shards")
    _cover([shard.vocab for shard in stage.ranks], spec.vocab_size, f"{where}: vocab")
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
    _check_experts(stage, spec, where)


def _check_experts(stage: StagePlan, spec: DecoderSpec, where: str) -> None:
    if spec.moe is None:
        for shard in stage.ranks:
            if shard.experts or shard.expert_shards != (0, 0):
                raise ConfigError(f"{where}: rank {shard.rank} has experts, the model has none")
        return
    for shard in stage.ranks:
        if not shard.experts:
            raise ConfigError(f"{where}: rank {shard.rank}: has no experts")
    groups = expert_groups(stage)
    owners = [expert for experts in groups for expert in experts]
    if sorted(owners) != list(range(spec.moe.num_experts)):
        raise ConfigError(
            f"{where}: experts {sorted(owners)}: each of {spec.moe.num_experts} must be in one group of ranks"
        )
    cuts = {tuple(shard.expert_shards for shard in shards) for shards in groups.values()}
    if len(cuts) > 1:
        raise ConfigError(f"{where}: expert_shards differ from group to group of ranks")
    _cover(cuts.pop(), num_expert_shards(spec), f"{where}: expert_shards")
    if spec.mlp_bias and len(stage.ranks) > 1:
        raise ConfigError(f"{where}: experts with biases cannot be held by several ranks")
    for shard in stage.ranks:
        if list(shard.experts) != sorted(set(shard.experts)):
            raise ConfigError(f"{where}: rank {shard.rank}: experts {list(shard.experts)} are not in ascending order")


def expert_groups(stage: StagePlan) -> dict[tuple[int, ...], list[RankShard]]:
    """Ranks that hold the same experts, by those."""
    groups: dict[tuple[int, ...], list[RankShard]] = {}
    for shard in stage.ranks:
        groups.setdefault(shard.experts, []).append(shard)
    return groups


def _cover(ranges: Sequence[Range], total: int, what: str) -> None:
    """That the ranges are 0 … total - 1, in order, none empty."""
    at = 0
    for first, last in ranges:
        if first != at or last <= first:
            raise ConfigError(f"{what} {first} to {last}: must begin at {at} and have one at least")
        at = last
    if at != total:
        raise ConfigError(f"{what} end at {at}: the model has {total}")
