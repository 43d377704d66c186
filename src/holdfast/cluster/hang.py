"""Whether a replica stands still. Pure: what its ranks have counted and the time in, an answer out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

LOOK_SECONDS = 0.1
"""Between two looks at a replica that is busy."""
FLOOR_SECONDS = 1.5
"""No replica that has moved within this time stands still, where every piece of an operation is a move."""
STEP_FLOOR_SECONDS = 10.0
"""The same where only steps are: one may have a kernel compiled."""
SLACK = 8.0
"""Times the longest stretch without a move of late: it may have been a lucky one."""
REMEMBERED = 64
"""Stretches, the latest: 6 s of work where looks find a move each time, longer where steps are slow. What was once
slow (a neighbour took the cores for a second) must not hide a hang for ever."""
ENOUGH_STEPS = 10
"""Before their times say anything about the next, where only steps are moves."""


class HangWatch:
    """Of one replica. Its ranks count what they do (`parallel.segment.RankTally.moves`); when none of them has
    counted on for much longer than of late, with a step in flight, one of them hangs, and the others wait for it.
    `most`: seconds that are too long in any case. `by_step`: nothing is counted within a step."""

    def __init__(self, most: float, *, by_step: bool = False) -> None:
        self._most = most
        self._floor, self._enough = (STEP_FLOOR_SECONDS, ENOUGH_STEPS) if by_step else (FLOOR_SECONDS, 0)
        self._moves: Sequence[int] = ()
        self._moved_at = 0.0
        self._looked_at = 0.0
        self._stretches: deque[float] = deque(maxlen=REMEMBERED)
        """Seconds from one look that found a move to the next, while busy."""

    def look(self, moves: Sequence[int], now: float, *, busy: bool) -> bool:
        """Whether it hangs. `moves`: the ranks' counts, now; `busy`: whether a step is in flight."""
        late = now - self._looked_at > 5 * LOOK_SECONDS  # we stood still ourselves: perhaps everything did
        self._looked_at = now
        if not busy or late or moves != self._moves:
            if busy and not late:
                self._stretches.append(now - self._moved_at)
            self._moves, self._moved_at = moves, now
            return False
        return now - self._moved_at > self.deadline

    @property
    def deadline(self) -> float:
        """Seconds without a move that are too many."""
        if len(self._stretches) < self._enough:
            return self._most
        return min(self._most, max(self._floor, SLACK * max(self._stretches, default=0.0)))
