"""What ranks that share a layer say to each other: how many bytes, over which path, for how long.

A collective of a small message takes its latency and nothing else; of a large one, what the wire carries. In
between, NCCL and the peer-memory kernels of the engines change the protocol: one that starts at once but spends half
of the wire on flags, then one that starts slower and fills it. So a path is two straight lines, the better holds:

    time(bytes) = min(latency_low + wire / rate_low, latency_high + wire / rate_high)

α–β alone, one line, is off by half where decoding happens. Paths that were measured are data (`collectives.csv`);
of others the lines are drawn from the links.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from holdfast.hardware.catalogue import Link

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]
Software = Literal["nccl", "vllm", "vllm-eager", "trtllm", "torch"]
"""Who moves the bytes: NCCL called from a CUDA graph or C++; the engines' own all-reduce over peer memory, recorded
in a graph; NCCL called from Python. `vllm-eager`, vLLM's launched one by one, is for rows of measurements alone: in
steps without a graph the launches are the host's time (`timing.host_time`)."""

SLOWEST_EXCHANGE = 0.1
"""Seconds a token may spend on latency between ranks; a service with fewer than ten tokens a second helps nobody."""

SHARPNESS = 12
"""How suddenly the protocol changes: the power of the norm that stands for min()."""


@dataclass(frozen=True, slots=True)
class Path:
    """What n ranks have between them. Seconds; bytes/s per direction and rank."""

    latency_low: float
    rate_low: float
    latency_high: float
    rate_high: float
    source: str = ""

    def time(self, wire: float) -> float:
        """Seconds for `wire` bytes sent by each rank (`wire_bytes`)."""
        low = self.latency_low + wire / self.rate_low
        high = self.latency_high + wire / self.rate_high
        ratio = low / high
        if not 0.5 < ratio < 2:
            return min(low, high)
        return low * float((1 + ratio**SHARPNESS) ** (-1 / SHARPNESS))


def wire_bytes(operation: Operation, ranks: int, message: float) -> float:
    """Bytes that each rank sends, by the bandwidth-optimal algorithm; `message`: bytes of the whole result (of what
    goes in, for reduce-scatter).

    A ring all-reduce is a reduce-scatter and an all-gather: 2(n-1)/n of the message (Patarasuk & Yuan, JPDC 2009).
    """
    if ranks == 1:
        return 0
    share = (ranks - 1) / ranks
    return message * {"all_reduce": 2 * share, "send_recv": 1}.get(operation, share)


def hops(operation: Operation, ranks: int) -> int:
    """Messages that follow upon one another in a ring; each costs one latency."""
    return {"all_reduce": 2 * (ranks - 1), "send_recv": 1, "all_to_all": 1}.get(operation, ranks - 1)


@dataclass(frozen=True, slots=True)
class Fabric:
    """Where a group of ranks lies: so many devices of one kind on so many nodes, evenly."""

    device: str
    """Its name in the catalogue."""
    link: Link
    """The slowest between two of the group within a node."""
    network: Link | None = None
    """Between nodes, per device; None: there is one node."""
    as_usual: bool = True
    """Joined as the machines of such devices that were measured; else nothing measured is taken."""


@dataclass(frozen=True, slots=True)
class Start:
    """What it takes to begin, by software: seconds. `rate_low`, `rate_high`: shares of the link that the two
    protocols reach."""

    launch: float
    hop: float
    rate_low: float
    wait_high: float
    rate_high: float


STARTS: dict[Software, Start] = {
    "nccl": Start(6e-6, 0.9e-6, 0.30, 12e-6, 0.72),
    "vllm": Start(4e-6, 0.3e-6, 0.30, 9e-6, 0.72),
    "vllm-eager": Start(19e-6, 0.6e-6, 0.40, 15e-6, 0.72),
    "trtllm": Start(3e-6, 0.4e-6, 0.30, 15e-6, 0.72),
    "torch": Start(25e-6, 2.0e-6, 0.40, 25e-6, 0.72),
}
"""Medians over the measured paths of NVLink machines; for paths that nobody measured."""


@cache
def measured_paths() -> dict[tuple[str, str, int, int, str], Path]:
    """(software, device, nodes, ranks, operation) → path, from `collectives.csv`."""
    text = resources.files(__package__).joinpath("collectives.csv").read_text(encoding="utf-8")
    paths = {}
    for row in csv.DictReader(text.splitlines()):
        key = (row["software"], row["device"], int(row["nodes"]), int(row["ranks"]), row["operation"])
        low, high = float(row["latency_low_us"]) * 1e-6, float(row["latency_high_us"]) * 1e-6
        paths[key] = Path(low, float(row["rate_low_gb"]) * 1e9, high, float(row["rate_high_gb"]) * 1e9, "measured")
    return paths


