"""What the device can do at most, and how long things take on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

Seconds = float


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int = 20) -> Seconds:
    """Median of `rounds`, after three that do not count. On a GPU by its own clock."""
    for _ in range(3):
        work()
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    return median(times)


def measure(device: torch.device) -> dict[str, float]:
    """Bytes per second of a copy (read and written), and FLOP per second of a large bf16 product."""
    numbers, size = (1 << 30, 8192) if device.type == "cuda" else (1 << 22, 512)
    source = torch.empty(numbers, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return {
        "copy_bytes_per_second": 2 * numbers / seconds_of(lambda: target.copy_(source), device),
        "bf16_flop_per_second": 2 * size**3 / seconds_of(lambda: a @ b, device),
    }


def facts(device: torch.device) -> dict[str, object]:
    found: dict[str, object] = {"device": str(device), "torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"name": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
    return found
