"""A cluster: nodes of devices, what joins them, and where they stand; from a YAML file or a string as "2x8xH100".

Devices of a cluster are numbered through, node by node.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from holdfast.core.errors import ConfigError
from holdfast.hardware.catalogue import Device, Link, find_device, find_link
from holdfast.hardware.topology import Path, Topology, drawn, link_of, uniform

MOST_DEVICES = 65_536
USUAL_NODE = 8
"""Devices of a node when only a total is told, unless their fabric joins more."""

MOST_IN_NODE = 72
"""Devices of the largest machine that is built (NVIDIA GB200 NVL72 datasheet, 2024)."""

USUAL_NETWORK = {
    "pcie3": "infiniband-edr",
    "pcie4": "infiniband-hdr",
    "pcie5": "infiniband-ndr",
    "pcie6": "infiniband-xdr",
}
"""The network of machines of the time, by the generation of PCIe that feeds its cards."""


@dataclass(frozen=True)
class Node:
    """One machine. `link`: what joins every pair of its devices alike, where that is told; else the topology says.
    `network`: one of its `nics` network cards, None where none is known. `memory_bytes` of the host and
    `price_per_hour` of the node: None where not told."""

    name: str
    devices: tuple[Device, ...]
    topology: Topology
    link: Link | None = None
    network: Link | None = None
    nics: int = 1
    memory_bytes: int | None = None
    site: str = ""
    price_per_hour: float | None = None

    def link_between(self, first: int, second: int) -> Link:
        """What joins two of its devices; for two types, the slower one's end of it. Per direction."""
        if self.link is not None:
            return self.link
        path = self.topology.between(first, second)
        ends = (link_of(path, self.devices[first]), link_of(path, self.devices[second]))
        return min(ends, key=lambda link: (link.bandwidth, -link.latency))

    @property
    def network_share(self) -> float:
        """Bytes/s per direction that each device has of the network when all use it."""
        return self.network.bandwidth * self.nics / len(self.devices) if self.network else 0.0


