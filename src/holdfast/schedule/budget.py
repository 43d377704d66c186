"""How many tokens a step may have: fewer for a while after one that was too large for the device's memory."""

from __future__ import annotations

RECOVERY_STEPS = 100
"""Steps after which those that had to be made smaller may be twice as large."""


class StepBudget:
    """`tokens` now, `most` at best."""

    def __init__(self, most: int) -> None:
        self.tokens = self._most = most
        self._good_steps = 0

    def went_well(self) -> None:
        """A step is done."""
        self._good_steps += 1
        if self._good_steps % RECOVERY_STEPS == 0:
            self.tokens = min(2 * self.tokens, self._most)

    def was_too_large(self, tokens: int) -> None:
        """A step of so many found no memory."""
        self.tokens, self._good_steps = max(1, min(self.tokens, tokens) // 2), 0
