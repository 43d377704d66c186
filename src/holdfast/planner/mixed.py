"""Pipelines through several kinds of devices, and which of them are worth judging where they are too many.

Of seven kinds with four degrees each there are tens of thousands. What a pipeline promises is told by its parts, each
looked up once for a kind and a degree: with layers that take all stages equally long, S stages of u seconds a layer
take T = layers / Σ 1/u each, and n requests at once get n tokens in S · T, or in what their prompts add. That leaves
out what rounds (whole layers), what differs from stage to stage (head, hops between stages) and the search for the
best load; those that promise most are judged with all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import pairwise

from holdfast.planner.candidates import DeviceGroup, degrees_of, device_groups, kinds_of
from holdfast.planner.estimate import MARGIN, MAX_SEQUENCES, Question
from holdfast.planner.memory.capacity import kv_room
from holdfast.planner.memory.ranks import kv_bytes_per_block, rank_memory
from holdfast.planner.memory.shares import RankShare
from holdfast.planner.timing import StepBatch, stage_of, step_time
from holdfast.planner.uneven import columns_of_fullest, most_heads_of_fullest

MOST_STAGES = 16
MOST_JUDGED = 60
"""Pipelines, each in both orders of its kinds and with several ways to share out the layers."""
MOST_WAYS = 1 << 14
"""To choose a degree for each kind; of more, degrees that promise less are left out."""
LOADS = tuple(4**power for power in range(6))
"""Requests at once that are looked at: 1 … 1,024."""

Pipelines = tuple[tuple[DeviceGroup, ...], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Groups of one kind of device and one degree, and what a layer costs on one of them."""

    groups: Sequence[DeviceGroup]
    decode: tuple[float, ...]
    """Seconds a layer, for as many rows as `LOADS` says."""
    prompt: float
    """Seconds a layer that a prompt adds."""
    weights: float
    """Bytes a layer."""
    kv: float
    """Bytes a layer and token."""
    room: float
    """Bytes for weights and KV cache."""

    def seconds(self, rows: float) -> float:
        """A layer's, on straight lines between `LOADS`."""
        for (few, low), (many, high) in pairwise(zip(LOADS, self.decode, strict=True)):
            if rows <= many:
                return float(low + (high - low) * max(rows - few, 0) / (many - few))
        return float(self.decode[-1] * rows / LOADS[-1])


def pipelines_of_several_kinds(question: Question, most: int) -> Iterator[Pipelines]:
    """Replicas whose stages are of all the kinds there are, in order of first appearance and the other way round; of
    very many those that promise most. `most`: ranks of a stage."""
    ways = list(_ways(question, _parts(question, most)))
    if len(ways) > MOST_JUDGED:
        ways = nsmallest(MOST_JUDGED, ways, key=lambda way: _promise(question, *way))
    for parts, replicas in ways:
        for order in (parts, parts[::-1]):
            yield tuple(
                tuple(group for part in order for group in _share(part.groups, replica, replicas))
                for replica in range(replicas)
            )


def _ways(question: Question, by_kind: Sequence[Sequence[Part]]) -> Iterator[tuple[tuple[Part, ...], int]]:
    """A part of each kind and a number of replicas that shares out the groups of each, with stages not too many."""
    stages = min(question.shape.num_layers, MOST_STAGES)
    if not all(by_kind):
        return
    for replicas in range(1, min(max(len(part.groups) for part in parts) for parts in by_kind) + 1):
        yield from ((way, replicas) for way in _choices(by_kind, replicas, stages))


def _choices(by_kind: Sequence[Sequence[Part]], replicas: int, stages: int) -> Iterator[tuple[Part, ...]]:
    if not by_kind:
        yield ()
        return
    for part in by_kind[0]:
        mine, rest = divmod(len(part.groups), replicas)
        if rest or not mine or mine + len(by_kind) - 1 > stages:
            continue
        for others in _choices(by_kind[1:], replicas, stages - mine):
            yield (part, *others)


def _share(groups: Sequence[DeviceGroup], index: int, parts: int) -> Sequence[DeviceGroup]:
    size = len(groups) // parts
    return groups[index * size : (index + 1) * size]


# --- what a pipeline promises ---


def _parts(question: Question, most: int) -> list[list[Part]]:
    """Of each kind, by degree; where the ways to combine them are too many, of each kind the degrees with the largest
    sum of what devices do, of what a request alone gets, and of what they hold, in turn."""
    by_kind = []
    for kind in kinds_of(question.cluster):
        made = [device_groups(question.cluster, kind, degree) for degree in degrees_of(question.cluster, kind, most)]
        by_kind.append([_part(question, groups) for groups in made if groups])
    while _product(by_kind) > MOST_WAYS:
        largest = max(by_kind, key=len)
        largest.remove(min(largest, key=lambda part: _rank_among(part, largest)))
    return by_kind


def _product(by_kind: Sequence[Sequence[Part]]) -> int:
    ways = 1
    for parts in by_kind:
        ways *= len(parts)
    return ways


