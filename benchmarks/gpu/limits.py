"""What the device can do at most, and how long things take on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from holdfast.core.spec import DecoderSpec
from holdfast.models.parameters import parameters

Seconds = float
FLUSHED = 256 << 20
"""Bytes written before each round: more than an L2 cache holds."""


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int = 20) -> Seconds:
    """Median of `rounds`, after three that do not count. On a GPU by its own clock, with nothing left in its caches,
    and with `work` already launched when its turn comes: while memory is written, the host gets ahead."""
    if device.type != "cuda":  # only to try the benchmark
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    for _ in range(3):
        work()
    waste = torch.empty(FLUSHED, dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in events:
        for _ in range(4):  # some 0.3 ms: longer than it takes to launch what is measured
            waste.zero_()
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return median(begin.elapsed_time(end) / 1000 for begin, end in events)


@dataclass(frozen=True)
class Roof:
    """Of one device, measured."""

    copy_bytes_per_second: float
    """Read and written."""
    bf16_flop_per_second: float

    def seconds(self, num_bytes: float, flop: float) -> Seconds:
        """Whichever takes longer."""
        return max(num_bytes / self.copy_bytes_per_second, flop / self.bf16_flop_per_second)


def measure(device: torch.device) -> Roof:
    """A copy of a gigabyte, and a large bf16 product by torch."""
    numbers, size = (1 << 30, 8192) if device.type == "cuda" else (1 << 22, 512)
    source = torch.zeros(numbers, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return Roof(
        2 * numbers / seconds_of(lambda: target.copy_(source), device),
        2 * size**3 / seconds_of(lambda: a @ b, device),
    )


@dataclass(frozen=True)
class Job:
    """`count` requests of `prompt` tokens, each to make `output`."""

    name: str
    count: int
    prompt: int
    output: int


@dataclass(frozen=True)
class Work:
    """What a model takes, as its weights are held."""

    layer_numbers: int
    """Of the matrices that every token goes through, but the head."""
    head_numbers: int
    weight_bytes: float
    """All of these."""
    kv_bytes: int
    """A token in the cache."""
    attention_flop: int
    """A token that looks at one."""

    @classmethod
    def of(cls, spec: DecoderSpec, *, fp8: bool) -> Work:
        """`fp8`: all but the head, a float32 scale for 128 numbers."""
        shapes = {name: p.shape for name, p in parameters(spec).items() if len(p.shape) == 2}
        head = torch.Size(shapes["head.weight"]).numel()
        layers = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith("layers."))
        per_number = 1 + 4 / 128 if fp8 else 2
        kv = 2 * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
        return cls(
            layers, head, layers * per_number + 2 * head, kv, 4 * spec.num_layers * spec.num_heads * spec.head_dim
        )

    def prefill(self, roof: Roof, tokens: int) -> Seconds:
        """One prompt, at least."""
        flop = 2 * tokens * self.layer_numbers + 2 * self.head_numbers + self.attention_flop * tokens**2 / 2
        return roof.seconds(self.weight_bytes, flop)

    def decode(self, roof: Roof, requests: int, context: float) -> Seconds:
        """One step, at least: weights and contexts are read once. FLOP at the bf16 rate, whatever the weights."""
        flop = requests * (2 * (self.layer_numbers + self.head_numbers) + self.attention_flop * context)
        return roof.seconds(self.weight_bytes + requests * context * self.kv_bytes, flop)


def facts(device: torch.device) -> dict[str, object]:
    found: dict[str, object] = {"device": str(device), "torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return found
