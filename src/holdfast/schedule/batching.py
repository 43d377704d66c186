"""Which of the running requests a step may take. With one stage: all of them. With a pipeline of several, as many
steps are in flight, and how requests are dealt to them is its batching mode; what happens to a request in a step
is the scheduler's.

A request whose next token is still being sampled is not ready: the first stage would not know what to compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from holdfast.core.plan import PipelineBatching
from holdfast.schedule.sequence import Sequence as Request


class Batching(Protocol):
    """`num_lanes`: steps that may be in flight."""

    num_lanes: int
    lane: int
    """Of the step that was picked last."""

    def pick(
        self, running: Sequence[Request], num_waiting: int, in_flight: Iterable[int]
    ) -> tuple[list[Request], int]:
        """Those of `running` that the next step may take, and how many others it may let in. `in_flight`: the
        lanes of the steps that are."""
        ...

    def let_in(self, request: Request) -> None:
        """It has been let in by the step that was picked last."""
        ...


class AllAtOnce:
    """One stage. Steps that are in flight together differ in their tokens, not in their requests."""

    lane = 0

    def __init__(self, num_lanes: int, most: int) -> None:
        self.num_lanes, self.most = num_lanes, most

    def pick(
        self, running: Sequence[Request], num_waiting: int, in_flight: Iterable[int]
    ) -> tuple[list[Request], int]:
        return list(running), self.most - len(running)

    def let_in(self, request: Request) -> None:
        pass


class Asynchronous:
    """Every step is composed anew of what is ready, its even share of all requests. One in mid-prompt has its next
    tokens computed while earlier ones are in flight, but only in a place that nobody else can take."""

    lane = 0

    def __init__(self, num_lanes: int, most: int) -> None:
        self.num_lanes, self.most = num_lanes, most

    def pick(
        self, running: Sequence[Request], num_waiting: int, in_flight: Iterable[int]
    ) -> tuple[list[Request], int]:
        share = -(-min(len(running) + num_waiting, self.most) // self.num_lanes)
        known = sorted((r for r in running if not r.num_pending), key=lambda r: (r.num_missing > 1, r.rank))
        ready = [r for r in known if r.num_scheduled == r.num_computed][:share]
        room = min(share - len(ready), self.most - len(running), num_waiting)
        again = [r for r in known if r.num_scheduled > r.num_computed]
        return ready + again[: share - len(ready) - room], room

    def let_in(self, request: Request) -> None:
        pass


class Hybrid:
    """A request stays in the lane that was the emptiest when it came. Lanes take turns; one whose step is in
    flight has to wait for it."""

    def __init__(self, num_lanes: int, most: int) -> None:
        self.num_lanes, self.most = num_lanes, most
        self.lane = num_lanes - 1
        self._lanes: dict[Request, int] = {}

    def pick(
        self, running: Sequence[Request], num_waiting: int, in_flight: Iterable[int]
    ) -> tuple[list[Request], int]:
        self._lanes = {request: self._lanes[request] for request in running}  # the others have left
        busy, share = set(in_flight), -(-min(len(running) + num_waiting, self.most) // self.num_lanes)
        for turn in range(1, self.num_lanes + 1):
            lane = (self.lane + turn) % self.num_lanes
            mine = [request for request in running if self._lanes[request] == lane]
            room = max(min(share - len(mine), num_waiting, self.most - len(running)), 0)
            if lane not in busy and (mine or room):
                self.lane = lane
                return mine, room
        return [], 0

    def let_in(self, request: Request) -> None:
        self._lanes[request] = self.lane


class Synchronous:
    """All requests are dealt to as many steps as there are lanes; when all of these are done, all are dealt again."""

    lane = 0

    def __init__(self, num_lanes: int, most: int) -> None:
        self.num_lanes, self.most = num_lanes, most
        self._left: list[list[Request]] = []
        self._room: list[int] = []

    def pick(
        self, running: Sequence[Request], num_waiting: int, in_flight: Iterable[int]
    ) -> tuple[list[Request], int]:
        there = set(running)
        while self._left:
            mine, room = [r for r in self._left.pop(0) if r in there], self._room.pop(0)
            if mine or room:
                return mine, min(room, self.most - len(running))
        if any(True for _ in in_flight):
            return [], 0
        total = min(len(running) + num_waiting, self.most)
        share = -(-total // self.num_lanes)
        ordered = sorted(running, key=lambda r: r.rank)
        self._left = [ordered[at : at + share] for at in range(0, total, share)] if total else []
        self._room = [share - len(mine) for mine in self._left]
        return self.pick(running, num_waiting, in_flight) if self._left else ([], 0)

    def let_in(self, request: Request) -> None:
        pass


def batching_of(mode: PipelineBatching, num_stages: int, num_lanes: int, most: int) -> Batching:
    """For a replica of so many stages, with up to `num_lanes` steps in flight and `most` requests running."""
    if num_stages == 1:
        return AllAtOnce(num_lanes, most)
    modes: dict[PipelineBatching, type[Asynchronous | Hybrid | Synchronous]] = {
        "asynchronous": Asynchronous,
        "hybrid": Hybrid,
        "synchronous": Synchronous,
    }
    return modes[mode](num_lanes, most)
