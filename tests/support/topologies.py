"""Machines to test with, and what `nvidia-smi topo -m` would print of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from holdfast.hardware.topology import Path, Topology, drawn, uniform

NVSWITCH = uniform(8, Path("NV", 18))


def cube_mesh() -> Topology:
    """Eight V100 as in a DGX-1: two fully joined quads, each device joined to its twin; some links are double."""
    twice = {(0, 3), (0, 4), (1, 2), (1, 5), (2, 3), (4, 7), (5, 6), (6, 7)}
    quads = [pair for quad in (range(4), range(4, 8)) for pair in combinations(quad, 2)]
    twins = [(i, i + 4) for i in range(4)]
    return drawn(8, {pair: Path("NV", 2 if pair in twice else 1) for pair in quads + twins}, Path("SYS"))


def sockets(*members: Sequence[int]) -> Topology:
    """PCIe cards, those of each socket named."""
    count = sum(map(len, members))
    pairs = {pair: Path("PHB") for socket in members for pair in combinations(sorted(socket), 2)}
    near = {device: str(number) for number, socket in enumerate(members) for device in socket}
    return drawn(count, pairs, Path("SYS"), [near[device] for device in range(count)])


def printed(topology: Topology, gap: str = "\t", cores: str = "0-31") -> str:
    """The table as a driver prints it, with `gap` between columns."""
    names = [*topology.devices, *topology.nics]
    lines = [gap.join(["", *names, "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"])]
    for i, name in enumerate(names):
        cells = [f" {path} " for path in topology.paths[i]]
        near = [cores, topology.numa[i], "", "N/A"] if i < len(topology.devices) and topology.numa[i] else []
        lines.append(gap.join([name, *cells, *near]))
    return "\n".join([*lines, "", "Legend:", "", "  X    = Self", "  NV#  = a bonded set of # NVLinks", ""])
