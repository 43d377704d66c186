"""What else could be asked, or asked of, when a candidate or a whole cluster cannot do it: fewer bits, a shorter
context, fewer requests at once, more devices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from holdfast.core.errors import ConfigError
from holdfast.hardware.catalogue import catalogue, find_link
from holdfast.hardware.cluster import USUAL_NETWORK, Cluster, cluster_of
from holdfast.planner.candidates import Candidate, kinds_of
from holdfast.planner.estimate import Estimate, Question, estimate, has_room, memory_of, shares_of
from holdfast.planner.goal import Goal
from holdfast.planner.memory.capacity import max_context
from holdfast.planner.memory.ranks import KV_FORMATS
from holdfast.planner.search import Found, candidates, search
from holdfast.planner.serving import Served
from holdfast.planner.show.breakdown import at_concurrency

LESS_WEIGHT = (8.0, 4.0)
"""Bits of weights that are proposed where there are more."""
LESS_KV = ("fp8", "int4")
MOST_DEVICES_TIMED = 256
"""Larger clusters are looked at for whether the model fits; not timed."""
MOST_DEVICES_TIMED_MIXED = 32
"""The same of several kinds, which can be joined in many more ways."""
MOST_DOUBLINGS = 6
ENOUGH = 0.97
"""Twice the devices must bring at least so much."""
NEAREST = 12
"""Candidates at the top of a ranking that are asked again with fewer requests."""


def fewer_bits(question: Question) -> list[float]:
    """Of weights, fewer than they have now."""
    now = max(question.shape.weight_bits, question.shape.expert_bits)
    return [bits for bits in LESS_WEIGHT if bits < now * 0.99]


def smaller_kv_formats(question: Question) -> list[str]:
    """With fewer bits than the one asked for."""
    return [name for name in LESS_KV if KV_FORMATS[name].bits < KV_FORMATS[question.goal.kv_format].bits]


def fits(question: Question, candidate: Candidate) -> bool:
    """Whether a sequence of the goal's length fits beside the weights; by memory alone."""
    stages, shares = memory_of(question, candidate)
    return has_room(question, shares, [stage.kv_room for stage in stages])


def asked_again(question: Question, goal: Goal) -> Question:
    """The same model on the same cluster with another goal."""
    return Question.of(question.shape, question.cluster, goal, question.known)


def fitting_bits(question: Question, some: Sequence[Candidate]) -> tuple[float, Candidate] | None:
    """The most bits of weights with which one of them fits, and which."""
    for bits in fewer_bits(question):
        asked = asked_again(question, replace(question.goal, weight_bits=bits))
        for candidate in some:
            if fits(asked, candidate):
                return bits, candidate
    return None


def fitting_kv_format(question: Question, some: Sequence[Candidate]) -> tuple[str, Candidate] | None:
    """The format with most bits of a number with which one of them fits, and which."""
    for name in smaller_kv_formats(question):
        asked = asked_again(question, replace(question.goal, kv_format=name))
        for candidate in some:
            if fits(asked, candidate):
                return name, candidate
    return None


def longest_context(question: Question, some: Estimate) -> int:
    """Tokens of the longest sequence that it has room for; 0: none."""
    rooms = [stage.kv_room for stage in some.stages]
    if min(rooms) <= 0:
        return 0
    return max_context(
        question.table, shares_of(question, some.candidate), rooms, question.load(), question.memory_engine
    )


# --- more devices ---


def larger_clusters(cluster: Cluster) -> Iterator[Cluster]:
    """Twice the devices, four times, …: of one known kind as machines of it are usually built, else as more nodes."""
    kinds = kinds_of(cluster)
    device, count = next(iter(kinds.items()))
    known = len(kinds) == 1 and device.name in catalogue().devices
    network = cluster.nodes[0].network
    for doubling in range(1, MOST_DOUBLINGS + 1):
        try:
            if known:
                yield cluster_of(f"{count << doubling}x{device.name}", network)
            else:
                yield _more_nodes(cluster, 1 << doubling)
        except ConfigError:  # more than there may be
            return


def _more_nodes(cluster: Cluster, times: int) -> Cluster:
    nodes = []
    for copy in range(times):
        for node in cluster.nodes:
            usual = USUAL_NETWORK.get(node.devices[0].pcie.name, "ethernet-100")
            network = node.network or find_link(usual)
            nodes.append(replace(node, name=f"{node.name}-{copy}", network=network))
    return replace(cluster, nodes=tuple(nodes))


def can_be_timed(cluster: Cluster) -> bool:
    """Whether a whole search over it takes no longer than a reader of an answer waits."""
    most = MOST_DEVICES_TIMED if len(kinds_of(cluster)) == 1 else MOST_DEVICES_TIMED_MIXED
    return len(cluster.devices) <= most


def where_it_fits(question: Question) -> tuple[Cluster, Candidate] | None:
    """The smallest of the larger clusters that the model fits, and the best candidate there: of very many devices
    the first that fits."""
    for cluster in larger_clusters(question.cluster):
        asked = replace(question, cluster=cluster)
        first = next((candidate for candidate in candidates(asked) if fits(asked, candidate)), None)
        if first is not None and can_be_timed(cluster):
            return cluster, search(question.shape, cluster, question.goal, question.known).best.candidate
        if first is not None:
            return cluster, first
    return None


def where_it_is_fast(question: Question) -> tuple[Cluster, Found] | None:
    """The smallest of the larger clusters on which the limits are kept; None when more devices bring no more."""
    before = math.inf
    for cluster in larger_clusters(question.cluster):
        if not can_be_timed(cluster):
            return None
        found = search(question.shape, cluster, question.goal, question.known)
        if found.best.fits and not found.best.misses:
            return cluster, found
        if found.best.served is not None:
            over = excess(question.goal, found.best.served)
            if over > before * ENOUGH:
                return None
            before = over
    return None


def excess(goal: Goal, served: Served) -> float:
    """How many times the limit that is missed most."""
    limits = ((goal.ttft, served.ttft), (goal.tpot, served.tpot))
    return max((value / limit for limit, value in limits if limit is not None), default=0)


def fast_with_fewer_bits(question: Question) -> tuple[float, str] | None:
    """The most bits of weights with which the limits are kept, and by which plan."""
    for bits in fewer_bits(question) if can_be_timed(question.cluster) else ():
        found = search(question.shape, question.cluster, replace(question.goal, weight_bits=bits), question.known)
        if found.best.fits and not found.best.misses:
            return bits, found.best.candidate.name
    return None


# --- fewer requests at once ---


@dataclass(frozen=True, slots=True)
class Fewer:
    """The most requests at once with which a candidate keeps the limits."""

    requests: int
    candidate: Candidate


def most_requests(question: Question, some: Estimate) -> int:
    """With which this one keeps the limits; 0: not even with one in each replica."""
    copies = len(some.candidate.replicas)

    def kept(each: int) -> bool:
        return not estimate(at_concurrency(question, each * copies), some.candidate).misses

    if not kept(1):
        return 0
    low, high = 1, max(some.concurrency // copies, 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kept(middle) else (low, middle)
    return low * copies


def fewer_requests(question: Question, ranking: Sequence[Estimate]) -> Fewer | None:
    """The candidate, of those nearest to the limits, that keeps them with most requests at once."""
    near = [some for some in ranking[:NEAREST] if some.fits]
    found = [Fewer(most_requests(question, some), some.candidate) for some in near]
    best = max(found, key=lambda fewer: fewer.requests, default=None)
    return best if best and best.requests else None
