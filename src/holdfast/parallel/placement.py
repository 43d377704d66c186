"""Which ranks of a stage compute which experts, layer by layer; and how to spread them by measured loads.

A stage's ranks fall into groups: the ranks of a group stand side by side and hold the same experts, each expert cut
over all of them. Of one layer, *owners* say who computes what: row r of a step, where it goes to expert e, is the
affair of group owners[e][r % len(owners[e])]. Whoever computes it, the numbers are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise, product

import msgspec

from holdfast.core.errors import ConfigError
from holdfast.core.plan import ExpertPlacement, Owners, Place, StagePlan
from holdfast.core.spec import DecoderSpec
from holdfast.parallel.shards import check_ranges, num_expert_shards

TURNS = 16
"""Shares of an expert that several groups hold are so many parts of its rows."""


def groups_of(stage: StagePlan) -> list[range]:
    """Of each group, the ranks' indices in the stage: a group begins with a rank that has the first shard."""
    begins = [index for index, shard in enumerate(stage.ranks) if index == 0 or shard.expert_shards[0] == 0]
    return [range(first, last) for first, last in pairwise([*begins, len(stage.ranks)])]


def group_of(place: Place) -> int:
    """The number of the group that a rank belongs to."""
    groups = groups_of(place.stage_plan)
    return next(number for number, group in enumerate(groups) if place.index in group)


def owners_of(stage: StagePlan, layer: int) -> Owners:
    """Of the experts of a layer: as the stage's placements say, or, for a layer they do not name, its ranks."""
    for placement in stage.placements:
        if placement.layer == layer:
            return placement.owners
    groups = [stage.ranks[group[0]] for group in groups_of(stage)]
    held = [(expert, number) for number, first in enumerate(groups) for expert in first.experts]
    return tuple((number,) for _, number in sorted(held))


def held_by(owners: Owners, group: int) -> tuple[int, ...]:
    """Ids, ascending, of the experts that a group holds."""
    return tuple(expert for expert, some in enumerate(owners) if group in some)


def experts_at(place: Place, layer: int) -> tuple[int, ...]:
    """Ids, ascending, of the experts of a layer that the rank at `place` holds."""
    return held_by(owners_of(place.stage_plan, layer), group_of(place))


def table_of(owners: Owners) -> list[list[int]]:
    """[TURNS][E]: the group that computes row r of expert e is [r % TURNS][e]."""
    return [[some[turn % len(some)] for some in owners] for turn in range(TURNS)]


# --- what a plan must say of experts ---


def check_experts(stage: StagePlan, spec: DecoderSpec, where: str) -> None:
    """Raise `ConfigError`, which names what is wrong, unless the stage holds all experts of each of its layers."""
    if spec.moe is None:
        for shard in stage.ranks:
            if shard.experts or shard.expert_shards != (0, 0):
                raise ConfigError(f"{where}: rank {shard.rank} has experts, the model has none")
        if stage.placements:
            raise ConfigError(f"{where}: places experts, the model has none")
        return
    _check_groups(stage, spec, where)
    if spec.mlp_bias and len(stage.ranks) > 1:
        raise ConfigError(f"{where}: experts with biases cannot be held by several ranks")
    for layer, count in Counter(placement.layer for placement in stage.placements).items():
        if count > 1:
            raise ConfigError(f"{where}: placements: layer {layer} is there {count} times")
    for placement in stage.placements:
        _check_placement(placement, stage, spec, f"{where}: placement of layer {placement.layer}")


