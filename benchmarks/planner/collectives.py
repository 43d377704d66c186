"""Measured collectives: fit of the paths in `holdfast/planner/collectives.csv`, and how well they predict.

Two steps. First, all that was measured of one kind of device is explained by few numbers: what a hop and a launch
cost with each software, the rate of the wire for each number of ranks. Then each path of its own is fitted, drawn
towards the first so that one with a handful of rows stays near it.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path as File

import numpy as np
from scipy.optimize import least_squares

from holdfast.hardware.catalogue import find_device
from holdfast.planner.communication import Path, wire_bytes
from holdfast.planner.rows.questions import collective_of

NAMES = ("software", "device", "nodes", "ranks", "operation")
SOFTWARES = ("nccl", "vllm", "vllm-eager", "trtllm")
"""Those measured on the same machines, which share a wire. `torch` was measured elsewhere."""
LAUNCH_US = {"nccl": 7, "vllm": 4, "vllm-eager": 20, "trtllm": 4, "torch": 25}


@dataclass(frozen=True)
class Point:
    key: tuple
    """As in `measured_paths`."""
    wire: float
    """kB that each rank sends."""
    time: float
    """Microseconds."""


def points_of(rows: list[dict[str, str]]) -> list[Point]:
    """The measurements of rows in the columns of `measured_collectives.csv`."""
    points = []
    for row in rows:
        asked = collective_of(row)
        if row["latency_us"]:
            wire = wire_bytes(asked.operation, asked.ranks, asked.message)
            points.append(Point(asked.key, wire / 1e3, float(row["latency_us"])))
    return points


def _time(lines: np.ndarray, wire: float) -> float:
    """Of a path given as logarithms of µs and GB/s (kB/µs)."""
    return Path(*np.exp(lines)).time(wire)


def _hops(operation: str, ranks: int, software: str) -> float:
    if operation == "all_reduce":
        return 2 * (ranks - 1) if software == "nccl" else (ranks - 1) / 2  # peer-memory kernels wait once or twice
    return (ranks - 1) * (0.6 if operation == "all_to_all" else 1)


class Shared:
    """The few numbers of one kind of device: rate by ranks, what other operations than all-reduce get of it, and
    per software launch, hop, share of the rate by the low protocol, wait and hop of the high one."""

    def __init__(self, device: str, numbers: np.ndarray | None = None) -> None:
        self.ranks = (2, 4, 8)
        found = find_device(device)
        if numbers is None:
            link = (found.scale_up or found.pcie).bandwidth / 1e9
            slow = found.scale_up is None
            start = [link * 0.7, link * (0.2 if slow else 0.7), link * (0.1 if slow else 0.8), 1]
            for software in SOFTWARES:
                start += [LAUNCH_US[software], 0.8, 0.4, 10, 1]
            numbers = np.log(start)
        self.numbers = numbers

    def lines(self, key: tuple) -> np.ndarray:
        software, _, _, ranks, operation = key
        values = np.exp(self.numbers)
        rate = values[self.ranks.index(min(self.ranks, key=lambda known: abs(known - ranks)))]
        rate *= 1 if operation == "all_reduce" else values[3]
        launch, hop, low, wait, hop_high = values[4 + 5 * SOFTWARES.index(software) :][:5]
        count = _hops(operation, ranks, software)
        return np.log([launch + hop * count, low * rate, launch + wait + hop_high * count, rate])

    @classmethod
    def fit(cls, device: str, points: list[Point]) -> Shared:
        start = cls(device).numbers

        def errors(numbers: np.ndarray) -> np.ndarray:
            shared = cls(device, numbers)
            off = [np.log(_time(shared.lines(point.key), point.wire) / point.time) for point in points]
            return np.concatenate([off, 0.03 * (numbers - start)])

        return cls(device, least_squares(errors, start, loss="soft_l1", f_scale=0.1, max_nfev=60).x)


MOST_RATE = 1.1
"""Of the link: NVSwitches that add up on the way make an all-reduce a little faster than its bytes need."""
NETWORK_GB = 50.0
"""Per rank and direction: InfiniBand NDR."""


def _fit_lines(points: list[Point], start: np.ndarray, pull: float, scale: float, link: float) -> np.ndarray:
    """Logarithms of latency and rate of the low protocol and of the high one. No rate is above what the wire carries,
    and the high protocol starts no sooner than the low one."""
    most = np.log(link * MOST_RATE)

    def lines_of(numbers: np.ndarray) -> np.ndarray:
        latency, rate, wait, high = numbers
        return np.array([latency, rate, np.logaddexp(latency, wait), high])

    def errors(numbers: np.ndarray) -> np.ndarray:
        lines = lines_of(numbers)
        off = [np.log(_time(lines, point.wire) / point.time) for point in points]
        return np.concatenate([off, pull * (numbers - begin)])

    wait = np.log(max(np.exp(start[2]) - np.exp(start[0]), 0.05 * np.exp(start[0])))
    begin = np.array([start[0], min(start[1], most - 0.01), wait, min(start[3], most - 0.01)])
    bounds = ([-np.inf] * 4, [np.inf, most, np.inf, most])
    found = least_squares(errors, begin, bounds=bounds, loss="soft_l1", f_scale=scale, max_nfev=100).x
    return lines_of(found)


def _wire(device: str, nodes: int, software: str, ranks: int) -> float:
    """GB/s of what the ranks have between them at most."""
    found = find_device(device)
    if nodes > 1:
        # All cards of a node may work for one rank that is alone on it.
        return NETWORK_GB * max(1, 8 * nodes // ranks) if software == "torch" else NETWORK_GB * 8
    return (found.scale_up or found.pcie).bandwidth / 1e9


def fit(points: list[Point]) -> dict[tuple, Path]:
    """Paths by key, µs and GB/s."""
    by_device, by_group, by_key = defaultdict(list), defaultdict(list), defaultdict(list)
    for point in points:
        software, device, nodes, _, _ = point.key
        by_key[point.key].append(point)
        (by_device[device] if software in SOFTWARES and nodes == 1 else by_group[software, device, nodes]).append(
            point
        )
    shared = {device: Shared.fit(device, part) for device, part in by_device.items()}
    grouped = {}
    for (software, device, nodes), part in by_group.items():
        link = find_device(device)
        rate = (link.scale_up or link.pcie).bandwidth / 1e9 if nodes == 1 else 20
        launch = LAUNCH_US.get(software, 25)
        start = np.log([launch, rate * 0.3, launch + 8, rate * 0.75])
        grouped[software, device, nodes] = _fit_lines(part, start, 0.02, 0.05, _wire(device, nodes, software, 2))
    paths = {}
    keys = set(by_key) | {
        (software, device, 1, ranks, operation)
        for device in shared
        for software in SOFTWARES
        for ranks in (2, 4, 8)
        for operation in (
            ("all_reduce", "all_gather", "reduce_scatter", "all_to_all") if software == "nccl" else ("all_reduce",)
        )
    }
    for key in sorted(keys):
        software, device, nodes, _, _ = key
        whole = grouped.get((software, device, nodes))
        start, pull, scale = (shared[device].lines(key), 0.05, 0.1) if whole is None else (whole, 0.03, 0.05)
        link = _wire(device, nodes, software, key[3])
        lines = _fit_lines(by_key.get(key, []), start, pull, scale, link)
        paths[key] = Path(*(float(value) for value in np.exp(lines)))
    return paths


def write(paths: dict[tuple, Path], file: File) -> None:
    with file.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*NAMES, "latency_low_us", "rate_low_gb", "latency_high_us", "rate_high_gb"])
        for key, path in sorted(paths.items()):
            numbers = (path.latency_low, path.rate_low, path.latency_high, path.rate_high)
            writer.writerow([*key, *(f"{number:.4g}" for number in numbers)])