@dataclass(frozen=True)
class Cluster:
    """Nodes and what lies between their sites. `assumptions`: what was not told and taken as usual, to be printed."""

    nodes: tuple[Node, ...]
    between_sites: Link
    assumptions: tuple[str, ...] = ()

    @property
    def devices(self) -> tuple[Device, ...]:
        return tuple(device for node in self.nodes for device in node.devices)

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Of each device: its node, and its number in it."""
        return tuple((n, i) for n, node in enumerate(self.nodes) for i in range(len(node.devices)))

    def link_between(self, first: tuple[int, int], second: tuple[int, int]) -> Link:
        """What joins the devices at two places, per direction: for two nodes one network card, the slower one's.

        Raises ConfigError when nothing is known to join them.
        """
        here, there = self.nodes[first[0]], self.nodes[second[0]]
        if first[0] == second[0]:
            return here.link_between(first[1], second[1])
        if here.site != there.site:
            return self.between_sites
        if here.network is None or there.network is None:
            lone = here if here.network is None else there
            raise ConfigError(f"node {lone.name} has no network, so its devices cannot work with another node's")
        return min((here.network, there.network), key=lambda link: link.bandwidth)


def cluster_of(text: str, network: Link | None = None) -> Cluster:
    """A cluster from a few words: "8xA100-80GB", "2x8xH100" (nodes x devices), "4xA100-40GB-SXM,4xA100-80GB-SXM".

    Parts without a number of nodes stand together in one node; one that has more devices than a machine has makes
    several nodes of its own.
    How they are joined is taken as usual for their type, and said in `assumptions`. Raises ConfigError.
    """
    nodes: list[Node] = []
    single: list[tuple[int, Device]] = []
    for count, devices, gpu in gpu_counts(text):
        if count is None:
            single.append((devices, gpu))
        else:
            nodes += [_usual_node((gpu,) * devices)] * count
    many = [(count, gpu) for count, gpu in single if count > _usual_size(gpu) or len(single) == 1]
    together = tuple(gpu for count, gpu in single if (count, gpu) not in many for _ in range(count))
    own = [node for count, gpu in many for node in _split(count, gpu)]
    nodes = [*([_usual_node(together)] if together else []), *own, *nodes]
    alone = len(nodes) == 1
    named = tuple(
        replace(node, name=f"node{n}", network=network or (None if alone else node.network))
        for n, node in enumerate(nodes)
    )
    return Cluster(named, find_link("wan"), _assumed(named, network))


def gpu_counts(text: str) -> list[tuple[int | None, int, Device]]:
    """(nodes, devices of each, type) of each part of "2x8xH100,4xL40S"; nodes is None where it is not told."""
    found = []
    for part in re.split(r"[,+]", text):
        counts, rest = [], part.strip()
        while match := re.match(r"(\d+)\s*[x×*]\s*(?=\S)", rest, re.IGNORECASE):
            counts.append(int(match[1]))
            rest = rest[match.end() :]
        if len(counts) > 2 or not rest:
            raise ConfigError(f"GPUs {text!r}: {part.strip()!r} is not GPU, COUNTxGPU or NODESxCOUNTxGPU")
        found.append((counts[0] if len(counts) == 2 else None, counts[-1] if counts else 1, find_device(rest)))
    counts_of = [(nodes if nodes is not None else 1) * devices for nodes, devices, _ in found]
    if min(counts_of) < 1 or sum(counts_of) > MOST_DEVICES:
        raise ConfigError(f"GPUs {text!r}: there must be 1 to {MOST_DEVICES:,} of each")
    return found


def _usual_size(device: Device) -> int:
    return max(USUAL_NODE, device.fabric_devices)


def _split(count: int, device: Device) -> list[Node]:
    """Nodes of the usual size; the last one may have fewer devices."""
    size = _usual_size(device)
    sizes = [size] * (count // size) + ([count % size] if count % size else [])
    whole = {size: _usual_node((device,) * size) for size in set(sizes)}
    return [whole[size] for size in sizes]


def _usual_node(devices: tuple[Device, ...]) -> Node:
    """A machine of these devices as they are usually built, named later."""
    check_size(devices)
    name = USUAL_NETWORK.get(devices[0].pcie.name)
    network = find_link(name) if name else None
    return Node("", devices, usual_topology(devices), network=network, nics=usual_nics(devices))


def check_size(devices: Sequence[Device]) -> None:
    """Raise `ConfigError` for more devices than a machine has."""
    if len(devices) > MOST_IN_NODE:
        raise ConfigError(
            f"{len(devices):,} GPUs in one node: the largest machines have {MOST_IN_NODE}; say them as several nodes "
            "(NODESxCOUNTxGPU, or count in a cluster file)"
        )


def usual_nics(devices: Sequence[Device]) -> int:
    """Network cards of a usual machine of these devices: where a switch joins them, one for each, else one."""
    return len(devices) if devices[0].fabric == "switch" else 1


def _assumed(nodes: Sequence[Node], network: Link | None) -> tuple[str, ...]:
    said = []
    for node in dict.fromkeys(replace(node, name="") for node in nodes):
        for i, j in combinations(range(len(node.devices)), 2):
            link = node.link_between(i, j)
            types = " and ".join(dict.fromkeys((node.devices[i].name, node.devices[j].name)))
            lanes = f"{link.lanes} lanes of " if link.kind == "nvlink" else ""
            said.append(f"{types}: joined by {lanes}{link.name}, {link.bandwidth / 1e9:.4g} GB/s per direction")
        if node.network and network is None:
            each = f"{node.nics} × {node.network.name}, {node.network.bandwidth / 1e9:g} GB/s per direction each"
            said.append(f"between nodes: {each}")
    return tuple(dict.fromkeys(said))


def usual_topology(devices: Sequence[Device]) -> Topology:
    """How devices are joined in machines as they are usually built: those of one type by their own fabric, where it
    is part of the machine, and the rest over PCIe: up to four on one socket, more on two."""
    count = len(devices)
    half = count if count <= 4 else -(-count // 2)
    sockets = [range(half), range(half, count)]
    near = {pair: Path("NODE") for socket in sockets for pair in combinations(socket, 2)}
    pairs = {**near, **_fabric_pairs(devices)}
    return drawn(count, pairs, Path("SYS"), [str(int(i >= half)) for i in range(count)])


def _fabric_pairs(devices: Sequence[Device]) -> dict[tuple[int, int], Path]:
    """The pairs that NVLink joins: within runs of one type, at most `fabric_devices` long."""
    pairs: dict[tuple[int, int], Path] = {}
    starts = [0]
    for i, (previous, device) in enumerate(pairwise(devices), 1):
        if device != previous or i - starts[-1] == device.fabric_devices:
            starts.append(i)
    for first, end in pairwise([*starts, len(devices)]):
        local = _fabric(devices[first], end - first)
        pairs |= {(first + i, first + j): path for (i, j), path in local.items()}
    return pairs


def _fabric(device: Device, count: int) -> dict[tuple[int, int], Path]:
    if device.scale_up is None or device.fabric == "none":
        return {}
    lanes = device.scale_up.lanes
    everyone = list(combinations(range(count), 2))
    if device.fabric == "switch":
        return dict.fromkeys(everyone, Path("NV", lanes))
    if device.fabric == "bridge":  # a bridge of four shares its links out
        return dict.fromkeys(everyone, Path("NV", lanes // max(count - 1, 1)))
    if lanes >= device.fabric_devices - 1:
        return dict.fromkeys(everyone, Path("NV", lanes // (device.fabric_devices - 1)))
    if count <= 4:  # a fully joined quad
        return dict.fromkeys(everyone, Path("NV", lanes // 3))
    # More devices than a device has links: the hybrid cube mesh of NVIDIA's DGX-1 (whitepaper, 2017, figure 4).
    twice = {(0, 3), (0, 4), (1, 2), (1, 5), (2, 3), (4, 7), (5, 6), (6, 7)}
    joined = [(i, j) for i, j in everyone if i // 4 == j // 4 or j == i + 4]
    return {pair: Path("NV", 2 if pair in twice else 1) for pair in joined}


def node_of(name: str, devices: tuple[Device, ...], topology: Topology | None, link: Link | None) -> Node:
    """A node whose links are told: by a topology, or all alike; else as usual. Raises ConfigError when the topology
    is of another number of devices, or of links that these devices do not have, or for more than a machine has."""
    check_size(devices)
    if topology is None:
        topology = usual_topology(devices) if link is None else uniform(len(devices), Path("PHB"))
    if len(topology.devices) != len(devices):
        raise ConfigError(f"the topology has {len(topology.devices)} devices, but {len(devices)} are named")
    node = Node(name, devices, topology, link=link)
    for i, j in combinations(range(len(devices)), 2):
        node.link_between(i, j)
    return node
