"""Whether a replica stands still. Pure: what its ranks have counted and the time in, an answer out."""

from __future__ import annotations

from collections.abc import Sequence

LOOK_SECONDS = 0.1
"""Between two looks at a replica that is busy."""
FLOOR_SECONDS = 1.5
"""No replica that has moved within this time stands still, where every piece of an operation is a move."""
STEP_FLOOR_SECONDS = 10.0
"""The same where only steps are: one may have a kernel compiled."""
SLACK = 8.0
"""Times the longest stretch without a move so far: it may have been a lucky one."""
ENOUGH_STEPS = 10
"""Before their times say anything about the next, where only steps are moves."""


class HangWatch:
    """Of one replica. Its ranks count what they do (`parallel.segment.RankTally.moves`); when none of them has
    counted on for much longer than ever before, with a step in flight, one of them hangs, and the others wait for it.
    `most`: seconds that are too long in any case. `by_step`: nothing is counted within a step."""

    def __init__(self, most: float, *, by_step: bool = False) -> None:
        self._most = most
        self._floor, self._enough = (STEP_FLOOR_SECONDS, ENOUGH_STEPS) if by_step else (FLOOR_SECONDS, 0)
        self._moves: Sequence[int] = ()
        self._moved_at = 0.0
        self._looked_at = 0.0
        self._longest = 0.0
        self._num_moves = 0

    def look(self, moves: Sequence[int], now: float, *, busy: bool) -> bool:
        """Whether it hangs. `moves`: the ranks' counts, now; `busy`: whether a step is in flight."""
        late = now - self._looked_at > 5 * LOOK_SECONDS  # we stood still ourselves: perhaps everything did
        self._looked_at = now
        if not busy or late or moves != self._moves:
            if busy and not late:
                self._longest = max(self._longest, now - self._moved_at)
                self._num_moves += 1
            self._moves, self._moved_at = moves, now
            return False
        return now - self._moved_at > self.deadline

    @property
    def deadline(self) -> float:
        """Seconds without a move that are too many."""
        if self._num_moves < self._enough:
            return self._most
        return min(self._most, max(self._floor, SLACK * self._longest))