def _check_groups(stage: StagePlan, spec: DecoderSpec, where: str) -> None:
    assert spec.moe is not None
    for shard in stage.ranks:
        rank = f"{where}: rank {shard.rank}"
        if not shard.experts:
            raise ConfigError(f"{rank}: has no experts")
        if list(shard.experts) != sorted(set(shard.experts)):
            raise ConfigError(f"{rank}: experts {list(shard.experts)} are not in ascending order")
    groups = [[stage.ranks[index] for index in group] for group in groups_of(stage)]
    for group in groups:
        if len({shard.experts for shard in group}) > 1:
            ranks = [shard.rank for shard in group]
            raise ConfigError(f"{where}: ranks {ranks} share experts by their expert_shards, but name different ones")
    owned = sorted(expert for group in groups for expert in group[0].experts)
    if owned != list(range(spec.moe.num_experts)):
        raise ConfigError(f"{where}: experts {owned}: each of {spec.moe.num_experts} must be in one group of ranks")
    cuts = {tuple(shard.expert_shards for shard in group) for group in groups}
    if len(cuts) > 1:
        raise ConfigError(f"{where}: expert_shards differ from group to group of ranks")
    check_ranges(cuts.pop(), num_expert_shards(spec), f"{where}: expert_shards")


def _check_placement(placement: ExpertPlacement, stage: StagePlan, spec: DecoderSpec, where: str) -> None:
    assert spec.moe is not None
    groups = len(groups_of(stage))
    if not stage.layers[0] <= placement.layer < stage.layers[1] or not spec.layers[placement.layer].moe:
        raise ConfigError(f"{where}: the stage has no such layer with experts")
    if len(placement.owners) != spec.moe.num_experts:
        raise ConfigError(f"{where}: has owners of {len(placement.owners)} experts, of {spec.moe.num_experts}")
    for expert, some in enumerate(placement.owners):
        if not some or TURNS % len(some):
            raise ConfigError(f"{where}: expert {expert}: {len(some)} turns, must be one of 1, 2, 4, 8, 16")
        if not all(0 <= group < groups for group in some):
            raise ConfigError(f"{where}: expert {expert}: owners {list(some)}, there are {groups} groups of ranks")
    for group in range(groups):
        if not held_by(placement.owners, group):
            raise ConfigError(f"{where}: group {group} of ranks has no experts")


# --- spreading load ---

_MOST_PASSES = 16
"""Of evening out shares: few are needed, and numbers too small to change a sum would go on for ever."""
Loads = Sequence[float]


def loads_of_groups(loads: Loads, owners: Owners, groups: int) -> list[float]:
    """What each group computes when expert e is chosen loads[e] times."""
    sums = [0.0] * groups
    for load, some in zip(loads, owners, strict=True):
        for group in some:
            sums[group] += load / len(some)
    return sums


def imbalance(sums: Sequence[float]) -> float:
    """The largest over the mean; 1 when there is nothing to share."""
    mean = sum(sums) / len(sums)
    return max(sums) / mean if mean else 1.0


def rebalance_stage(stage: StagePlan, loads: Mapping[int, Loads], redundant: int) -> StagePlan:
    """The stage with the experts of each layer spread by how often each was chosen, `loads` [E] by layer; a layer
    that would gain less than 5 % stays as it is. `redundant`: extra copies of experts, of each layer."""
    groups = len(groups_of(stage))
    placed = {placement.layer: placement for placement in stage.placements}
    for layer, chosen in loads.items():
        current = owners_of(stage, layer)
        before = imbalance(loads_of_groups(chosen, current, groups))
        if before < 1.05:
            continue
        target = rebalance(chosen, current, groups, redundant)
        if imbalance(loads_of_groups(chosen, target, groups)) < 0.95 * before:
            placed[layer] = ExpertPlacement(layer, target)
    return msgspec.structs.replace(stage, placements=tuple(placed[layer] for layer in sorted(placed)))


