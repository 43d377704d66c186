"""What every report of a found plan says, in a terminal, as JSON or as a page: who to name, what to warn of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

from holdfast.hardware.cluster import Cluster
from holdfast.planner.candidates import Candidate, DeviceGroup, kinds_of
from holdfast.planner.communication import exchanges_per_token
from holdfast.planner.estimate import Estimate, Question
from holdfast.planner.quantities import bytes_per_second, count, of_seconds
from holdfast.planner.search import Found
from holdfast.planner.show.breakdown import exchanges

MOST_RUNNERS = 8
MOST_STAGES = 8
"""So many stages are listed one by one; of more, equal neighbours together."""


def runners(found: Found, most: int = MOST_RUNNERS) -> list[Estimate]:
    """The best, and those after it that differ in more than how many layers each stage has, or in which order it
    uses the kinds of devices; and the best of those with equal stages, and of those that the engine runs."""
    seen: dict[tuple[object, ...], Estimate] = {}
    for some in found.ranking:
        candidate = some.candidate
        groups = Counter((group.device.name, group.degree) for group in candidate.replicas[0])
        key = (
            frozenset(groups.items()), len(candidate.replicas), candidate.expert_ranks, candidate.shard_weights,
            candidate.is_even,
        )  # fmt: skip
        seen.setdefault(key, some)
        if len(seen) == most:
            break
    chosen = list(seen.values())
    wanted = dict.fromkeys(some for some in (found.best_that_runs, found.best_even) if some is not None)
    others = [some for some in wanted if all(other is not some for other in chosen)]
    return chosen[: most - len(others)] + others


def marked(found: Found, some: Estimate, number: int) -> str:
    """Its place in the ranking, and ◆ where no other beats it in everything, ✗ where the engine does not run it."""
    return f"{number}{' ◆' if is_pareto(found, some) else ''}{' ✗' if found.refuses(some) else ''}"


def is_pareto(found: Found, some: Estimate) -> bool:
    return any(some is other for other in found.pareto)


def error_band(question: Question, metric: str) -> float:
    """How far off, as a share, nine in ten predictions are at most: `tpot`, `ttft`, `throughput`."""
    return question.known.bands[metric] - 1


def of_runtime(found: Found) -> str:
    """What the engine runs of it, in a sentence or two, where that is not the best plan of all; else ""."""
    question, best, better = found.question, found.best, found.better
    if better is not None:
        return (
            f"A better plan was found that Holdfast does not run yet, {short_name(question, better.candidate)} "
            f"({_figures(better)}, against {_figures(best)}): {found.refuses(better)}."
        )
    if best.served is None or not (reason := found.refuses(best)):
        return ""
    runs = found.best_that_runs
    instead = (
        f"The best that it runs is {short_name(question, runs.candidate)} ({_figures(runs)})"
        if runs
        else "It runs none that fits"
    )
    return f"Holdfast does not run this plan yet: {reason}. {instead}."


def _figures(some: Estimate) -> str:
    assert some.served is not None
    missed = f"; {' and '.join(some.misses)}" if some.misses else ""
    return f"TPOT {of_seconds(some.served.tpot)}, {count(some.throughput)} tokens/s{missed}"


# --- where the parts of a plan lie ---


@dataclass(frozen=True, slots=True)
class StageRun:
    """Consecutive stages first … last of a replica that are alike."""

    first: int
    last: int
    layers: tuple[int, int]
    """Of all of them together: first … last - 1."""
    groups: tuple[DeviceGroup, ...]

    @property
    def name(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}–{self.last}"

    @property
    def layer_range(self) -> str:
        first, last = self.layers
        return f"{first}–{last - 1}" if last - first > 1 else str(first)


def stage_runs(candidate: Candidate, replica: int = 0) -> list[StageRun]:
    """The stages of a replica: each, or where there are many, equal neighbours together."""
    groups = candidate.replicas[replica]
    borders = list(pairwise((0, *accumulate(candidate.layers))))
    together = len(groups) > MOST_STAGES

    def alike(stage: int) -> tuple[object, ...]:
        group = groups[stage]
        same = (group.device, group.degree, group.nodes, group.slowest_link, candidate.layers[stage])
        return same if together else (stage,)

    runs = []
    for _, numbers in groupby(range(len(groups)), key=alike):
        some = list(numbers)
        layers = (borders[some[0]][0], borders[some[-1]][1])
        runs.append(StageRun(some[0], some[-1], layers, tuple(groups[stage] for stage in some)))
    return runs


def alike_replicas(candidate: Candidate) -> list[tuple[int, int]]:
    """Replicas of one shape together: (the first of them, how many)."""
    counts: dict[tuple[object, ...], list[int]] = {}
    for number, groups in enumerate(candidate.replicas):
        shape = tuple((group.device, group.degree, group.slowest_link) for group in groups)
        counts.setdefault(shape, []).append(number)
    return [(numbers[0], len(numbers)) for numbers in counts.values()]


def devices_named(cluster: Cluster, groups: Sequence[DeviceGroup]) -> str:
    """node0: 0–3; node1: 0–7."""
    by_node: dict[int, list[int]] = {}
    for group in groups:
        for node, index in group.places:
            by_node.setdefault(node, []).append(index)
    parts = []
    for indices, nodes in groupby(by_node, key=lambda node: _ranges(sorted(by_node[node]))):
        names = [cluster.nodes[node].name for node in nodes]
        where = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
        parts.append(f"{where}: {indices}")
    return "; ".join(parts)


def _ranges(numbers: Sequence[int]) -> str:
    """0–3, 6."""
    found = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        some = [number for _, number in run]
        found.append(str(some[0]) if len(some) == 1 else f"{some[0]}–{some[-1]}")
    return ", ".join(found)


def kinds_used(question: Question, candidate: Candidate) -> str:
    """In which order it uses the kinds of devices, as letters; "" where there is one kind."""
    letters = {device: chr(ord("A") + index) for index, device in enumerate(kinds_of(question.cluster))}
    if len(letters) == 1:
        return ""
    return "→".join(dict.fromkeys(letters[group.device] for group in candidate.replicas[0]))


def short_name(question: Question, candidate: Candidate) -> str:
    """TP2 × PP2 B→A: the letters are those of `cluster_named`."""
    return f"{candidate.name} {kinds_used(question, candidate)}".strip()


def cluster_named(cluster: Cluster) -> str:
    """2 nodes, 16 × H100-80GB-SXM."""
    kinds = kinds_of(cluster)
    letters = [f" ({chr(ord('A') + index)})" if len(kinds) > 1 else "" for index in range(len(kinds))]
    devices = " + ".join(
        f"{count} × {device.name}{letter}" for (device, count), letter in zip(kinds.items(), letters, strict=True)
    )
    return devices if len(cluster.nodes) == 1 else f"{devices} on {len(cluster.nodes)} nodes"


# --- what to warn of ---


def warnings(found: Found) -> list[str]:
    """What the figures of the best plan do not say by themselves."""
    question = found.question
    return [*_of_times(question), *_of_paths(question, found.best), *_of_sites(question)]


def _of_times(question: Question) -> Iterator[str]:
    engine = question.goal.engine
    yield (
        f"Times are what {engine} would take, by a model fitted to measurements of it published elsewhere; on GPUs "
        "Holdfast itself has not been measured. Memory is reckoned as Holdfast takes it."
    )
    if any(device.scale_up is None and device.pcie.kind == "shared-memory" for device in kinds_of(question.cluster)):
        yield "No CPU was among these measurements: its times say little more than which plan is the better one."


def _of_paths(question: Question, best: Estimate) -> Iterator[str]:
    if best.served is None:
        return
    drawn = [
        f"{exchange.what} of {exchange.ranks} ranks over {exchange.link.name}"
        for exchange in exchanges(question, best)
        if exchange.path.source != "measured"
    ]
    if drawn:
        yield f"Reckoned from the link, not from measurements: {', '.join(dict.fromkeys(drawn))}."


def _of_sites(question: Question) -> Iterator[str]:
    """Tensor parallelism over sites is not among the candidates: why."""
    cluster = question.cluster
    sites = list(dict.fromkeys(node.site for node in cluster.nodes))
    if len(sites) == 1:
        return
    layers, link = question.shape.num_layers, cluster.between_sites
    waits = exchanges_per_token(layers, tensor=True) * link.latency
    yield (
        f"Tensor parallelism between the sites {', '.join(site or 'unnamed' for site in sites)} is refused: 2 "
        f"all-reduces a layer × {layers} layers × {of_seconds(link.latency)} of latency = {of_seconds(waits)} for "
        f"every token, whatever the bandwidth ({bytes_per_second(link.bandwidth)} per direction); replicas at each "
        "site send nothing to each other."
    )
