"""Where experts are: spread by load, and what a plan may say of them."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import spec

from holdfast.core.errors import ConfigError
from holdfast.core.plan import ExpertPlacement, Plan, StagePlan
from holdfast.parallel.cuts import check_plan, make_plan
from holdfast.parallel.placement import (
    TURNS,
    groups_of,
    held_by,
    imbalance,
    loads_of_groups,
    owners_of,
    rebalance,
    rebalance_stage,
    table_of,
)


def stage_of(experts: int, groups: int, ranks: int) -> StagePlan:
    plan = make_plan(spec(layers=2, experts=experts), tensor=ranks, expert=groups)
    return plan.replicas[0].stages[0]


def zipf(experts: int, seed: int, exponent: float = 1.0) -> list[float]:
    """Loads of experts in an order of their own."""
    ranks = np.random.default_rng(seed).permutation(experts) + 1
    return [float(load) for load in (1000 / ranks**exponent).round()]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_whatever_the_load_every_expert_is_held_and_no_group_is_too_full(data: st.DataObject):
    groups = data.draw(st.integers(1, 8))
    experts = data.draw(st.integers(groups, 40))
    redundant = data.draw(st.integers(0, (groups - 1) * experts))
    loads = data.draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))
    current = tuple((expert * groups // experts,) for expert in range(experts))
    owners = rebalance(loads, current, groups, redundant)
    held = [held_by(owners, group) for group in range(groups)]
    assert all(1 <= len(some) <= -(-(experts + redundant) // groups) for some in held)
    assert sum(map(len, held)) <= experts + redundant
    assert {expert for some in held for expert in some} == set(range(experts))
    assert all(TURNS % len(some) == 0 for some in owners)
    assert sum(loads_of_groups(loads, owners, groups)) == pytest.approx(sum(loads))
    stage = msgspec.structs.replace(
        stage_of(experts, groups, groups), placements=(ExpertPlacement(0, owners), ExpertPlacement(1, owners))
    )
    plan = make_plan(spec(layers=2, experts=experts), tensor=groups, expert=groups)
    replica = msgspec.structs.replace(plan.replicas[0], stages=(stage,))
    check_plan(Plan((replica,)), spec(layers=2, experts=experts), "plan")


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("experts", "groups", "redundant"), [(16, 4, 4), (16, 8, 8), (64, 8, 8), (256, 8, 32)])
def test_zipf_loads_come_out_even(experts: int, groups: int, redundant: int, seed: int):
    loads = zipf(experts, seed)
    stage = stage_of(experts, groups, groups)
    before = imbalance(loads_of_groups(loads, owners_of(stage, 0), groups))
    after = imbalance(loads_of_groups(loads, owners_of(rebalance_stage(stage, {0: loads}, redundant), 0), groups))
    assert after <= 1.1
    assert before > 1.2


def test_without_redundant_experts_they_are_packed():
    loads = [8.0, 7, 6, 5, 4, 3, 2, 1]
    owners = rebalance(loads, tuple((e // 4,) for e in range(8)), groups=2, redundant=0)
    assert imbalance(loads_of_groups(loads, owners, 2)) == 1.0
    assert all(len(some) == 1 for some in owners)


def test_groups_keep_what_they_hold():
    loads = [1.0] * 8
    current = tuple((1 - e // 4,) for e in range(8))
    stage = stage_of(8, 2, 2)
    assert rebalance_stage(stage, {0: loads}, 0) == stage
    moved = rebalance([9.0, 1, 1, 1, 3, 3, 3, 3], current, groups=2, redundant=0)
    kept = sum(a == b for a, b in zip(moved, current, strict=True))
    assert kept >= 4


def test_turns_share_rows_as_said():
    owners = ((0,), (0, 1), (1, 0, 1, 1))
    table = np.array(table_of(owners))
    assert table.shape == (TURNS, 3)
    assert [(table[:, e] == 1).mean() for e in range(3)] == [0.0, 0.5, 0.75]


def test_groups_are_ranks_side_by_side():
    assert groups_of(stage_of(16, 2, 8)) == [range(4), range(4, 8)]


@pytest.mark.parametrize(
    ("placements", "complaint"),
    [
        ([(0, ((0,),) * 7)], "has owners of 7 experts, of 8"),
        ([(5, ((0,),) * 8)], "the stage has no such layer with experts"),
        ([(0, ((0,), (1,)) * 4), (0, ((0,), (1,)) * 4)], "layer 0 is there 2 times"),
        ([(0, ((0,),) * 8)], "group 1 of ranks has no experts"),
        ([(0, ((0, 1, 1),) + ((0,),) * 7)], "expert 0: 3 turns, must be one of 1, 2, 4, 8, 16"),
        ([(0, ((),) + ((0,),) * 7)], "expert 0: 0 turns"),
        ([(1, ((2,),) + ((0,),) * 7)], "expert 0: owners [2], there are 2 groups of ranks"),
    ],
)
def test_bad_placements_are_refused_by_name(placements: list[tuple[int, object]], complaint: str):
    model = spec(layers=2, experts=8)
    plan = make_plan(model, tensor=2, expert=2)
    stage = plan.replicas[0].stages[0]
    named = tuple(ExpertPlacement(layer, owners) for layer, owners in placements)  # type: ignore[arg-type]
    broken = msgspec.structs.replace(stage, placements=named)
    replica = msgspec.structs.replace(plan.replicas[0], stages=(broken,))
    with pytest.raises(ConfigError) as refused:
        check_plan(Plan((replica,)), model, "plan")
    assert complaint in str(refused.value)


def test_loads_of_any_size_are_spread_in_the_end():
    """Numbers that change no sum, as loads of long ago do, once went to and fro for ever."""
    loads = [1e5, 1e-300, 3.0, 1e-12, 1e5, 7e-200, 0.0, 2e4]
    owners = rebalance(loads, tuple((e % 5,) for e in range(8)), groups=5, redundant=12)
    assert imbalance(loads_of_groups(loads, owners, 5)) < 1.3
