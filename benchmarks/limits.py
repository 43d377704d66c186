"""What this machine can do at most: the rates every benchmark is compared with.

python benchmarks/limits.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from holdfast.core.plan import places
from holdfast.core.spec import DecoderSpec
from holdfast.models.parameters import parameters, weight_bytes
from holdfast.parallel.cuts import make_plan


@dataclass(frozen=True)
class Limits:
    """Measured, with torch, on as many threads as torch uses."""

    read_bytes_per_second: float
    bf16_flop_per_second: float

    def decode_rate(self, spec: DecoderSpec, dtype: torch.dtype, streams: int) -> float:
        """Tokens/s that `streams` decodes at a time cannot exceed: a step reads all weights once and multiplies them
        with each stream's row, whichever takes longer. KV reads are left out: small at these lengths."""
        matrices = [p.shape for p in parameters(spec).values() if len(p.shape) == 2]
        flop = 2 * streams * sum(torch.Size(shape).numel() for shape in matrices)
        whole = places(make_plan(spec).replicas[0])[0]
        read = weight_bytes(spec, dtype.itemsize, whole) / self.read_bytes_per_second
        seconds = max(read, flop / self.bf16_flop_per_second)
        return streams / seconds


def _best_seconds(work: Callable[[], object], rounds: int = 7) -> float:
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_limits() -> Limits:
    """Read rate over 512 MB, and the rate of a square bf16 matrix product; the best of 7 each."""
    data = torch.ones(512_000_000 // 4)
    seconds = _best_seconds(data.sum)
    size = 2048
    a, b = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
    return Limits(data.numel() * 4 / seconds, 2 * size**3 / _best_seconds(lambda: a @ b))


if __name__ == "__main__":
    for name, value in asdict(measure_limits()).items():
        print(f"{name} {value / 1e9:.1f} G")
