"""The picture of where a plan lies: nodes, their devices by stage and replica, the links that groups work over.

Nodes that hold the same parts of a replica are drawn once, with how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise

from holdfast.hardware.catalogue import Link
from holdfast.hardware.cluster import Cluster
from holdfast.planner.candidates import Candidate, DeviceGroup
from holdfast.planner.estimate import Estimate, Question
from holdfast.planner.quantities import bytes_per_second
from holdfast.planner.show.pictures import WIDTH, rectangle, svg, text

MOST_NODES = 12
"""So many kinds of nodes are drawn, the rest is said in words."""
DEVICE = (50, 40)
"""Pixels of a device, and the gap to the next."""
GAP = 6
PANEL = (WIDTH - 40) / 2
NARROWEST = 100
"""Pixels of a group: room for its layers."""
ALONE, FAST, SLOW, SLOWEST = "alone", "fast", "slow", "slowest"


@dataclass(frozen=True, slots=True)
class Part:
    """The devices of one node that belong to one stage of one replica. `replica` None: they are not used."""

    replica: int | None
    stage: int
    layers: tuple[int, int]
    indices: tuple[int, ...]
    group: DeviceGroup | None

    @property
    def frame(self) -> float:
        """Pixels around its devices,"""
        return len(self.indices) * (DEVICE[0] + GAP) + GAP

    @property
    def width(self) -> float:
        """and with what is written below."""
        return max(NARROWEST, self.frame)


def parts_by_node(cluster: Cluster, candidate: Candidate) -> dict[int, list[Part]]:
    """What each node holds, in order of replicas and stages; what it does not use last."""
    borders = list(pairwise((0, *accumulate(candidate.layers))))
    found: dict[int, list[Part]] = {number: [] for number in range(len(cluster.nodes))}
    for replica, groups in enumerate(candidate.replicas):
        for stage, group in enumerate(groups):
            for here in dict.fromkeys(node for node, _ in group.places):
                indices = tuple(index for where, index in group.places if where == here)
                found[here].append(Part(replica, stage, borders[stage], indices, group))
    for number, node in enumerate(cluster.nodes):
        used = {index for part in found[number] for index in part.indices}
        if rest := tuple(index for index in range(len(node.devices)) if index not in used):
            found[number].append(Part(None, 0, (0, 0), rest, None))
    return found


def alike_nodes(cluster: Cluster, parts: dict[int, list[Part]]) -> list[list[int]]:
    """Nodes with the same devices in the same parts of a replica together, whichever replica it is."""
    together: dict[tuple[object, ...], list[int]] = {}
    for number, node in enumerate(cluster.nodes):
        order = list(dict.fromkeys(part.replica for part in parts[number]))
        held = tuple((order.index(part.replica), part.stage, part.indices) for part in parts[number])
        together.setdefault((node.devices, node.site, held), []).append(number)
    return list(together.values())


def placement(question: Question, best: Estimate) -> str:
    """The picture, and what does not go into it in words below."""
    cluster, candidate = question.cluster, best.candidate
    parts = parts_by_node(cluster, candidate)
    alike = alike_nodes(cluster, parts)
    body: list[str] = []
    bottoms = [0.0, 0.0]
    shown = alike[:MOST_NODES]
    for numbers in shown:
        column = 0 if len(shown) == 1 else bottoms.index(min(bottoms))
        x, y = column * (PANEL + 40), bottoms[column]
        width = WIDTH if len(shown) == 1 else PANEL
        height = _panel(body, cluster, candidate, numbers, parts[numbers[0]], (x, y, width))
        if len(shown) > 1:
            inner = PANEL if column == 0 else PANEL + 40
            body.append(_line(inner, y + 14, PANEL + 20, y + 14))
        bottoms[column] = y + height + 14
    height = max(bottoms)
    if len(shown) > 1:
        body.append(_line(PANEL + 20, 14, PANEL + 20, height))
    words = _words(cluster, len(alike) - len(shown))
    return svg(height + 2, body, "Placement of the plan on the devices") + _key(candidate) + words


def _panel(  # noqa: PLR0917
    body: list[str], cluster: Cluster, candidate: Candidate, numbers: Sequence[int], parts: Sequence[Part],
    at: tuple[float, float, float],
) -> float:  # fmt: skip
    """Draws a node, and returns its height."""
    x, y, width = at
    node = cluster.nodes[numbers[0]]
    inside: list[str] = []
    left, top, row_height = x + 10, y + 30, 0.0
    for part in parts:
        if left + part.width > x + width - 6 and left > x + 10:
            left, top = x + 10, top + row_height + 8
        row_height = DEVICE[1] + 2 * GAP + 32
        _group(inside, candidate, part, node.devices[part.indices[0]].name, (left, top))
        left += part.width + 8
    height = top + row_height + 8 - y
    body.append(rectangle(x, y, width, height, "node"))
    where = f", {node.site}" if node.site not in ("", node.name) else ""
    title = f"{node.name}{where}" if len(numbers) == 1 else f"{node.name} and {len(numbers) - 1} nodes alike{where}"
    body.append(text(x + 10, y + 19, title, "title"))
    body.extend(inside)
    return height


def _group(body: list[str], candidate: Candidate, part: Part, device: str, at: tuple[float, float]) -> None:
    x, y = at
    rows = DEVICE[1] + 2 * GAP
    kind = "unused" if part.group is None else speed(part.group)
    link = part.group.slowest_link if part.group else None
    body.append(rectangle(x, y, part.frame, rows, f"group {kind}", hint=_link_named(link)))
    hue = _hue(candidate, part)
    for number, index in enumerate(part.indices):
        left = x + GAP + number * (DEVICE[0] + GAP)
        style = "" if part.replica is None else f"fill:hsl({hue} 60% 70%)"
        body.append(rectangle(left, y + GAP, *DEVICE, "device", style=style, hint=f"{device}, device {index}"))
        body.append(text(left + DEVICE[0] / 2, y + GAP + 18, str(index), "number", "middle"))
        body.append(text(left + DEVICE[0] / 2, y + GAP + 32, device.split("-", maxsplit=1)[0][:8], "kind", "middle"))
    first, second = _captions(candidate, part)
    body.append(text(x + 2, y + rows + 13, first, "small"))
    body.append(text(x + 2, y + rows + 26, second, "small"))


def _captions(candidate: Candidate, part: Part) -> tuple[str, str]:
    if part.replica is None:
        return "not used", ""
    names = []
    if len(candidate.replicas) > 1:
        names.append(f"replica {part.replica}")
    if len(candidate.layers) > 1:
        names.append(f"stage {part.stage}")
    first, last = part.layers
    layers = f"layers {first}–{last - 1}" if last - first > 1 else f"layer {first}"
    if not names:
        return "the whole model", layers
    return (
        (", ".join(names), layers)
        if part.width > 130 or len(names) == 1
        else (f"r{part.replica}, stage {part.stage}", layers)
    )


def speed(group: DeviceGroup) -> str:
    """The class of the links that its devices share layers over."""
    if group.degree == 1:
        return ALONE
    if group.slowest_link.kind == "nvlink":
        return FAST
    return SLOWEST if group.network is not None else SLOW


def _hue(candidate: Candidate, part: Part) -> int:
    """By stage; where there is one stage, by replica."""
    if part.replica is None:
        return 0
    number, count = (
        (part.stage, len(candidate.layers)) if len(candidate.layers) > 1 else (part.replica, len(candidate.replicas))
    )
    return round(210 + 360 * (number % 12) / min(count, 12)) % 360


def _link_named(link: Link | None) -> str:
    return "" if link is None else f"{link.name}, {bytes_per_second(link.bandwidth)} per direction"


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="network"/>'


def _key(candidate: Candidate) -> str:
    """Which frame means which link, of those there are."""
    kinds: dict[str, str] = {}
    for group in candidate.replicas[0]:
        if group.degree > 1:
            kinds.setdefault(speed(group), _link_named(group.slowest_link))
    entries = "".join(
        f'<span><i class="key {kind}"></i>layers shared over {escape(link)}</span>' for kind, link in kinds.items()
    )
    return f'<div class="legend">{entries}</div>' if entries else ""


def _words(cluster: Cluster, more: int) -> str:
    sentences = []
    if more:
        sentences.append(f"{more} further kinds of nodes go on in the same way.")
    sites = [node.site for node in cluster.nodes]
    networks = dict.fromkeys(f"{n.nics} × {_link_named(n.network)}" for n in cluster.nodes if n.network)
    if len(set(sites)) < len(sites) and networks:
        sentences.append(f"Between nodes: {'; '.join(networks)}.")
    if len(set(sites)) > 1:
        sentences.append(f"Between sites: {_link_named(cluster.between_sites)}.")
    return f"<p>{escape(' '.join(sentences))}</p>" if sentences else ""
