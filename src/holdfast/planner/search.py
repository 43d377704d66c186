"""All ways to lay a model over a cluster, judged: the best, what else is worth knowing of, and why the rest is not.

One kind of device: every tensor degree, number of stages and number of replicas that uses all devices, with experts
whole or cut. Several kinds: pipelines through all of them, and each kind by itself. Layers of unequal stages are
exact (`candidates.balanced`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from holdfast.core.errors import ConfigError
from holdfast.hardware.catalogue import Device
from holdfast.hardware.cluster import Cluster
from holdfast.planner.candidates import (
    Candidate,
    balanced,
    degrees_of,
    kinds_of,
    pipelines_of_one_kind,
    pipelines_of_several_kinds,
)
from holdfast.planner.coefficients import Coefficients, coefficients
from holdfast.planner.estimate import Estimate, Question, estimate, memory_of, rank_key, simplicity, stages_of, worth
from holdfast.planner.goal import Goal
from holdfast.planner.memory.shares import even_layers
from holdfast.planner.shapes.shape import ModelShape
from holdfast.planner.spare import with_spare
from holdfast.planner.timing import StepBatch, step_time

ALIKE = 0.02
"""Plans that differ by less than this in what is wanted are taken for equally good."""
MOST_PER_KIND = 4000
"""Candidates of several kinds of devices that are looked at."""


@dataclass(frozen=True, slots=True)
class Found:
    """`ranking`: all candidates, the best first; those that do not fit at the end. `pareto`: those that no other
    beats in throughput, time per token, time to first token and spare capacity at once."""

    question: Question
    ranking: tuple[Estimate, ...]
    pareto: tuple[Estimate, ...]

    @property
    def best(self) -> Estimate:
        return self.ranking[0]

    @property
    def best_even(self) -> Estimate | None:
        """Of the candidates whose stages are alike."""
        return next((some for some in self.ranking if some.fits and some.candidate.is_even), None)


def search(shape: ModelShape, cluster: Cluster, goal: Goal, known: Coefficients | None = None) -> Found:
    """Every candidate, judged. Raises `ConfigError` when there is none at all."""
    question = Question.of(shape, cluster, goal, known or coefficients())
    if goal.engine not in question.known.engines:
        raise ConfigError(f"engine {goal.engine!r}: must be one of {', '.join(question.known.engines)}")
    if goal.longest > shape.max_context:
        raise ConfigError(f"context {goal.longest}: {shape.name} knows {shape.max_context} tokens at most")
    judged = [with_spare(question, estimate(question, candidate)) for candidate in candidates(question)]
    if not judged:
        raise ConfigError(f"{shape.name} cannot be laid over this cluster: no group of its devices divides it evenly")
    ranking = sorted(judged, key=lambda some: rank_key(goal, some))
    chosen = _simplest(goal, ranking)
    ranking.remove(chosen)
    ranking.insert(0, chosen)
    return Found(question, tuple(ranking), _pareto(ranking))


def _simplest(goal: Goal, ranking: Sequence[Estimate]) -> Estimate:
    """Of those that are as good as the best, as far as the model can tell."""
    best = ranking[0]
    if best.served is None or best.tight:
        return best
    good = [some for some in ranking if some.served is not None and not some.tight and alike(goal, some, best)]
    return min(good, key=lambda some: (simplicity(some.candidate), rank_key(goal, some)))


def alike(goal: Goal, some: Estimate, best: Estimate) -> bool:
    """Whether the objective tells no more than `ALIKE` between two that are timed. It may be 0: nothing to spare."""
    target = worth(goal, best)
    return abs(worth(goal, some) - target) <= ALIKE * abs(target)


def candidates(question: Question) -> Iterator[Candidate]:
    """All that is worth judging."""
    cluster = question.cluster
    kinds = kinds_of(cluster)
    for device in kinds:
        yield from _of_one_kind(question, device)
    if len(kinds) > 1:
        yield from _of_several_kinds(question)


def most_ranks(shape: ModelShape) -> int:
    """Of a stage: each has a query head at least."""
    heads = [layer.attention.num_heads for layer, _ in shape.kinds if layer.attention]
    return min(heads, default=64)


def _of_one_kind(question: Question, device: Device) -> Iterator[Candidate]:
    cluster, num_layers = question.cluster, question.shape.num_layers
    num_experts = min((layer.experts.num_experts for layer, _ in question.shape.kinds if layer.experts), default=0)
    for degree in degrees_of(cluster, device, most_ranks(question.shape)):
        for replicas in pipelines_of_one_kind(cluster, device, degree, num_layers):
            layers = even_layers(num_layers, len(replicas[0]))
            for expert_parallel in (False, True) if 1 < degree <= num_experts else (False,):
                yield Candidate(replicas, layers, expert_parallel)
            if len(replicas) > 1:
                yield Candidate(replicas, layers, shard_weights=True)


def _of_several_kinds(question: Question) -> Iterator[Candidate]:
    num_layers = question.shape.num_layers
    for count, replicas in enumerate(
        pipelines_of_several_kinds(question.cluster, most_ranks(question.shape), num_layers)
    ):
        if count > MOST_PER_KIND:
            return
        even = Candidate(replicas, even_layers(num_layers, len(replicas[0])))
        seen = {even.layers}
        yield even
        for layers in _unequal(question, even):
            if layers not in seen:
                seen.add(layers)
                yield replace(even, layers=layers)


def _unequal(question: Question, even: Candidate) -> Iterator[tuple[int, ...]]:
    """Layers so that all stages take as long, when decoding few requests, when decoding many, and with prompts; and
    so that their KV caches have room for as many tokens."""
    num_layers = question.shape.num_layers
    memory, _ = memory_of(question, even)
    per_layer = [stage.memory.weights / count for stage, count in zip(memory, even.layers, strict=True)]
    room = [stage.kv_room + stage.memory.weights for stage in memory]
    most = [max(1, min(num_layers, int(space / size))) for space, size in zip(room, per_layer, strict=True)]
    stages = stages_of(question, even)
    engine, efficiency, goal = question.known.engines[question.goal.engine], question.known.efficiency, question.goal
    context = goal.input_len + goal.output_len / 2
    for batch in (
        StepBatch(1, context),
        StepBatch(32, context),
        StepBatch(32, context, goal.input_len, goal.input_len / 2, graph=False),
    ):
        times = [step_time(stage, batch, engine, efficiency) for stage in stages]
        fixed = [time.head + time.engine for time in times]
        seconds = [
            (time.total - constant) / count for time, constant, count in zip(times, fixed, even.layers, strict=True)
        ]
        if layers := balanced(num_layers, seconds, fixed, most):
            yield tuple(layers)
    # Room for KV of each stage over its layers is equal where layers are as the rooms: as if bytes were seconds.
    if layers := balanced(num_layers, [1 / max(space, 1) for space in room], [0] * len(room), most):
        yield tuple(layers)


def _pareto(ranking: Sequence[Estimate]) -> tuple[Estimate, ...]:
    def goods(some: Estimate) -> tuple[float, ...]:
        assert some.served is not None
        return (some.throughput, -some.served.tpot, -some.served.ttft, some.throughput_left)

    fitting = [(goods(some), some) for some in ranking if some.served is not None and not some.misses]
    return tuple(
        some
        for mine, some in fitting
        if not any(all(a >= b for a, b in zip(other, mine, strict=True)) and other != mine for other, _ in fitting)
    )
