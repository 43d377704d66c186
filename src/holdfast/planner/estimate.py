"""What a candidate needs of memory, how fast it is under a load, and what of a goal it misses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

from holdfast.hardware.catalogue import Link
from holdfast.hardware.cluster import Cluster
from holdfast.planner.candidates import Candidate, DeviceGroup, joined_as_usual
from holdfast.planner.coefficients import Coefficients
from holdfast.planner.communication import Path, path_of
from holdfast.planner.goal import Goal
from holdfast.planner.memory.capacity import kv_capacity_tokens, kv_room
from holdfast.planner.memory.engines import ENGINES, EngineMemory
from holdfast.planner.memory.ranks import (
    KV_FORMATS,
    RankMemory,
    ServingLoad,
    ShapeTable,
    kv_bytes_of_sequence,
    rank_memory,
    table_of,
)
from holdfast.planner.memory.shares import RankShare
from holdfast.planner.quantities import of_seconds
from holdfast.planner.serving import Replica, Served, Workload, serve
from holdfast.planner.shapes.shape import Layer, ModelShape
from holdfast.planner.timing import Stage, stage_of, stored_bits
from holdfast.planner.uneven import columns_of_fullest, fullest, most_heads_of_fullest

MEMORY_ENGINE = "holdfast"
BATCHED_TOKENS = 8192
"""Of a step: what activations are reckoned for."""
MAX_SEQUENCES = 1024
"""At once in a replica, where the goal does not say how many."""
MARGIN = 1.03
"""Predictions just below a limit are about as often above it when they are measured, so plans that keep their limits
with this to spare come first. More of it breaks fewer limits and makes more choices worse than they need be
(`benchmarks/RESULTS.md`)."""
Kinds = tuple[tuple[Layer, int], ...]


@dataclass(frozen=True, slots=True)
class Question:
    """All that is the same for every candidate."""

    shape: ModelShape
    table: ShapeTable
    """With the bits of weights that are asked for."""
    cluster: Cluster
    goal: Goal
    known: Coefficients
    kinds: dict[tuple[int, int], Kinds] = field(default_factory=dict)
    """Kinds of layers of each range that was asked for so far."""
    fullest: dict[tuple[int, int, int, int], Kinds] = field(default_factory=dict)

    @classmethod
    def of(cls, shape: ModelShape, cluster: Cluster, goal: Goal, known: Coefficients) -> Question:
        if goal.weight_bits is not None:
            bits = stored_bits(goal.weight_bits)
            shape = replace(shape, weight_bits=bits, expert_bits=bits)
        return cls(shape, table_of(shape), cluster, goal, known)

    @property
    def memory_engine(self) -> EngineMemory:
        return ENGINES[MEMORY_ENGINE]

    def load(self, sequences: int = 1) -> ServingLoad:
        return ServingLoad(self.goal.longest, sequences, BATCHED_TOKENS, KV_FORMATS[self.goal.kv_format])

    def kinds_of(self, first: int, last: int) -> Kinds:
        if (first, last) not in self.kinds:
            self.kinds[first, last] = self.shape.kinds_among(first, last)
        return self.kinds[first, last]

    def kinds_on_fullest(self, first: int, last: int, ranks: int, expert_ranks: int) -> Kinds:
        """As the fullest of so many ranks has them, even parts of them (`uneven`)."""
        key = (first, last, ranks, expert_ranks)
        if key not in self.fullest:
            kinds = self.kinds_of(first, last)
            self.fullest[key] = tuple((fullest(layer, ranks, expert_ranks), count) for layer, count in kinds)
        return self.fullest[key]


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Of the fullest rank of a stage: what it needs with the goal's load, and bytes of its device."""

    memory: RankMemory
    device_bytes: int
    kv_room: int
    """Bytes for KV cache; negative: missing."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A candidate, judged. Seconds; tokens per second of output, of all replicas together."""

    candidate: Candidate
    stages: tuple[StageMemory, ...]
    kv_tokens: int
    """Room of one replica's KV cache."""
    fits: bool
    """A sequence of the goal's length fits beside the weights."""
    concurrency: int
    """Requests at once in all replicas."""
    served: Served | None = None
    throughput: float = 0
    cost: float | None = None
    """Per million tokens of output, in what prices are given in."""
    reshaped: float = 0
    """Of one replica's throughput, what it has when it goes on without one of its ranks, at worst; 0: it cannot."""
    misses: tuple[str, ...] = ()
    """Limits that it does not keep, each as a short sentence."""
    tight: bool = False
    """A limit is kept, but with less than `MARGIN`."""

    @property
    def memory_used(self) -> float:
        """Share of the fullest device's memory that weights and working memory take."""
        return max(stage.memory.without_kv / stage.device_bytes for stage in self.stages)

    @property
    def spare(self) -> float:
        """Share of the throughput that is left when one rank is lost, at worst."""
        copies = len(self.candidate.replicas)
        return (copies - 1 + self.reshaped) / copies if self.served is not None else 0

    @property
    def throughput_left(self) -> float:
        """Tokens per second after that loss."""
        return self.spare * self.throughput

    @property
    def throughput_per_device(self) -> float:
        return self.throughput / self.candidate.num_devices


