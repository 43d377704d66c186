"""`holdfast topo`: islands, the slow edges between them, groups for tensor parallelism, and bad device orders."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path as File
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from holdfast.core.errors import ConfigError
from holdfast.hardware import islands as grouping
from holdfast.hardware.catalogue import Link, find_device
from holdfast.hardware.cluster import Cluster, Node, node_of
from holdfast.hardware.cluster_file import parse_cluster
from holdfast.hardware.config import TopoConfig
from holdfast.hardware.detect import this_machine
from holdfast.hardware.topology import Path, Topology, parse_topology

MATRIX_DEVICES = 16
"""Up to so many devices the table of all pairs fits a terminal."""


@dataclass(frozen=True)
class Machine:
    """What is drawn: a topology, and the node it belongs to where the GPUs are known. `names`: of all alike."""

    names: tuple[str, ...]
    topology: Topology
    node: Node | None

    def rate(self, first: int, second: int) -> float | None:
        """Bytes/s per direction between two devices; None where the GPUs are not known."""
        return self.node.link_between(first, second).bandwidth if self.node else None

    def of(self, devices: Iterable[int]) -> list[str]:
        return [self.topology.devices[i] for i in devices]


def run(config: TopoConfig) -> int:
    """Print what `config` asks for, and return the exit code. Raises ConfigError."""
    machines, cluster = _read(config)
    if config.machine.json:
        print(json.dumps(facts(machines, cluster), indent=2))
    else:
        show(machines, cluster, Console(highlight=False))
    return 0


def _read(config: TopoConfig) -> tuple[list[Machine], Cluster | None]:
    file, gpu = config.machine.file, config.machine.gpu
    if file is None:
        cluster = this_machine()
        return machines_of(cluster), cluster
    source = "stdin" if file == "-" else file
    try:
        text = sys.stdin.read() if file == "-" else File(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--file {source}: it is not text in UTF-8") from error
    except OSError as error:
        raise ConfigError(f"--file {source}: {error.strerror or error}") from error
    if re.search(r"^[\s{\"']*nodes[\"']?\s*:", text, re.MULTILINE):
        if gpu is not None:
            raise ConfigError(f"--gpu {gpu}: the cluster file {source} names its GPUs")
        cluster = parse_cluster(text, source, File(file).parent)
        return machines_of(cluster), cluster
    if not re.search(r"\bGPU\d", text):
        raise ConfigError(f"{source} is neither what `nvidia-smi topo -m` prints nor a cluster file with nodes")
    topology = parse_topology(text, source)
    if gpu is None:
        return [Machine((source,), topology, None)], None
    try:
        node = node_of(source, (find_device(gpu),) * len(topology.devices), topology, None)
    except ConfigError as error:
        raise ConfigError(f"--gpu {gpu}: {error}") from error
    return [Machine((source,), topology, node)], None


def machines_of(cluster: Cluster) -> list[Machine]:
    """The nodes of a cluster, those that are alike but for their names together."""
    alike: dict[tuple[object, ...], list[Node]] = {}
    for node in cluster.nodes:
        same = (node.devices, node.topology, node.link, node.network, node.nics, node.memory_bytes, node.site)
        alike.setdefault(same, []).append(node)
    return [Machine(tuple(node.name for node in nodes), nodes[0].topology, nodes[0]) for nodes in alike.values()]


# ---- as data -----------------------------------------------------------------------------------------------------


def facts(machines: Sequence[Machine], cluster: Cluster | None) -> dict[str, Any]:
    """All that is known and found, for other programs. Bandwidths are bytes/s per direction, latencies seconds."""
    return {
        "machines": [_machine_facts(machine) for machine in machines],
        "between_sites": _link_facts(cluster.between_sites) if cluster and _sites(cluster) > 1 else None,
        "assumptions": list(cluster.assumptions) if cluster else [],
    }


def _machine_facts(machine: Machine) -> dict[str, Any]:
    topology, node = machine.topology, machine.node
    count = len(topology.devices)
    bad = grouping.bad_orders(topology, range(count))
    return {
        "names": list(machine.names),
        "devices": [
            {"name": name, "numa": topology.numa[i] or None, **_device_facts(node, i)}
            for i, name in enumerate(topology.devices)
        ],
        "nics": list(topology.nics),
        "network": {**_link_facts(node.network), "cards": node.nics} if node and node.network else None,
        "memory_bytes": node.memory_bytes if node else None,
        "site": node.site if node else "",
        "pairs": [
            {"devices": machine.of((i, j)), "path": str(topology.between(i, j)), **_pair_facts(node, i, j)}
            for i, j in combinations(range(count), 2)
        ],
        "islands": [machine.of(island) for island in grouping.islands(topology)],
        "slow_edges": [machine.of((i, j)) for i, j, _ in grouping.slow_edges(topology)],
        "groups": {
            str(size): [
                {"devices": machine.of(group.devices), "worst": str(group.worst), "ring": str(group.ring)}
                for group in grouping.groups_of(topology, size)
            ]
            for size in _sizes(count)
        },
        "bad_orders": [
            {"size": order.size, "slow": [machine.of(group.devices) for group in order.slow]} for order in bad
        ],
        "good_order": machine.of(grouping.good_order(topology)),
    }


def _device_facts(node: Node | None, number: int) -> dict[str, Any]:
    if node is None:
        return {}
    device = node.devices[number]
    return {
        "type": device.name,
        "memory_bytes": device.memory_bytes,
        "memory_bandwidth": device.memory_bandwidth,
        "flops": dict(device.flops),
        "source": device.source,
    }


def _pair_facts(node: Node | None, first: int, second: int) -> dict[str, Any]:
    return _link_facts(node.link_between(first, second)) if node else {}


def _link_facts(link: Link) -> dict[str, Any]:
    return {"link": link.name, "bandwidth": link.bandwidth, "latency": link.latency}


def _sites(cluster: Cluster) -> int:
    return len({node.site for node in cluster.nodes})


def _sizes(count: int) -> list[int]:
    return [size for size in (2, 4, 8, 16, 32, 64) if size <= count]


# ---- as a picture ------------------------------------------------------------------------------------------------


def show(machines: Sequence[Machine], cluster: Cluster | None, console: Console) -> None:
    """Draw every kind of machine, then what lies between them, and the notes."""
    for machine in machines:
        _show_machine(machine, console)
    if cluster and len(cluster.nodes) > 1:
        networks = dict.fromkeys(f"{n.nics} × {_named(n.network)}" for n in cluster.nodes if n.network)
        console.print(f"[bold]Between nodes[/]  {'; '.join(networks) or 'nothing known'}")
    if cluster and _sites(cluster) > 1:
        console.print(f"[bold]Between sites[/]  {_named(cluster.between_sites)}")
    for said in cluster.assumptions if cluster else ():
        console.print(f"[dim]note  {escape(said)}[/]", soft_wrap=True)


def _show_machine(machine: Machine, console: Console) -> None:
    count = len(machine.topology.devices)
    console.print(Text(_title(machine), style="bold"), soft_wrap=True)
    if count == 1:
        return
    if machine.node and machine.node.link:
        console.print(f"  Every pair is joined alike, by {_named(machine.node.link)}.\n", soft_wrap=True)
        return
    if count <= MATRIX_DEVICES:
        console.print(_indented(_matrix(machine)))
    found = grouping.islands(machine.topology)
    if any(len(island) > 1 for island in found):
        boxes = [_island(machine, number, island) for number, island in enumerate(found, 1)]
        edges = [_between(machine, found)] if len(found) > 1 else []
        console.print(_indented(Group(*boxes, *edges)))
    else:
        rate = _rate(machine.rate(0, 1))
        console.print(f"\n  No islands: every pair is joined alike, by {machine.topology.between(0, 1)}{rate}.\n")
    console.print(_indented(_groups(machine)))
    for line in warnings(machine):
        console.print(f"  [yellow]{escape(line)}[/]", soft_wrap=True)
    console.print()


def _indented(what: RenderableType) -> Padding:
    return Padding(what, (1, 0, 0, 2), expand=False)


def _title(machine: Machine) -> str:
    names = machine.names[0] if len(machine.names) == 1 else f"{len(machine.names)} nodes, {machine.names[0]} to …"
    if machine.node is None:
        return f"{names}: {len(machine.topology.devices)} GPUs"
    node = machine.node
    types = Counter(device.name for device in node.devices)
    parts = [f"{number} × {name}" for name, number in types.items()]
    where = f", in {node.site}" if node.site else ""
    memory = ", ".join(f"{device.memory_bytes / 1e9:.1f} GB" for device in dict.fromkeys(node.devices))
    return f"{names}: {' + '.join(parts)} ({memory}{' each' if len(node.devices) > 1 else ''}){where}"


def _style(path: Path) -> str:
    return {"NV": "green", "SYS": "red", "X": "dim"}.get(path.kind, "yellow")


def _matrix(machine: Machine) -> Table:
    table = Table(box=None, padding=(0, 1))
    table.add_column("")
    for name in machine.topology.devices:
        table.add_column(name.removeprefix("GPU"), justify="right")
    for i, name in enumerate(machine.topology.devices):
        row = [machine.topology.between(i, j) for j in range(len(machine.topology.devices))]
        table.add_row(name, *(Text("·" if path.kind == "X" else str(path), style=_style(path)) for path in row))
    return table


def _island(machine: Machine, number: int, island: Sequence[int]) -> Panel:
    label = f"island {number}"
    if len(island) > 1:
        label += f": {_paths(machine, list(combinations(island, 2)))}"
    return Panel(Text("  ".join(machine.of(island))), title=label, title_align="left", expand=False)


def _between(machine: Machine, found: Sequence[Sequence[int]]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    alike: dict[str, list[str]] = {}
    for (a, first), (b, second) in combinations(enumerate(found, 1), 2):
        pairs = [(i, j) for i in first for j in second]
        alike.setdefault(_paths(machine, pairs), []).append(f"{a} to {b}")
    for paths, islands in alike.items():
        table.add_row(f"island {', '.join(islands)}", paths)
    return table


def _paths(machine: Machine, pairs: Sequence[tuple[int, int]]) -> str:
    """The kinds of path among pairs, fastest first, each with its rate and, where there are several, its number."""
    counts = Counter((machine.topology.between(i, j), machine.rate(i, j)) for i, j in pairs)
    ordered = sorted(counts.items(), key=lambda item: -item[0][0].speed)
    if len(ordered) == 1:
        (path, rate), _ = ordered[0]
        return f"[{_style(path)}]{path}{_rate(rate)}[/]"
    listed = [
        f"[{_style(path)}]{number} × {path}{f' at {rate / 1e9:.4g}' if rate else ''}[/]"
        for (path, rate), number in ordered
    ]
    return ", ".join(listed) + (" GB/s per direction" if machine.node else "")


def _groups(machine: Machine) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("groups of", "devices", "slowest pair", "slowest of a ring"):
        table.add_column(column, header_style="bold", overflow="fold")
    for size in _sizes(len(machine.topology.devices)):
        groups = grouping.groups_of(machine.topology, size)
        members = ["+".join(name.removeprefix("GPU") for name in machine.of(group.devices)) for group in groups]
        worst = dict.fromkeys(sorted((group.worst for group in groups), key=lambda path: path.speed))
        rings = dict.fromkeys(sorted((group.ring for group in groups), key=lambda path: path.speed))
        table.add_row(str(size), "  ".join(members), _coloured(worst), _coloured(rings))
    return table


def _coloured(paths: Iterable[Path]) -> Text:
    return Text(", ").join(Text(str(path), style=_style(path)) for path in paths)


def warnings(machine: Machine) -> list[str]:
    """A sentence for each size of group that the present order of devices cuts over slow edges."""
    count = len(machine.topology.devices)
    said = []
    for order in grouping.bad_orders(machine.topology, range(count)):
        slow = ", ".join("+".join(machine.of(group.devices)) for group in order.slow)
        paths = " and ".join(dict.fromkeys(str(group.worst) for group in order.slow))
        best = min((group.worst for group in order.best), key=lambda path: path.speed)
        said.append(
            f"Bad order: consecutive groups of {order.size} put {slow} over {paths}; in a better one the slowest"
            f" pair has {best}."
        )
    if said:
        better = [name.removeprefix("GPU") for name in machine.of(grouping.good_order(machine.topology))]
        said.append(f"Better: CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES={','.join(better)}")
    return said


def _rate(rate: float | None) -> str:
    return "" if rate is None else f" at {rate / 1e9:.4g} GB/s per direction"


def _named(link: Link) -> str:
    latency = f"{link.latency * 1e6:.4g} µs" if link.latency < 1e-3 else f"{link.latency * 1e3:.4g} ms"
    return f"{link.name}{_rate(link.bandwidth)}, {latency}"
