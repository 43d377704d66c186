"""Which devices belong together: islands, groups for tensor parallelism, and the order to number devices in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

from holdfast.core.errors import ConfigError
from holdfast.hardware.topology import Path, Topology

EXACT_DEVICES = 12
"""Up to so many devices all partitions are looked at (at most 15,400); beyond, greedy with exchanges."""


@dataclass(frozen=True)
class Group:
    """Devices that work together. `worst`: the slowest path of any pair of them. `ring`: the slowest path of the best
    ring through all; in a hybrid cube mesh a ring of 8 stays on NVLink, though some pairs are not joined by it.
    Beyond `EXACT_DEVICES` no ring is looked for, and it is the slowest pair's."""

    devices: tuple[int, ...]
    worst: Path
    ring: Path


@dataclass(frozen=True)
class BadOrder:
    """Consecutive groups of `size` in a given order have slower links than they need.

    `groups` are the consecutive ones, of devices; `slow` those of them whose slowest path could be avoided.
    """

    size: int
    groups: tuple[Group, ...]
    slow: tuple[Group, ...]
    best: tuple[Group, ...]


def islands(topology: Topology) -> tuple[tuple[int, ...], ...]:
    """The devices in maximal groups in which every pair is joined by the fast kind of path, the largest first taken.

    The fast kind is NVLink where there is any, else PCIe within a NUMA node. Where neither is, all pairs are alike,
    and every device is an island of its own.
    """
    left = set(range(len(topology.devices)))
    fast = _fast_neighbours(topology)
    found = []
    while left:
        # Among the largest groups, the one with most bandwidth inside, then the one of the first devices.
        cliques = _maximal_cliques(fast, left)
        best = min(cliques, key=lambda clique: (-len(clique), -_inside(topology, clique), clique))
        found.append(best)
        left -= set(best)
    return tuple(sorted(found))


def slow_edges(topology: Topology) -> tuple[tuple[int, int, Path], ...]:
    """The pairs of devices that are not joined by the fast kind, i < j; none where all pairs are alike."""
    fast = _fast_neighbours(topology)
    if not any(fast):
        return ()
    pairs = combinations(range(len(topology.devices)), 2)
    return tuple((i, j, topology.between(i, j)) for i, j in pairs if j not in fast[i])


def groups_of(topology: Topology, size: int, labels: Sequence[str] = ()) -> tuple[Group, ...]:
    """The best partition of the devices into groups of `size`; devices that are left over are in none.

    Best is, in this order: fewest groups of mixed `labels` (types of devices; none: all alike); the slowest path in
    each group, the slowest group first; most bandwidth inside; short ways; one NUMA node; consecutive numbers.
    Raises ConfigError unless 1 <= size <= number of devices.
    """
    count = len(topology.devices)
    if not 1 <= size <= count:
        raise ConfigError(
            f"a group of {size} devices is impossible: the machine has {count}, a group has 1 to {count}"
        )
    worth = _Worth(topology, labels or ("",) * count)
    if worth.alike:
        best = _consecutive(range(count), size)
    elif count <= EXACT_DEVICES:
        best = max(_partitions(tuple(range(count)), size), key=worth.of)
    else:
        starts = (list(_consecutive(range(count), size)), _greedy(tuple(range(count)), size, worth))
        best = _exchanged(max(starts, key=worth.of), count, worth)
    return tuple(group_of(topology, devices) for devices in best)


def group_of(topology: Topology, devices: Iterable[int]) -> Group:
    """These devices as a group, with its slowest pair and the slowest path of its best ring."""
    members = tuple(sorted(devices))
    paths = [topology.between(i, j) for i, j in combinations(members, 2)]
    if not paths:
        return Group(members, Path("X"), Path("X"))
    return Group(members, max(paths, key=_slowness), _ring(topology, members))


def good_order(topology: Topology) -> tuple[int, ...]:
    """An order of the devices in which consecutive groups of 2, 4, 8, … are good ones: each is made of good halves.

    The order the devices have is kept where it is as good.
    """
    count = len(topology.devices)
    order = tuple(range(count))
    return order if not bad_orders(topology, order) else _nested(topology, order)


