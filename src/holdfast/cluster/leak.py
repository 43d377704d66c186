"""Whether a worker's memory grows without end. Pure: what it has and the time in, an answer out."""

from __future__ import annotations

import statistics
from collections import deque
from itertools import combinations, pairwise
from pathlib import Path

SAMPLES = 20
"""In a window."""
SLACK = 100_000_000
"""Bytes more than expected that are nothing to speak of."""


class LeakWatch:
    """Of one process. It leaks when it has more than it was to have, and over a window of `seconds` what it has at
    the least in each quarter rises from quarter to quarter. `expected`: bytes it may come to have."""

    def __init__(self, expected: int, seconds: float) -> None:
        self.expected = expected
        self._every = seconds / SAMPLES
        self._samples: deque[tuple[float, int]] = deque(maxlen=SAMPLES)

    def is_due(self, now: float) -> bool:
        """Whether it is time for a sample."""
        return not self._samples or now - self._samples[-1][0] >= self._every

    def look(self, has: int, now: float) -> float | None:
        """Bytes a second by which it grows, if it leaks: the median slope between any two samples (Theil and Sen)."""
        self._samples.append((now, has))
        if len(self._samples) < SAMPLES or has < self.expected + SLACK:
            return None
        amounts = [amount for _, amount in self._samples]
        quarter = SAMPLES // 4
        least = [min(amounts[start : start + quarter]) for start in range(0, SAMPLES, quarter)]
        if any(later <= earlier for earlier, later in pairwise(least)):
            return None
        return statistics.median(
            (later - earlier) / (after - before)
            for (before, earlier), (after, later) in combinations(self._samples, 2)
            if after > before
        )


def private_memory(pid: int) -> int:
    """Bytes that only this process has (Linux: RssAnon); 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