def rebalance(loads: Loads, current: Owners, groups: int, redundant: int) -> Owners:
    """Owners under which no group has much more than its share of the loads [E]; each holds one expert at least, and
    none many more than another. The hottest get `redundant` extra copies between them, experts are packed, heaviest
    first, onto the least loaded group, then the shares of those with several holders are evened out. Groups are
    named so that they keep what they hold of `current` as far as can be."""
    experts = len(loads)
    assert groups <= experts, (experts, groups)
    slots, copies = -(-(experts + redundant) // groups), [1] * experts
    for _ in range(redundant):
        hottest = max(range(experts), key=lambda e: (copies[e] < groups) * loads[e] / copies[e])
        copies[hottest] += copies[hottest] < groups
    held = _pack(loads, copies, groups, slots)
    holders = [[group for group in range(groups) if expert in held[group]] for expert in range(experts)]
    shares = _shares(loads, holders, groups)
    names = _names(held, current)
    return tuple(_turns({names[group]: turns for group, turns in some.items()}) for some in shares)


def _pack(loads: Loads, copies: Sequence[int], groups: int, slots: int) -> list[set[int]]:
    """Experts of each group: so many `copies` of each expert, no two in one group. A copy that finds no place is
    left out, unless it is the first."""
    held: list[set[int]] = [set() for _ in range(groups)]
    sums = [0.0] * groups
    parts = [(expert, number) for expert in range(len(loads)) for number in range(copies[expert])]
    firsts = len(loads)  # that have no place yet
    for expert, number in sorted(parts, key=lambda part: (-loads[part[0]] / copies[part[0]], *part)):
        room = [g for g in range(groups) if len(held[g]) < slots and expert not in held[g]]
        if number and (not room or groups * slots - sum(map(len, held)) <= firsts):
            continue
        firsts -= not number
        group = min(room, key=lambda g: (sums[g], len(held[g]), g))
        held[group].add(expert)
        sums[group] += loads[expert] / copies[expert]
    return held


def _shares(loads: Loads, holders: Sequence[Sequence[int]], groups: int) -> list[Counter[int]]:
    """Turns of each expert's holders, one at least. Turns go from whoever is loaded most to whoever is least, until
    that evens out nothing more."""
    shares = [Counter(dict.fromkeys(some, 1)) for some in holders]
    sums = [0.0] * groups
    for load, some, turns in zip(loads, holders, shares, strict=True):
        turns[some[0]] += TURNS - len(some)
        for group, count in turns.items():
            sums[group] += load * count / TURNS
    for _ in range(_MOST_PASSES):
        moved = False
        for load, turns in zip(loads, shares, strict=True):
            step = load / TURNS
            for _ in range(TURNS * len(turns)):
                more = [group for group, count in turns.items() if count > 1]
                most, least = max(more, key=lambda g: sums[g], default=-1), min(turns, key=lambda g: sums[g])
                if most < 0 or sums[most] - sums[least] <= step * 1.001:  # else a turn could go to and fro
                    break
                turns[most] -= 1
                turns[least] += 1
                sums[most] -= step
                sums[least] += step
                moved = True
        if not moved:
            break
    return shares


def _names(held: Sequence[set[int]], current: Owners) -> list[int]:
    """A group's number for each set of experts: whoever holds most of it already takes it."""
    groups = range(len(held))
    now = [set(held_by(current, group)) for group in groups]
    names: dict[int, int] = {}
    for new, old in sorted(product(groups, groups), key=lambda pair: -len(held[pair[0]] & now[pair[1]])):
        if new not in names and old not in names.values():
            names[new] = old
    return [names[new] for new in groups]


def _turns(shares: dict[int, int]) -> tuple[int, ...]:
    """The holders' numbers of turns as a sequence in which each comes as evenly as can be."""
    if len(shares) == 1:
        return tuple(shares)
    turns: list[int] = []
    taken = dict.fromkeys(shares, 0)
    for turn in range(1, TURNS + 1):
        group = max(sorted(shares), key=lambda g: shares[g] * turn / TURNS - taken[g])
        taken[group] += 1
        turns.append(group)
    length = next(n for n in (2, 4, 8, 16) if all(turns[i] == turns[i % n] for i in range(TURNS)))
    return tuple(turns[:length])