def bad_orders(topology: Topology, order: Sequence[int]) -> tuple[BadOrder, ...]:
    """Where consecutive groups of 2, 4, 8, … in this order have slower paths than groups of this size need have.

    Raises ConfigError when the order names a device twice or one that is not there.
    """
    count = len(topology.devices)
    for device in order:
        if not 0 <= device < count:
            raise ConfigError(f"device {device} is not there: the devices are 0 to {count - 1}")
    if len(set(order)) < len(order):
        raise ConfigError(f"a device appears twice in the order {','.join(map(str, order))}")
    seen = topology.only(order)
    fastest = max((seen.between(i, j).speed for i, j in combinations(range(len(order)), 2)), default=0.0)
    found = []
    size = 2
    while size < len(order):
        given = tuple(group_of(seen, devices) for devices in _consecutive(range(len(order)), size))
        best = given if all(group.worst.speed == fastest for group in given) else groups_of(seen, size)
        if _speeds(given) != _speeds(best):
            limit = _speeds(best)
            # A group is to blame where it is slower than the group of its place in the best partition.
            by_speed = sorted(given, key=lambda group: group.worst.speed)
            slow = [group for group, need in zip(by_speed, limit, strict=True) if group.worst.speed < need]
            found.append(BadOrder(size, *(_as_numbered(groups, order) for groups in (given, slow, best))))
        size *= 2
    return tuple(found)


# ---- cliques, partitions, rings ----------------------------------------------------------------------------------


def _slowness(path: Path) -> tuple[float, int]:
    return -path.speed, path.climb


def _speeds(groups: Iterable[Group]) -> list[float]:
    return sorted(group.worst.speed for group in groups)


def _as_numbered(groups: Iterable[Group], order: Sequence[int]) -> tuple[Group, ...]:
    return tuple(Group(tuple(order[i] for i in group.devices), group.worst, group.ring) for group in groups)


def _consecutive(devices: Sequence[int], size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(devices[at : at + size]) for at in range(0, len(devices) - size + 1, size))


def _inside(topology: Topology, devices: Iterable[int]) -> float:
    return sum(topology.between(i, j).speed for i, j in combinations(devices, 2))


def _fast_neighbours(topology: Topology) -> list[set[int]]:
    count = len(topology.devices)
    pairs = list(combinations(range(count), 2))
    nvlink = any(topology.between(i, j).kind == "NV" for i, j in pairs)
    neighbours: list[set[int]] = [set() for _ in range(count)]
    for i, j in pairs:
        kind = topology.between(i, j).kind
        if kind == "NV" if nvlink else kind != "SYS":
            neighbours[i].add(j)
            neighbours[j].add(i)
    return neighbours


def _maximal_cliques(neighbours: Sequence[set[int]], among: set[int]) -> list[tuple[int, ...]]:
    """All maximal cliques (Bron and Kerbosch 1973, with pivots)."""
    found: list[tuple[int, ...]] = []

    def extend(clique: list[int], candidates: set[int], excluded: set[int]) -> None:
        if not candidates and not excluded:
            found.append(tuple(sorted(clique)))
            return
        pivot = max(candidates | excluded, key=lambda device: len(neighbours[device] & candidates))
        for device in sorted(candidates - neighbours[pivot]):
            extend([*clique, device], candidates & neighbours[device], excluded & neighbours[device])
            candidates = candidates - {device}
            excluded = excluded | {device}

    extend([], set(among), set())
    return found


class _Worth:
    """How good a partition is, as a tuple to compare: see `groups_of`."""

    def __init__(self, topology: Topology, labels: Sequence[str]) -> None:
        self._topology, self._labels = topology, labels
        self._group = lru_cache(maxsize=None)(self._of_group)
        paths = {topology.between(i, j) for i, j in combinations(range(len(labels)), 2)}
        # Of many devices that are joined alike, where they are near to is not worth the search.
        one_place = len(set(topology.numa)) == 1 or len(labels) > EXACT_DEVICES
        self.alike = len(paths) <= 1 and len(set(labels)) == 1 and one_place

    def of(self, partition: Sequence[tuple[int, ...]]) -> tuple[object, ...]:
        groups = [self._group(devices) for devices in partition]
        return (
            -sum(mixed for mixed, *_ in groups),
            sorted(worst for _, worst, *_ in groups),
            sum(inside for _, _, inside, *_ in groups),
            -sum(climb for *_, climb, _ in groups),
            -sum(spread for *_, spread in groups),
            [-device for devices in partition for device in devices],
        )

    def _of_group(self, devices: tuple[int, ...]) -> tuple[int, float, float, int, int]:
        paths = [self._topology.between(i, j) for i, j in combinations(devices, 2)]
        mixed = len({self._labels[i] for i in devices}) > 1
        worst = min((path.speed for path in paths), default=0.0)
        near = len({self._topology.numa[i] for i in devices})
        return int(mixed), worst, sum(path.speed for path in paths), sum(path.climb for path in paths), near


