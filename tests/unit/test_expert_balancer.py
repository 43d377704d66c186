"""When experts are moved, and what becomes of a move."""

from __future__ import annotations

from concurrent.futures import Executor, Future

import numpy as np
from test_shards import spec

from holdfast.cluster.experts import ExpertBalancer
from holdfast.core import wire
from holdfast.core.plan import places
from holdfast.parallel.cuts import make_plan
from holdfast.parallel.placement import experts_at

MODEL = spec(layers=4, experts=8)
HOT = np.array([9, 9, 1, 1, 1, 1, 1, 1])
"""Of each layer's experts: 0 and 1 share a group in an even plan."""


class Counts:
    """What ranks have counted so far, of two stages with two layers each."""

    def __init__(self) -> None:
        self.stages = [np.zeros((2, 8), np.int64) for _ in range(2)]

    def __call__(self, stage: int) -> list[list[int]]:
        return self.stages[stage].tolist()


def balancer(counts: Counts, *, expert: int = 2, interval: int = 3) -> ExpertBalancer:
    replica = make_plan(MODEL, tensor=2, pipeline=2, expert=expert).replicas[0]
    return ExpertBalancer(MODEL, replica, interval, 0, counts, planner=AtOnce())


class AtOnce(Executor):
    """Does it before it says that it will."""

    def submit(self, body, /, *args, **options):
        done: Future[object] = Future()
        done.set_result(body(*args, **options))
        return done


def run_steps(of: ExpertBalancer, count: int) -> list[object]:
    """What each look after a step says."""
    said = []
    for _ in range(count):
        of.step_done()
        of.look()  # the planner is asked
        said.append(of.look())
    return said


def ready(rank: int, error: str = "") -> wire.ExpertsLoaded:
    return wire.ExpertsLoaded(f"0.{rank // 2}.{rank % 2}", 1, error)


def test_a_skewed_load_is_spread_when_all_are_ready():
    counts = Counts()
    of = balancer(counts)
    counts.stages = [HOT + stage for stage in counts.stages]
    *early, moved = run_steps(of, 3)
    assert early == [None, None]
    assert isinstance(moved, wire.PlaceExperts)
    before = of.plan
    assert [of.loaded(ready(rank)) for rank in range(3)] == [None] * 3
    assert of.plan is before
    assert isinstance(of.loaded(ready(3)), wire.UseExperts)
    assert tuple(stage.placements for stage in of.plan.stages) == moved.stages
    for place in places(of.plan):
        for layer in range(*place.layers):
            assert not {0, 1} <= set(experts_at(place, layer)), "the hot ones are apart"


def test_nobody_changes_over_when_one_cannot():
    counts = Counts()
    of = balancer(counts)
    counts.stages[1] += HOT
    before = of.plan
    assert isinstance(run_steps(of, 3)[-1], wire.PlaceExperts)
    assert [of.loaded(ready(rank, "disk" * (rank == 1))) for rank in range(3)] == [None] * 3
    assert isinstance(of.loaded(ready(3)), wire.DropExperts)
    assert of.plan is before


def test_one_move_at_a_time():
    counts = Counts()
    of = balancer(counts)
    counts.stages[0] += HOT
    assert isinstance(run_steps(of, 3)[-1], wire.PlaceExperts)
    counts.stages[0] += HOT
    assert run_steps(of, 10) == [None] * 10
    for rank in range(4):
        of.loaded(ready(rank))
    counts.stages[0][:, list(experts_at(places(of.plan)[0], 0))] += 100
    assert isinstance(run_steps(of, 1)[-1], wire.PlaceExperts)


def test_what_is_long_ago_counts_less():
    counts = Counts()
    of = balancer(counts)
    counts.stages[0] += 100  # even
    assert run_steps(of, 3) == [None] * 3
    counts.stages[0] += HOT
    assert run_steps(of, 3) == [None] * 3
    for _ in range(10):
        counts.stages[0] += HOT
        if run_steps(of, 3)[-1] is not None:
            return
    raise AssertionError("never moved")


def test_an_even_load_an_idle_replica_and_a_single_group_stay_as_they_are():
    counts = Counts()
    assert run_steps(balancer(counts), 9) == [None] * 9
    alone = balancer(counts, expert=1)
    counts.stages[0] += HOT
    assert run_steps(alone, 9) == [None] * 9


def test_a_move_that_fails_is_tried_again_later_and_later():
    counts = Counts()
    of = balancer(counts)
    waits = []
    for _ in range(4):
        wait, moved = 0, None
        while moved is None:
            counts.stages[0] += HOT
            (moved,) = run_steps(of, 1)
            wait += 1
        waits.append(wait)
        for rank in range(4):
            of.loaded(ready(rank, "disk"))
    assert waits == [3, 3, 6, 12]
