"""Ways to lay a model over the devices of a cluster: which devices share a layer, which layers they have.

    cluster → groups of devices of one kind that can share layers (as fast a link inside as there is)
            → replicas, each a pipeline of groups → layers for each group

Devices of one kind get stages of equal layers, give or take one. Kinds of devices are mixed in a pipeline, never in a
group: a stage's ranks wait for one another in every layer, stages do so once a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from holdfast.hardware.catalogue import Device, Link
from holdfast.hardware.cluster import Cluster, Node
from holdfast.hardware.islands import groups_of
from holdfast.hardware.topology import link_of
from holdfast.planner.communication import Fabric

Place = tuple[int, int]
"""Of a device: its node, its number there."""
MOST_STAGES = 64
HALF_A_MACHINE = 4
"""Devices at one socket, where a machine has two and eight devices."""


@dataclass(frozen=True, slots=True)
class DeviceGroup:
    """Devices of one kind that share the layers of a stage. `link`: the slowest between two of one node."""

    device: Device
    places: tuple[Place, ...]
    link: Link
    network: Link | None
    """Between its nodes, each device's share of it; None: there is one node."""
    as_usual: bool
    """Its devices are joined as those that measured paths were measured on."""

    @property
    def degree(self) -> int:
        return len(self.places)

    @property
    def nodes(self) -> int:
        return len({node for node, _ in self.places})

    @property
    def fabric(self) -> Fabric:
        return Fabric(self.device.name, self.link, self.network, self.as_usual)

    @property
    def slowest_link(self) -> Link:
        return self.network or self.link


@dataclass(frozen=True, slots=True)
class Candidate:
    """Replicas of pipelines of groups. `layers`: of each stage, the same in all replicas of one shape."""

    replicas: tuple[tuple[DeviceGroup, ...], ...]
    layers: tuple[int, ...]
    expert_parallel: bool = False
    """Each rank of a group holds whole experts, else a part of every expert."""
    shared_experts: bool = False
    """Replicas hold the experts once between them, whole ones on each rank, and send each other rows for them."""
    shard_weights: bool = False
    """Replicas hold the weights once between them and gather each layer before its use (ZeRO-3, arXiv:1910.02054)."""

    @property
    def stages(self) -> tuple[DeviceGroup, ...]:
        """Of the replica with the slowest links."""
        return min(self.replicas, key=lambda groups: min(group.slowest_link.bandwidth for group in groups))

    @property
    def degrees(self) -> tuple[int, ...]:
        return tuple(group.degree for group in self.replicas[0])

    @property
    def num_devices(self) -> int:
        return sum(group.degree for groups in self.replicas for group in groups)

    @property
    def expert_ranks(self) -> int:
        """Ranks that share out the experts of a layer."""
        copies = len(self.replicas) if self.shared_experts else 1
        return max(self.degrees) * copies if self.expert_parallel else 1

    @property
    def is_even(self) -> bool:
        """All stages have the same number of ranks, and of layers but for one more or less."""
        return len(set(self.degrees)) == 1 and max(self.layers) - min(self.layers) <= 1

    @property
    def name(self) -> str:
        """As people write it: TP8 × PP2 × DP4, EP8; degrees of unequal stages one by one."""
        degrees = self.degrees
        tensor = f"TP{degrees[0]}" if len(set(degrees)) == 1 else "TP" + "+".join(map(str, degrees))
        parts = [tensor]
        if len(degrees) > 1:
            parts.append(f"PP{len(degrees)}")
        if len(self.replicas) > 1:
            parts.append(f"DP{len(self.replicas)}")
        if self.expert_parallel:
            parts.append(f"EP{self.expert_ranks}")
        if self.shard_weights:
            parts.append("sharded weights")
        if not self.is_even:
            parts.append("layers " + "+".join(map(str, self.layers)))
        return " × ".join(parts)


def device_groups(cluster: Cluster, device: Device, degree: int) -> list[DeviceGroup]:
    """As many disjoint groups of `degree` devices of this kind as there are, node by node, each within a node if
    nodes are large enough, else over whole nodes of one site."""
    groups: list[DeviceGroup] = []
    whole: list[tuple[int, Node]] = []
    alike: dict[tuple[int, int, int], list[DeviceGroup]] = {}  # copies of a node share its parts: grouped once
    for number, node in enumerate(cluster.nodes):
        mine = [index for index, known in enumerate(node.devices) if known == device]
        if len(mine) >= degree:
            parts = (id(node.devices), id(node.topology), id(node.link))
            if parts not in alike:
                alike[parts] = list(_groups_of_node(number, node, mine, degree))
            groups += [on_node(group, number) for group in alike[parts]]
        elif len(mine) == len(node.devices):
            whole.append((number, node))
    if groups:
        return groups
    per_node = max((len(node.devices) for _, node in whole), default=0)
    if not per_node or degree % per_node:
        return []
    count = degree // per_node
    # Of the largest nodes alone, site by site: a group's nodes are alike.
    for site in dict.fromkeys(node.site for _, node in whole):
        mates = [(number, node) for number, node in whole if node.site == site and len(node.devices) == per_node]
        for first in range(0, len(mates) - count + 1, count):
            some = mates[first : first + count]
            networks = [_network_of_each(node) for _, node in some]
            if None in networks:
                continue
            network = min((link for link in networks if link), key=lambda link: link.bandwidth)
            places = tuple((number, index) for number, _ in some for index in range(per_node))
            inside = min((_slowest(node, range(per_node)) for _, node in some), key=lambda link: link.bandwidth)
            groups.append(DeviceGroup(device, places, inside, network, joined_as_usual(device, inside, degree)))
    return groups