def _partitions(devices: tuple[int, ...], size: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """All ways to make as many groups of `size` as there can be; with devices left over, any may be."""
    if len(devices) < size:
        yield ()
        return
    first, rest = devices[0], devices[1:]
    for others in combinations(rest, size - 1):
        left = tuple(device for device in rest if device not in others)
        for groups in _partitions(left, size):
            yield ((first, *others), *groups)
    if len(devices) % size:
        yield from _partitions(rest, size)


def _greedy(devices: tuple[int, ...], size: int, worth: _Worth) -> list[tuple[int, ...]]:
    """Groups grown one after another, each by the device that keeps it best."""
    left = list(devices)
    groups: list[tuple[int, ...]] = []
    while len(left) >= size:
        group: tuple[int, ...] = (left.pop(0),)
        while len(group) < size:
            nearest = max(left, key=lambda device: worth.of([tuple(sorted((*group, device)))]))
            left.remove(nearest)
            group = tuple(sorted((*group, nearest)))
        groups.append(group)
    return groups


def _exchanged(groups: list[tuple[int, ...]], count: int, worth: _Worth) -> tuple[tuple[int, ...], ...]:
    """Exchange two devices of different groups (or one that is left over) while that makes the partition better."""
    used = {device for group in groups for device in group}
    spare = tuple(device for device in range(count) if device not in used)
    places = [*groups, spare]
    better = True
    while better:
        better = False
        for a, b in combinations(range(len(places)), 2):
            for mine in places[a]:
                for theirs in places[b]:
                    tried = list(places)
                    tried[a] = tuple(sorted({*places[a], theirs} - {mine}))
                    tried[b] = tuple(sorted({*places[b], mine} - {theirs}))
                    if worth.of(sorted(tried[:-1])) > worth.of(sorted(places[:-1])):
                        places, better = tried, True
                        break
                else:
                    continue
                break
    return tuple(sorted(places[:-1]))


def _nested(topology: Topology, devices: tuple[int, ...]) -> tuple[int, ...]:
    """The devices in an order made of good groups of half as many, each ordered so in turn."""
    size = 1
    while size * 2 < len(devices):
        size *= 2
    if size == 1:
        return devices
    groups = groups_of(topology.only(devices), size)
    used = {i for group in groups for i in group.devices}
    spare = [device for i, device in enumerate(devices) if i not in used]
    parts = [_nested(topology, tuple(devices[i] for i in group.devices)) for group in groups]
    return (*(device for part in parts for device in part), *spare)


def _ring(topology: Topology, members: Sequence[int]) -> Path:
    """The slowest path of the ring through all members whose slowest path is fastest."""
    if len(members) <= 2:
        return topology.between(members[0], members[-1])
    paths = {topology.between(i, j) for i, j in combinations(members, 2)}
    levels = sorted(paths, key=_slowness)
    for level in levels[:-1]:
        usable = {
            i: [j for j in members if j != i and _slowness(topology.between(i, j)) <= _slowness(level)]
            for i in members
        }
        if len(members) <= EXACT_DEVICES and _closes(usable, (members[0],), len(members)):
            return level
    return levels[-1]


def _closes(usable: dict[int, list[int]], walked: tuple[int, ...], count: int) -> bool:
    """Whether a walk can be made a ring through all `count` devices."""
    if len(walked) == count:
        return walked[0] in usable[walked[-1]]
    return any(_closes(usable, (*walked, device), count) for device in usable[walked[-1]] if device not in walked)
