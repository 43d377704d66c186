"""All ways to lay a model over a cluster, judged: the best, what else is worth knowing of, and why the rest is not.

One kind of device: every tensor degree, number of stages and number of replicas that uses all devices, with experts
whole or cut. Several kinds: pipelines through all of them, and each kind by itself. Layers of unequal stages are
exact (`candidates.balanced`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from holdfast.core.errors import ConfigError
from holdfast.hardware.catalogue import Device
from holdfast.hardware.cluster import Cluster
from holdfast.planner.candidates import (
    Candidate,
    DeviceGroup,
    balanced,
    degrees_of,
    kinds_of,
    on_node,
    pipelines_of_one_kind,
)
from holdfast.planner.coefficients import Coefficients, coefficients
from holdfast.planner.estimate import Estimate, Question, estimate, memory_of, rank_key, simplicity, stages_of, worth
from holdfast.planner.goal import Goal
from holdfast.planner.memory.shares import even_layers
from holdfast.planner.mixed import pipelines_of_several_kinds
from holdfast.planner.runnable import Runtime, one_node_of
from holdfast.planner.shapes.shape import ModelShape
from holdfast.planner.spare import with_spare
from holdfast.planner.timing import StepBatch, step_time

ALIKE = 0.02
"""Plans that differ by less than this in what is wanted are taken for equally good."""
MOST_SPARE = 150
"""Candidates of which it is reckoned what they do without a rank; of more, the best."""


@dataclass(frozen=True, slots=True)
class Found:
    """`ranking`: all candidates (of very many the best), the best first; those that do not fit at the end. `pareto`:
    those that no other beats in throughput, time per token, time to first token and spare capacity at once.
    `runtime`: what the engine runs; None: not asked. `better`: the best of all, where one that the engine runs is
    taken instead."""

    question: Question
    ranking: tuple[Estimate, ...]
    pareto: tuple[Estimate, ...]
    runtime: Runtime | None = None
    better: Estimate | None = None

    @property
    def best(self) -> Estimate:
        return self.ranking[0]

    @property
    def best_even(self) -> Estimate | None:
        """Of the candidates whose stages are alike."""
        return next((some for some in self.ranking if some.fits and some.candidate.is_even), None)

    def refuses(self, some: Estimate) -> str:
        """Why the engine does not run it, in half a sentence; "": it does, or was not asked."""
        return "" if self.runtime is None else self.runtime.refuses(self.question.goal, some.candidate)

    @property
    def best_that_runs(self) -> Estimate | None:
        """Of those that fit and that the engine runs, chosen as the best of all is."""
        goal = self.question.goal
        running = (some for some in self.ranking if some.served is not None and not self.refuses(some))
        first = next(running, None)
        if first is None or first is self.best or first.misses:
            return first
        near = takewhile(lambda some: not some.misses and alike(goal, some, first), running)
        return _simplest(goal, [first, *near])

    def choosing(self, some: Estimate) -> Found:
        """The same with `some` in front."""
        if some is self.best:
            return self
        rest = (other for other in self.ranking if other is not some)
        return replace(self, ranking=(some, *rest), better=self.best)


def search(
    shape: ModelShape,
    cluster: Cluster,
    goal: Goal,
    known: Coefficients | None = None,
    runtime: Runtime | None = None,
) -> Found:
    """Every candidate, judged; and, where the `runtime` runs none that fits on several nodes, those on one of them.

    Raises `ConfigError` when there is none at all.
    """
    question = Question.of(shape, cluster, goal, known or coefficients())
    if goal.engine not in question.known.engines:
        raise ConfigError(f"engine {goal.engine!r}: must be one of {', '.join(question.known.engines)}")
    if goal.longest > shape.max_context:
        raise ConfigError(f"context {goal.longest}: {shape.name} knows {shape.max_context} tokens at most")
    judged = _with_spares(question, [estimate(question, candidate) for candidate in candidates(question)])
    if runtime is not None and len(cluster.nodes) > 1 and not runtime.refuses_all(goal):
        fitting = (some.candidate for some in judged if some.served is not None)
        if all(runtime.refuses(goal, candidate) for candidate in fitting):
            seen = {some.candidate for some in judged}
            alone = (candidate for candidate in _on_one_node(question) if candidate not in seen)
            judged += _with_spares(question, [estimate(question, candidate) for candidate in alone])
    if not judged:
        raise ConfigError(f"{shape.name} cannot be laid over this cluster: no group of its devices divides it evenly")
    ranking = sorted(judged, key=lambda some: rank_key(goal, some))
    chosen = _simplest(goal, ranking)
    ranking.remove(chosen)
    ranking.insert(0, chosen)
    return Found(question, tuple(ranking), _pareto(ranking), runtime)


def _with_spares(question: Question, judged: Sequence[Estimate]) -> list[Estimate]:
    """With what they do without a rank. Of very many the best alone, and those that do not fit: a plan that is left
    out is behind `MOST_SPARE` others by what is asked for, and what it has left, at most all its tokens, less than
    what another has. The best even one stays."""
    goal = question.goal
    by_tokens = replace(goal, objective="throughput") if goal.objective == "spare" else goal
    found: list[Estimate] = []
    most_left, reckoned = 0.0, 0
    for some in sorted(judged, key=lambda one: rank_key(by_tokens, one)):
        if some.served is None:
            found.append(some)
        elif (
            reckoned < MOST_SPARE
            or (goal.objective == "spare" and some.throughput > most_left)
            or (some.candidate.is_even and not any(other.candidate.is_even for other in found))
        ):
            found.append(with_spare(question, some))
            most_left, reckoned = max(most_left, found[-1].throughput_left), reckoned + 1
    return found


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


def _on_one_node(question: Question) -> Iterator[Candidate]:
    """What is worth judging on each kind of node alone."""
    for number, node in one_node_of(question.cluster):
        for candidate in candidates(replace(question, cluster=node)):
            replicas = tuple(tuple(on_node(group, number) for group in groups) for groups in candidate.replicas)
            yield replace(candidate, replicas=replicas)


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
            if 1 < len(replicas) <= num_experts // degree and _reach_one_another(cluster, replicas):
                yield Candidate(replicas, layers, expert_parallel=True, shared_experts=True)


def _reach_one_another(cluster: Cluster, replicas: Sequence[Sequence[DeviceGroup]]) -> bool:
    """Whether replicas may send each other rows in every layer: in one site, with a network between nodes."""
    nodes = {cluster.nodes[node] for groups in replicas for group in groups for node, _ in group.places}
    return len(nodes) == 1 or (len({node.site for node in nodes}) == 1 and all(node.network for node in nodes))


def _of_several_kinds(question: Question) -> Iterator[Candidate]:
    num_layers = question.shape.num_layers
    for replicas in pipelines_of_several_kinds(question, most_ranks(question.shape)):
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
