"""Faults on demand, for `holdfast chaos` and tests: what cannot be done to a process from outside.

HOLDFAST_FAULTS names a folder. A file in it that is called like a worker ("0.0.1") holds one of

    error      its next step raises what a broken device raises
    gone       the same, and the device does not come back
    corrupt    keys and values of the requests it has are no numbers any more
    slow       its steps take ten times as long, as long as the file is there
    flip       a byte of its weights is another (on CPUs only)
    leak       it keeps more and more memory, 100 MB a second while it runs steps, as long as it keeps its place

`core.points` has what strikes at a point in the code.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from holdfast.core.errors import ConfigError, DeviceGone
from holdfast.core.points import VARIABLE, Points
from holdfast.core.wire import Step
from holdfast.models.layers import Weights
from holdfast.worker.runner import Runner
from holdfast.worker.weights import held_in, slices

_LEAK_BYTES = 10_000_000
_LEAK_SECONDS = 0.1
"""Between two of these."""
SLOWNESS = 10
_MOST_SECONDS = 0.5
"""That a slow step is made to wait: a step that is slow by itself, at the start, says nothing."""


class Faults:
    """Of one worker; without the variable there are none, and no file is looked for."""

    def __init__(self, rank: str) -> None:
        folder = os.environ.get(VARIABLE)
        self._file = Path(folder) / rank if folder else None
        self.points = Points(f"worker {rank}")
        self._kept: list[bytes] = []
        self._leaked: float | None = None
        """When it last did; None: it does not."""
        self._last = 0.0

    def before_step(self, runner: Runner, step: Step) -> None:
        """Raises `RuntimeError` when the device is to break, `DeviceGone` when it is to be lost."""
        if self._file is None:
            return
        self._reach(step)
        now, taken, self._last = time.monotonic(), time.monotonic() - self._last, time.monotonic()
        if self._leaked is not None and now - self._leaked > _LEAK_SECONDS:
            self._leaked = now
            self._kept.append(os.urandom(64) * (_LEAK_BYTES // 64))
        try:
            fault = self._file.read_text().strip()
        except FileNotFoundError:
            return
        if fault == "slow":
            time.sleep(min((SLOWNESS - 1) * taken, _MOST_SECONDS))
            self._last = now + min(taken, _MOST_SECONDS)
            return
        self._file.unlink(missing_ok=True)
        if fault == "leak":
            self._leaked = now
        if fault == "corrupt":
            for request in runner.requests:
                runner.pages.data[:, :, request.block_ids] = float("nan")
        if fault == "flip":
            flip(runner.decoder.weights)
        if fault == "error":
            raise RuntimeError("CUDA error: a device error that was asked for")
        if fault == "gone":
            raise DeviceGone("CUDA error: the loss of a device that was asked for")

    def _reach(self, step: Step) -> None:
        begun, going_on = step.num_tokens[: len(step.new)], step.num_tokens[len(step.new) :]
        for point, is_here in (
            ("prefill", any(count > 1 for count in begun)),
            ("chunk", any(count > 1 for count in going_on)),
            ("decode", 1 in going_on),
        ):
            if is_here:
                self.points.reach(point)


def flip(weights: Weights) -> None:
    """All bits of a byte in the middle of every layer's first matrix, on a CPU: one alone may change no token.
    Raises `ConfigError` on a GPU, of whose memory `slices` gives copies."""
    if weights.device.type != "cpu":
        raise ConfigError(f"{VARIABLE}: flip works on CPUs only, not on {weights.device.type}")
    for name, held in held_in(weights).items():
        if name.endswith(".qkv"):
            data = next(slices(held))
            data[len(data) // 2] ^= 0xFF