def path_of(software: Software, fabric: Fabric, nodes: int, ranks: int, operation: Operation) -> Path:
    """The path of `ranks` in all on `nodes` nodes, measured if there is one, drawn from the links otherwise.

    Between nodes without a measurement the hierarchical algorithm is assumed: each of the g ranks of a node reduces
    1/g of the message with its peers elsewhere.
    """
    measured = measured_paths() if fabric.as_usual else {}
    found = measured.get((software, fabric.device, nodes, ranks, operation))
    if found is None and software != "nccl" and (nodes > 1 or operation != "all_reduce"):
        found = measured.get(("nccl", fabric.device, nodes, ranks, operation))  # their own kernels do not go there
    if found is not None:
        return found
    if nodes == 1:
        near = _nearest(measured, software, fabric.device, ranks, operation)
        if near is not None:
            return near
        return _drawn(software, fabric.link, ranks, operation)
    return _between_nodes(software, fabric, nodes, ranks, operation)


def _nearest(
    measured: dict[tuple[str, str, int, int, str], Path], software: str, device: str, ranks: int, operation: str
) -> Path | None:
    """Of the same devices, another number of ranks: 6 of 8 on one node are as 8."""
    same = [key[3] for key in measured if (key[0], key[1], key[2], key[4]) == (software, device, 1, operation)]
    if not same:
        return None
    nearest = min(same, key=lambda known: (abs(math.log(known / ranks)), -known))
    return measured[software, device, 1, nearest, operation]


def _drawn(software: Software, link: Link, ranks: int, operation: Operation) -> Path:
    own_links = link.kind == "nvlink"
    # Peer-memory kernels are for NVLink, or for two: vLLM's and TensorRT-LLM's leave the rest to NCCL.
    start = STARTS[software]
    if not own_links and ranks > 2:
        start = max(start, STARTS["nccl"], key=lambda some: some.launch)
    # Whatever the algorithm, the link is crossed once at least.
    low = start.launch + (start.hop + link.latency) * max(hops(operation, ranks) / 2, 1)
    # Devices on PCIe share what leads to the others: a ring of four has half the rate of a pair, of eight a quarter.
    rate = link.bandwidth * 2 / max(ranks, 2) if link.kind == "pcie" else link.bandwidth
    return Path(low, rate * start.rate_low, low + start.wait_high, rate * start.rate_high, link.name)


def _between_nodes(software: Software, fabric: Fabric, nodes: int, ranks: int, operation: Operation) -> Path:
    assert fabric.network is not None, "ranks on several nodes need a network"
    start, network, here = STARTS["nccl"], fabric.network, ranks // nodes
    latency = start.launch + (start.hop + network.latency) * hops(operation, nodes)
    rate = network.bandwidth * start.rate_high
    if here > 1:
        inside = path_of(software, fabric, 1, here, operation)
        latency += inside.latency_low
        # Each of the g ranks of a node takes 1/g of a result over the network; what all-to-all sends is all its own.
        outer = wire_bytes(operation, nodes, 1) / (1 if operation == "all_to_all" else here)
        inner = wire_bytes(operation, here, 1)
        rate = wire_bytes(operation, ranks, 1) / (outer / rate + inner / inside.rate_high)
    return Path(latency, rate * 0.5, latency + start.wait_high, rate, network.name)


def imbalance(num_experts: int, ranks: int, routed: float) -> float:
    """How much more than the mean the busiest rank of an all-to-all gets, when `routed` rows (tokens × chosen
    experts) choose experts evenly but by chance: mean + √(2 mean ln ranks) of a Poisson (Raab & Steger 1998)."""
    if ranks == 1 or routed == 0:
        return 1
    mean = routed / min(ranks, num_experts)
    return min(1 + math.sqrt(2 * math.log(ranks) / mean), ranks)


def crossing_reason(link: Link, exchanges: int, parallelism: str = "tensor parallelism") -> str | None:
    """Why ranks that wait for each other `exchanges` times a token (`exchanges_per_token`) must not be joined by
    `link`; None: they may be. Latency alone decides: each exchange crosses the link at least once, whatever the
    algorithm and however many bytes it carries."""
    seconds = exchanges * link.latency
    if seconds <= SLOWEST_EXCHANGE:
        return None
    return (
        f"{parallelism} over {link.name}: {exchanges} exchanges a token × {link.latency * 1e3:.3g} ms = "
        f"{seconds:.3g} s a token by latency alone, whatever the bandwidth; put a replica on each side instead"
    )


def exchanges_per_token(num_layers: int, *, tensor: bool = False, stages: int = 1) -> int:
    """How often the ranks of a replica wait for each other to make one token: tensor parallelism (and the all-to-alls
    of expert parallelism) twice a layer, a pipeline at every border and once for the way back of the token."""
    return 2 * num_layers * tensor + (stages if stages > 1 else 0)