def shares_of(question: Question, candidate: Candidate) -> list[RankShare]:
    """The share of the fullest rank of each stage."""
    shares, depth = [], len(candidate.layers)
    borders = list(pairwise((0, *accumulate(candidate.layers))))
    for index, (bounds, degree) in enumerate(zip(borders, candidate.degrees, strict=True)):
        part, columns = 1 / degree, columns_of_fullest(degree)
        heads = most_heads_of_fullest((layer for layer, _ in question.kinds_of(*bounds)), degree)
        experts, expert_columns = (1.0, columns)
        if candidate.expert_parallel:
            experts, expert_columns = part / (len(candidate.replicas) if candidate.shared_experts else 1), 1.0
        shares.append(
            RankShare(
                bounds, heads, part, columns, part, experts, expert_columns,
                is_first=index == 0, is_last=index == depth - 1, ranks_in_stage=degree,
            )
        )  # fmt: skip
    return shares


def memory_of(question: Question, candidate: Candidate) -> tuple[tuple[StageMemory, ...], list[RankShare]]:
    """What the ranks of each stage need. Stages that are alike are reckoned once."""
    shares, load, engine = shares_of(question, candidate), question.load(), question.memory_engine
    spread = len(candidate.replicas) if candidate.shard_weights else 1
    known: dict[tuple[object, ...], RankMemory] = {}
    stages = []
    for share, group in zip(shares, candidate.stages, strict=True):
        linked = group.link.kind == "nvlink"
        kinds = question.kinds_of(*share.layers)
        key = (kinds, share.ranks_in_stage, share.is_first, share.is_last, linked)
        if key not in known:
            known[key] = rank_memory(question.table, share, load, engine, linked=linked, spread_over=spread)
        memory, size = known[key], group.device.memory_bytes
        stages.append(StageMemory(memory, size, kv_room(memory, size, engine)))
    return tuple(stages), shares


def estimate(question: Question, candidate: Candidate) -> Estimate:
    """Memory first; if a sequence fits, the steady state with as many requests as the goal says or allows."""
    stages, shares = memory_of(question, candidate)
    rooms = [stage.kv_room for stage in stages]
    load, goal = question.load(), question.goal
    tokens = kv_capacity_tokens(question.table, shares, rooms, load)
    if not has_room(question, shares, rooms):
        return Estimate(candidate, stages, tokens, False, 0)
    replica = Replica(stages_of(question, candidate), tokens, question.known.engines[goal.engine], question.known)
    copies = len(candidate.replicas)
    if goal.concurrency is not None:
        return _judged(question, candidate, stages, replica, _ceil(goal.concurrency, copies))
    most = max(1, int(tokens / (goal.input_len + replica.engine.reserve * goal.output_len)))
    return _best_load(question, candidate, stages, replica, min(most, MAX_SEQUENCES))


def has_room(question: Question, shares: Sequence[RankShare], rooms: Sequence[int]) -> bool:
    """Whether a sequence of the goal's length fits into the bytes that each stage's ranks have for KV cache."""
    return all(
        kv_bytes_of_sequence(question.table, share, question.goal.longest, question.load(), question.memory_engine)
        <= room
        for share, room in zip(shares, rooms, strict=True)
    )


