"""How much faster one thing, a link, the memory or the arithmetic, would have to be for a plan to be as fast as the
best one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from holdfast.hardware.catalogue import Device, Link
from holdfast.planner.communication import Path
from holdfast.planner.estimate import Estimate, Question
from holdfast.planner.quantities import bytes_per_second, flops, of_seconds
from holdfast.planner.serving import Served, serve
from holdfast.planner.show.breakdown import Part, exchanges, replica_of, workload_of
from holdfast.planner.timing import Stage

MOST = 1000.0
"""Times faster; what needs more is no matter of this thing."""


def _memory(device: Device, factor: float) -> Device:
    return replace(device, memory_bandwidth=device.memory_bandwidth * factor)


def _arithmetic(device: Device, factor: float) -> Device:
    return replace(device, flops={name: rate * factor for name, rate in device.flops.items()})


def _path(path: Path | None, factor: float) -> Path | None:
    return path and replace(path, rate_low=path.rate_low * factor, rate_high=path.rate_high * factor)


_FASTER: Mapping[str, Callable[[Stage, float], Stage]] = MappingProxyType(
    {
        "memory": lambda stage, factor: replace(stage, device=_memory(stage.device, factor)),
        "arithmetic": lambda stage, factor: replace(stage, device=_arithmetic(stage.device, factor)),
        "all-reduces": lambda stage, factor: replace(stage, path=_path(stage.path, factor)),
        "gathered weights": lambda stage, factor: replace(stage, gather_path=_path(stage.gather_path, factor)),
        "all-to-alls": lambda stage, factor: replace(stage, dispatch_path=_path(stage.dispatch_path, factor)),
        "pipeline hops": lambda stage, factor: replace(stage, next_path=_path(stage.next_path, factor)),
    }
)


def request_time(served: Served, output_len: int) -> float:
    """Seconds from a request to its last token."""
    return served.ttft + served.tpot * (output_len - 1)


def faster_by(question: Question, some: Estimate, thing: str, factor: float) -> float:
    """Seconds of a whole request if `thing` (of `_FASTER`) were so many times faster, all else as it is."""
    replica, workload = replica_of(question, some), workload_of(question, some)
    stages = {id(stage): _FASTER[thing](stage, factor) for stage in replica.stages}
    faster = replace(replica, stages=tuple(stages[id(stage)] for stage in replica.stages))
    return request_time(serve(faster, workload), workload.output_len)


def needed(question: Question, some: Estimate, thing: str, target: float) -> float | None:
    """How many times faster `thing` must be for a request to take no longer than `target` seconds; None: no speed of
    it would do."""
    if faster_by(question, some, thing, MOST) > target:
        return None
    low, high = 1.0, MOST
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        slow = faster_by(question, some, thing, middle) > target
        low, high = (middle, high) if slow else (low, middle)
    return high


def what_it_takes(question: Question, some: Estimate, part: Part, target: float, *, reading: bool) -> str:
    """What would make `some` as fast as the target where it loses most, as a clause. `reading`: the part is bound by
    memory, not by arithmetic."""
    if part in ("scheduler", "layer overhead"):
        return "no device or link would change that"
    if part in ("all-reduces", "all-to-alls", "gathered weights", "pipeline hops"):
        return _faster_link(question, some, part, target)
    device = min((stage.device for stage in replica_of(question, some).stages), key=_rate(reading))
    thing = "memory" if reading else "arithmetic"
    factor = needed(question, some, thing, target)
    now = _rate(reading)(device)
    written = bytes_per_second if reading else flops
    if factor is None:
        return f"faster {thing} alone would not make it level"
    return f"as fast as the best at {written(now * factor)} of {thing} instead of {written(now)}"


def _rate(reading: bool) -> Callable[[Device], float]:
    def rate(device: Device) -> float:
        return device.memory_bandwidth if reading else max(device.flops.get("bf16", 0), device.flops.get("fp16", 0))

    return rate


def _faster_link(question: Question, some: Estimate, part: Part, target: float) -> str:
    mine = [exchange for exchange in exchanges(question, some) if exchange.what == part]
    slowest = min((exchange.link for exchange in mine), key=lambda link: link.bandwidth)
    factor = needed(question, some, part, target)
    if factor is not None:
        return f"needs a link of {_of_link(slowest, factor)} to be level with the best"
    left = faster_by(question, some, part, MOST) - target
    latency = sum(exchange.latency for exchange in mine)
    if latency * question.goal.output_len > left / 2:
        return f"their latency alone is {of_seconds(latency)} of a token: no bandwidth of this link would help"
    return f"even an endless bandwidth would leave a request {of_seconds(left)} behind the best"


def _of_link(link: Link, factor: float) -> str:
    return f"{bytes_per_second(link.bandwidth * factor)} per direction instead of {bytes_per_second(link.bandwidth)}"