def _rank_among(part: Part, others: Sequence[Part]) -> float:
    """The share that it reaches of the best, in tokens of all devices together or in a token's time."""
    together = [len(some.groups) / some.decode[-1] for some in others]
    alone = [1 / some.decode[0] for some in others]
    return max(
        len(part.groups) / part.decode[-1] / max(together),
        1 / part.decode[0] / max(alone),
    )


def _part(question: Question, groups: Sequence[DeviceGroup]) -> Part:
    group, shape, goal = groups[0], question.shape, question.goal
    engine, efficiency = question.known.engines[goal.engine], question.known.efficiency
    load, memory = question.load(), question.memory_engine
    kinds = question.kinds_on_fullest(0, shape.num_layers, group.degree, 1)
    stage = stage_of(
        shape, kinds, engine, device=group.device, tensor_parallel=group.degree, fabric=group.fabric,
        nodes=group.nodes, weight_bits=goal.weight_bits, kv_bits=load.kv_format.bytes_per_number * 8, last=False,
    )  # fmt: skip
    context = goal.input_len + goal.output_len / 2

    def seconds(batch: StepBatch) -> float:
        time = step_time(stage, batch, engine, efficiency)
        return (time.total - time.engine) / shape.num_layers

    prompt = StepBatch(LOADS[2], context, goal.input_len, goal.input_len / 2, graph=False)
    even, columns = 1 / group.degree, columns_of_fullest(group.degree)
    heads = most_heads_of_fullest((layer for layer, _ in shape.kinds), group.degree)
    share = RankShare((0, shape.num_layers), heads, even, columns, even, 1.0, columns, False, False, group.degree)
    needs = rank_memory(question.table, share, load, memory, linked=group.link.kind == "nvlink")
    return Part(
        groups,
        tuple(seconds(StepBatch(rows, context)) for rows in LOADS),
        seconds(prompt) - seconds(StepBatch(LOADS[2], context)),
        needs.weights / shape.num_layers,
        kv_bytes_per_block(question.table, share, load) / load.block_size / shape.num_layers,
        kv_room(needs, group.device.memory_bytes, memory) + needs.weights,
    )


def _promise(question: Question, parts: tuple[Part, ...], replicas: int) -> tuple[float, float]:
    """Smaller is better: whether it seems to fit and to keep the limits; then what the goal asks for."""
    goal = question.goal
    loads = LOADS if goal.concurrency is None else (-(-goal.concurrency // replicas),)
    return min(_under(question, parts, replicas, min(load, MAX_SEQUENCES)) for load in loads)


def _under(question: Question, parts: tuple[Part, ...], replicas: int, load: int) -> tuple[float, float]:
    """The same with `load` requests at once in each replica."""
    goal, engine = question.goal, question.known.engines[question.goal.engine]
    counts = [len(part.groups) // replicas for part in parts]
    stages = sum(counts)
    waits = (load - 1) * engine.mixing / max(goal.output_len - 1, 1)
    turns = min(load, stages)
    each = [turns * part.seconds(max(load / stages, 1)) + waits * part.prompt for part in parts]
    tpot = question.shape.num_layers / sum(count / time for count, time in zip(counts, each, strict=True))
    layers = [tpot / time for time in each]
    tokens = min(_tokens(question, part, count) for part, count in zip(parts, layers, strict=True))
    room = int(tokens / (goal.input_len + engine.reserve * goal.output_len))
    if room < 1:  # by other shares of the layers, perhaps
        held = sum(count * part.room / part.weights for part, count in zip(parts, counts, strict=True))
        return (2.0 if held > question.shape.num_layers else 3.0), -held
    if room < load:
        return _under(question, parts, replicas, room)
    if turns < stages:
        tpot *= stages / turns
    prompts = [part.prompt * count for part, count in zip(parts, layers, strict=True)]
    prompt = sum(seconds * count for seconds, count in zip(prompts, counts, strict=True))
    step, burst = tpot - waits * max(prompts), engine.burst * (load - 1) / 2 * max(prompts)
    ttft = engine.first_token + prompt + 1.5 * step + burst
    limits = ((goal.ttft, ttft), (goal.tpot, tpot))
    over = max((value * MARGIN / limit for limit, value in limits if limit is not None), default=0)
    if over > 1:
        return 1.0, over
    if goal.objective == "latency":
        worth = tpot * goal.output_len + prompt
    elif goal.objective == "memory":
        worth = max(
            1 - (part.room - count * part.weights) / part.groups[0].device.memory_bytes
            for part, count in zip(parts, layers, strict=True)
        )
    else:
        worth = -replicas * load / tpot
    return 0.0, worth


def _tokens(question: Question, part: Part, layers: float) -> float:
    """That the KV cache of so many layers has room for; states alone set no limit (`capacity.kv_capacity_tokens`)."""
    left = part.room - layers * part.weights
    if part.kv:
        return left / (layers * part.kv)
    return question.shape.max_context if left > 0 else 0