def _best_load(
    question: Question, candidate: Candidate, stages: tuple[StageMemory, ...], replica: Replica, most: int
) -> Estimate:
    """With as many requests at once as serve the goal best: doubled until a limit is broken, since more at once are
    never answered sooner, then halved in between."""
    tried, each = [_judged(question, candidate, stages, replica, 1)], 1
    while each < most and not tried[-1].tight:
        each = min(2 * each, most)
        tried.append(_judged(question, candidate, stages, replica, each))
    low, high = each // 2, each
    while _breaks(tried) and high - low > max(1, low // 16):
        middle = (low + high) // 2
        tried.append(_judged(question, candidate, stages, replica, middle))
        low, high = (low, middle) if tried[-1].tight else (middle, high)
    return min(tried, key=lambda some: rank_key(question.goal, some))


def _breaks(tried: list[Estimate]) -> bool:
    """Some load keeps a limit too narrowly or not at all, and a smaller one does not."""
    return any(some.tight for some in tried) and not tried[0].tight


def _ceil(count: int, parts: int) -> int:
    return -(-count // parts)


def _judged(
    question: Question, candidate: Candidate, stages: tuple[StageMemory, ...], replica: Replica, each: int
) -> Estimate:
    """With `each` requests at once in every replica."""
    goal, copies = question.goal, len(candidate.replicas)
    served = serve(replica, Workload(goal.input_len, goal.output_len, each))
    misses, tight = [], False
    for name, limit, value in (("TTFT", goal.ttft, served.ttft), ("TPOT", goal.tpot, served.tpot)):
        tight = tight or (limit is not None and value * MARGIN > limit)
        if limit is not None and value > limit:
            misses.append(f"{name} {of_seconds(value)} is above {of_seconds(limit)}")
    throughput = served.throughput * copies
    if goal.concurrency is not None:
        throughput *= goal.concurrency / (each * copies)  # not as many in every replica: it was timed with the most
    price = price_per_hour(question.cluster, candidate)
    cost = None if price is None else price / (throughput * 3600) * 1e6
    return Estimate(
        candidate, stages, int(replica.kv_tokens), True, each * copies, served, throughput, cost,
        misses=tuple(misses), tight=tight,
    )  # fmt: skip


def stages_of(question: Question, candidate: Candidate) -> tuple[Stage, ...]:
    """Of the replica with the slowest links; stages that are alike are one object."""
    goal = question.goal
    engine = question.known.engines[goal.engine]
    groups, borders = candidate.stages, list(pairwise((0, *accumulate(candidate.layers))))
    made: dict[tuple[object, ...], Stage] = {}
    stages = []
    for index, (group, bounds) in enumerate(zip(groups, borders, strict=True)):
        last = index == len(groups) - 1
        kinds = question.kinds_on_fullest(*bounds, group.degree, candidate.expert_ranks)
        following = None if last else path_between(question.cluster, group, groups[index + 1])
        gather, gathered = _gathering(question, candidate, index)
        dispatch = dispatch_path(question, candidate, index)
        key = (
            kinds,
            group.device,
            group.degree,
            group.nodes,
            group.slowest_link,
            group.as_usual,
            following,
            gathered,
            dispatch,
            last,
        )
        if key not in made:
            stage = stage_of(
                question.shape, kinds, engine, device=group.device, tensor_parallel=group.degree,
                fabric=group.fabric, nodes=group.nodes,
                expert_parallel=candidate.expert_ranks,
                weight_bits=goal.weight_bits, kv_bits=KV_FORMATS[goal.kv_format].bytes_per_number * 8,
                next_path=following, gather_path=gather, gathered=gathered, last=last,
            )  # fmt: skip
            made[key] = replace(stage, dispatch_path=dispatch)
        stages.append(made[key])
    return tuple(stages)


def _gathering(question: Question, candidate: Candidate, stage: int) -> tuple[Path | None, float]:
    """The path to the same stage of another replica, and what comes over it in a step: all of a rank's weights but
    its own part."""
    copies = len(candidate.replicas)
    if not candidate.shard_weights or copies == 1:
        return None, 0
    share = shares_of(question, candidate)[stage]
    weights = rank_memory(question.table, share, question.load(), question.memory_engine).weights
    first, last = candidate.replicas[0][stage], candidate.replicas[-1][stage]
    link = question.cluster.link_between(first.places[0], last.places[0])
    fabric = replace(first.fabric, link=link, network=None, as_usual=False)
    return path_of("nccl", fabric, 1, copies, "all_gather"), weights * (copies - 1) / copies


def slowest_dispatch(cluster: Cluster, candidate: Candidate, stage: int) -> Link:
    """The slowest link from a replica's ranks of a stage to another replica's."""
    first, *others = (groups[stage].places[0] for groups in candidate.replicas)
    return min((cluster.link_between(first, other) for other in others), key=lambda link: link.bandwidth)


def dispatch_path(question: Question, candidate: Candidate, stage: int) -> Path | None:
    """Between all ranks that share out the experts of a stage; None: they are in one replica."""
    if not candidate.shared_experts:
        return None
    groups = [replica[stage] for replica in candidate.replicas]
    nodes = {node for group in groups for node, _ in group.places}
    link = slowest_dispatch(question.cluster, candidate, stage)
    first, ranks = groups[0], candidate.expert_ranks
    inside = _slowest_in_node(question.cluster, groups)
    usual = first.as_usual and joined_as_usual(first.device, inside, ranks // len(nodes))
    fabric = replace(first.fabric, link=inside, network=None, as_usual=usual)
    if len(nodes) == 1:
        return path_of("nccl", fabric, 1, ranks, "all_to_all")
    share = min(question.cluster.nodes[node].network_share for node in nodes)
    network = replace(link, bandwidth=min(link.bandwidth, share or link.bandwidth))
    even = ranks // len(nodes) * len(nodes)  # nodes of unlike sizes: as if they were alike
    return path_of("nccl", replace(fabric, network=network), len(nodes), even, "all_to_all")


def _slowest_in_node(cluster: Cluster, groups: Sequence[DeviceGroup]) -> Link:
    """Between the first group and those in its node; where it is alone there, inside it."""
    here = groups[0].places[0]
    mates = [group.places[0] for group in groups[1:] if group.places[0][0] == here[0]]
    links = [cluster.link_between(here, mate) for mate in mates] or [groups[0].link]
    return min(links, key=lambda link: link.bandwidth)


def path_between(cluster: Cluster, first: DeviceGroup, second: DeviceGroup) -> Path:
    """What carries a stage's results to the next."""
    link = cluster.link_between(first.places[0], second.places[0])
    fabric = replace(first.fabric, link=link, network=None, as_usual=False)
    return path_of("nccl", fabric, 1, 2, "send_recv")


def price_per_hour(cluster: Cluster, candidate: Candidate) -> float | None:
    """Of the nodes it uses; None where one has no price."""
    used = {node for groups in candidate.replicas for group in groups for node, _ in group.places}
    prices = [cluster.nodes[node].price_per_hour for node in used]
    return None if None in prices else sum(price for price in prices if price is not None)


def rank_key(goal: Goal, some: Estimate) -> tuple[object, ...]:
    """Smaller is better: what fits, what keeps the limits with a margin or at least keeps them, then the objective,
    then the simpler plan."""
    served = some.served
    if served is None:
        return (3, max(-stage.kv_room for stage in some.stages))
    if some.tight:
        limits = ((goal.ttft, served.ttft), (goal.tpot, served.tpot))
        over = max(value / limit for limit, value in limits if limit is not None)
        return (2 if some.misses else 1, over, *simplicity(some.candidate))
    return (0, worth(goal, some), -some.throughput, *simplicity(some.candidate))


def worth(goal: Goal, some: Estimate) -> float:
    """What the objective says of it; smaller is better."""
    assert some.served is not None
    if goal.objective == "throughput":
        return -some.throughput
    if goal.objective == "latency":
        return some.served.ttft + some.served.tpot * (goal.output_len - 1)
    if goal.objective == "cost":
        return some.cost if some.cost is not None else -some.throughput_per_device
    if goal.objective == "memory":
        return some.memory_used
    return -some.throughput_left


def simplicity(candidate: Candidate) -> tuple[object, ...]:
    """Smaller is simpler: weights where they are used, few stages, few ranks to a layer."""
    return (candidate.shard_weights, candidate.shared_experts, len(candidate.layers), max(candidate.degrees))
