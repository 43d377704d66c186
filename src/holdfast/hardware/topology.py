"""Which devices of a machine are joined how: what `nvidia-smi topo -m` prints, read into a link graph.

The table is square over devices and network cards. A cell says what lies between two: NV12 (so many NVLinks), or how
far up the PCIe tree a transfer climbs: PIX (one switch) < PXB (several) < PHB (the CPU's bridge) < NODE (bridges of
one NUMA node) < SYS (between NUMA nodes or sockets).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from holdfast.core.errors import ConfigError
from holdfast.hardware.catalogue import Device, Link, find_link

PCIE_KINDS = ("PIX", "PXB", "PHB", "NODE")
"""Paths over PCIe that stay within one NUMA node, nearest first."""

MOST_LANES = 18
"""NVLinks of the device that has most of them (NVLink 4 and 5)."""


@dataclass(frozen=True)
class Path:
    """What lies between two: kind "X" (it is the same device), "NV" with so many `lanes`, or a PCIe kind."""

    kind: str
    lanes: int = 0

    def __str__(self) -> str:
        return f"NV{self.lanes}" if self.kind == "NV" else self.kind

    @property
    def speed(self) -> float:
        """For comparing paths of one machine: about GB/s per direction. PCIe within a NUMA node is all alike."""
        return {"NV": 25.0 * self.lanes, "X": 1e6, "SYS": 5.0}.get(self.kind, 12.0)

    @property
    def climb(self) -> int:
        """How far up the PCIe tree it goes: breaks ties between paths of one speed."""
        order = ("X", "NV", *PCIE_KINDS, "SYS")
        return order.index(self.kind)


SELF = Path("X")


@dataclass(frozen=True)
class Topology:
    """The link graph of one machine.

    `paths[i][j]` is between i and j, which count the devices and then the network cards; it is symmetric. `numa[i]`
    is the NUMA node of device i as it was told (the cores near it, where only these were), "" where it was not.
    """

    devices: tuple[str, ...]
    nics: tuple[str, ...]
    paths: tuple[tuple[Path, ...], ...]
    numa: tuple[str, ...]

    def between(self, first: int, second: int) -> Path:
        return self.paths[first][second]

    def only(self, chosen: Sequence[int]) -> Topology:
        """The graph of these devices, in this order, and all network cards."""
        kept = [*chosen, *range(len(self.devices), len(self.paths))]
        return replace(
            self,
            devices=tuple(self.devices[i] for i in chosen),
            paths=tuple(tuple(self.paths[i][j] for j in kept) for i in kept),
            numa=tuple(self.numa[i] for i in chosen),
        )

    @property
    def switched(self) -> bool:
        """Whether all NVLinks of a device reach any peer: it shows more of them than it has."""
        count = len(self.devices)
        return any(sum(self.paths[i][j].lanes for j in range(count)) > MOST_LANES for i in range(count))


def link_of(path: Path, device: Device) -> Link:
    """What a path between two of these devices carries, per direction.

    Raises ConfigError when the path is of NVLinks that the device does not have: it is another device's.
    """
    if path.kind == "NV":
        if device.scale_up is None or path.lanes > device.scale_up.lanes:
            has = f"{device.scale_up.lanes} NVLinks" if device.scale_up else "no NVLink"
            raise ConfigError(f"the topology shows {path} between devices, but {device.name} has {has}")
        return device.scale_up.with_lanes(path.lanes)
    link = device.pcie
    if not device.peer_to_peer:  # through pinned host memory: written there by one device, then read by the other
        link = replace(link, name=f"{link.name} by way of host memory", latency=2 * link.latency)
    if path.kind != "SYS":
        return link
    socket = find_link(f"socket{link.name[4]}") if device.pcie.kind == "pcie" else link
    return replace(
        link,
        kind="socket",
        name=f"{link.name} and the link between sockets",
        bandwidth=min(link.bandwidth, socket.bandwidth),
        latency=link.latency + socket.latency,
        source=f"{link.source}; {socket.source}",
    )


_CELL = re.compile(r"X|NV\d+|PIX|PXB|PSB|PHB|NODE|SYS|SOC", re.IGNORECASE)
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_GPU = re.compile(r"GPU\d+", re.IGNORECASE)
_NO_TABLE = "not what `nvidia-smi topo -m` prints"


def parse_topology(text: str, source: str = "the topology") -> Topology:
    """Read what `nvidia-smi topo -m` printed, however a terminal or an issue tracker has mangled its whitespace.

    A row that is cut short is completed from its mirror image. `source` names the file in errors. Raises ConfigError
    when there is no table, a cell is unknown or missing on both sides, or two mirrored cells contradict each other.
    """
    lines = [_ANSI.sub("", line).split() for line in text.splitlines()]
    columns, body = _header(lines, source)
    position = {name: index for index, name in enumerate(columns)}
    cells: dict[tuple[int, int], Path] = {}
    near: dict[int, str] = {}
    for words in body:
        if not words or words[0] not in position or (len(words) > 1 and words[1] == "="):
            continue
        row = position[words[0]]
        if (row, row) in cells:
            break  # a second table, as of `topo -p2p`
        found = _row(words, columns, source)
        cells |= {(row, column): path for column, path in enumerate(found)}
        near[row] = _near(words[1 + len(found) :]) if len(found) == len(columns) else ""
    if not cells:
        raise ConfigError(f"{source}: {_NO_TABLE}: it has a header and no row")
    paths = tuple(
        tuple(_mirrored(cells, i, j, columns, source) for j in range(len(columns))) for i in range(len(columns))
    )
    legend = _nic_legend(lines)
    devices = tuple(name for name in columns if _GPU.fullmatch(name))
    return Topology(
        devices=devices,
        nics=tuple(legend.get(name, name) for name in columns[len(devices) :]),
        paths=paths,
        numa=tuple(near.get(i, "") for i in range(len(devices))),
    )


def _header(lines: list[list[str]], source: str) -> tuple[list[str], list[list[str]]]:
    """The names of the columns that are devices or network cards, and the lines below."""
    for number, words in enumerate(lines):
        if not words or not _GPU.fullmatch(words[0]) or (len(words) > 1 and _CELL.fullmatch(words[1])):
            continue
        end = next((i for i, word in enumerate(words) if word.upper() in ("CPU", "NUMA", "GPU")), len(words))
        columns = words[:end]
        devices = [name for name in columns if _GPU.fullmatch(name)]
        if len(set(columns)) < len(columns):
            raise ConfigError(f"{source}: {_NO_TABLE}: a column appears twice in its header")
        if columns[: len(devices)] != devices:
            raise ConfigError(f"{source}: {_NO_TABLE}: network cards stand between devices in its header")
        return columns, lines[number + 1 :]
    raise ConfigError(f"{source}: {_NO_TABLE}: no line begins with the columns GPU0, GPU1, …")


def _row(words: list[str], columns: list[str], source: str) -> list[Path]:
    """The cells of a row: all of them, or those before the line was cut off."""
    found = []
    for column, word in zip(columns, words[1:], strict=False):
        if not _CELL.fullmatch(word):
            raise ConfigError(
                f"{source}: between {words[0]} and {column} stands {word!r}, which is none of X, NV#, PIX, PXB, PHB,"
                " NODE, SYS"
            )
        kind = word.upper()
        # Names of old drivers: SOC is SYS; PSB, a switch of its own, is PIX.
        kind = {"SOC": "SYS", "PSB": "PIX"}.get(kind, kind)
        found.append(Path("NV", int(kind[2:])) if kind.startswith("NV") else Path(kind))
    return found


def _mirrored(cells: dict[tuple[int, int], Path], i: int, j: int, columns: list[str], source: str) -> Path:
    if i == j:
        if cells.get((i, i), SELF) != SELF:
            raise ConfigError(f"{source}: {columns[i]} has {cells[i, i]} to itself, not X")
        return SELF
    here, there = cells.get((i, j)), cells.get((j, i))
    if here is None and there is None:
        raise ConfigError(f"{source}: the table ends before it says what is between {columns[i]} and {columns[j]}")
    if here is not None and there is not None and here != there:
        raise ConfigError(f"{source}: {columns[i]} to {columns[j]} is {here}, but the other way it is {there}")
    path = here or there
    assert path is not None
    if path == SELF or path == Path("NV", 0):
        raise ConfigError(f"{source}: {columns[i]} and {columns[j]} are two devices, but between them stands {path}")
    return path


def _near(rest: list[str]) -> str:
    """NUMA node, or else cores, of the columns to the right: any of them may be blank or N/A."""
    told = [word for word in rest if word.upper() != "N/A"]
    return told[1] if len(told) > 1 else told[0] if told else ""


def _nic_legend(lines: list[list[str]]) -> dict[str, str]:
    """New drivers number the network cards and say below the table: `NIC0: mlx5_0`."""
    return {words[0][:-1]: words[1] for words in lines if len(words) == 2 and re.fullmatch(r"NIC\d+:", words[0])}


def uniform(count: int, path: Path) -> Topology:
    """A machine in which every pair of devices is joined alike."""
    return drawn(count, dict.fromkeys(combinations(range(count), 2), path), path)


def drawn(count: int, pairs: dict[tuple[int, int], Path], otherwise: Path, numa: Sequence[str] = ()) -> Topology:
    """A machine of so many devices, with what is between the pairs (i, j), i < j, and otherwise."""
    rows = [[SELF] * count for _ in range(count)]
    for i, j in combinations(range(count), 2):
        rows[i][j] = rows[j][i] = pairs.get((i, j), otherwise)
    names = tuple(f"GPU{i}" for i in range(count))
    return Topology(names, (), tuple(tuple(row) for row in rows), tuple(numa) or ("",) * count)