def on_node(group: DeviceGroup, number: int) -> DeviceGroup:
    """The devices of a group that lies in one node, as those of node `number`, which is built alike."""
    return replace(group, places=tuple((number, index) for _, index in group.places))


def _network_of_each(node: Node) -> Link | None:
    """What each device of a node has of its network when all use it, as they do in a group over nodes: eight with one
    card an eighth of it."""
    if node.network is None:
        return None
    return replace(node.network, bandwidth=min(node.network.bandwidth, node.network_share))


def _groups_of_node(number: int, node: Node, mine: Sequence[int], degree: int) -> Iterator[DeviceGroup]:
    device = node.devices[mine[0]]
    if degree == 1:
        for index in mine:
            yield DeviceGroup(device, ((number, index),), device.scale_up or device.pcie, None, as_usual=True)
        return
    labels = [known.name for known in node.devices] if len(mine) < len(node.devices) else []
    for group in groups_of(node.topology, degree, labels):
        if all(node.devices[index] == device for index in group.devices):
            link = node.link or link_of(group.ring, device)
            places = tuple((number, index) for index in group.devices)
            yield DeviceGroup(device, places, link, None, joined_as_usual(device, link, degree))


def _slowest(node: Node, some: Sequence[int]) -> Link:
    links = [node.link_between(some[0], other) for other in some[1:]]
    return min(links, key=lambda link: link.bandwidth) if links else node.devices[0].pcie


def joined_as_usual(device: Device, link: Link, degree: int) -> bool:
    """Whether a group's slowest link is what such devices have in a usual machine: their own links if they have any;
    else PCIe, and for more than four the way between two sockets."""
    if device.scale_up is not None and device.fabric != "none":
        return link.bandwidth >= device.scale_up.bandwidth
    return link.kind == "pcie" or degree > HALF_A_MACHINE


def kinds_of(cluster: Cluster) -> dict[Device, int]:
    """Kinds of devices, and how many there are."""
    counts: dict[Device, int] = defaultdict(int)
    for device in cluster.devices:
        counts[device] += 1
    return dict(counts)


def degrees_of(cluster: Cluster, device: Device, most: int) -> list[int]:
    """Tensor degrees worth looking at: what divides the devices of a node, then whole nodes."""
    sizes = {sum(known == device for known in node.devices) for node in cluster.nodes} - {0}
    largest = max(sizes)
    inside = [degree for degree in range(1, largest + 1) if any(size % degree == 0 for size in sizes)]
    nodes = sum(sum(known == device for known in node.devices) == largest for node in cluster.nodes)
    over = [largest << double for double in range(1, nodes.bit_length()) if (1 << double) <= nodes]
    return [degree for degree in inside + over if degree <= most]


def pipelines_of_one_kind(
    cluster: Cluster, device: Device, degree: int, num_layers: int
) -> Iterator[tuple[tuple[DeviceGroup, ...], ...]]:
    """Replicas of as many stages as there can be, for each number of stages that uses every group."""
    groups = device_groups(cluster, device, degree)
    for depth in range(1, min(len(groups), num_layers, MOST_STAGES) + 1):
        if len(groups) % depth == 0:
            yield tuple(tuple(groups[first : first + depth]) for first in range(0, len(groups), depth))


def balanced(
    num_layers: int, seconds: Sequence[float], fixed: Sequence[float], most: Sequence[int]
) -> list[int] | None:
    """Layers of each stage so that the slowest (`seconds` a layer, and `fixed` ones) is as fast as can be, none above
    `most`; None: there is no room for all. Exact: giving each layer to the stage that is then the fastest never makes
    the slowest one slower than it must be (list scheduling of equal jobs)."""
    if sum(most) < num_layers or min(most) < 1:
        return None
    layers = [1] * len(seconds)
    if sum(layers) > num_layers:
        return None
    for _ in range(num_layers - len(layers)):
        free = [stage for stage in range(len(layers)) if layers[stage] < most[stage]]
        stage = min(free, key=lambda some: (fixed[some] + (layers[some] + 1) * seconds[some], some))
        layers[stage] += 1
    return layers
