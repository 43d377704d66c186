"""Where the time of a token goes, and what ranks say to each other meanwhile: an estimate taken apart again.

    TPOT = the parts of a decoding step, over all stages, + what others' prompts take of it
    TTFT = before and after the engine + prompt + its steps + the waits

Everything here adds up to what `serving.serve` says.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Literal

from holdfast.hardware.catalogue import Link
from holdfast.planner.all_to_all import all_to_all, all_to_all_seconds
from holdfast.planner.communication import Operation, Path, wire_bytes
from holdfast.planner.estimate import Estimate, Question, slowest_dispatch, stages_of
from holdfast.planner.serving import Replica, Workload
from holdfast.planner.timing import Stage, StepBatch, StepTime, all_reduces, expert_work, reached, step_time

Part = Literal[
    "weights", "experts", "attention", "activations", "all-reduces", "all-to-alls", "gathered weights",
    "pipeline hops", "layer overhead", "logits", "scheduler",
]  # fmt: skip
"""Of a step. `weights`: products with them; `experts`: those with routed experts'; `layer overhead`: launches and
what else a layer takes however little it does; `scheduler`: and the sampler, and the input of each step."""
OTHERS_PROMPTS = "others' prompts"


@dataclass(frozen=True, slots=True)
class Exchange:
    """What the ranks of a stage send in a step, of one kind. Bytes and seconds of one rank."""

    stage: int
    what: Part
    operation: Operation
    times: float
    """In one step."""
    ranks: int
    link: Link
    """The slowest they cross."""
    path: Path
    message: float
    """Bytes of the result, each time."""
    sent: float
    """Bytes that each rank sends, each time."""
    exposed: float = 1.0
    """Share that is not hidden behind other work."""
    imbalance: float = 1.0
    """By which the busiest rank, whose bytes these are, sends more than the mean."""

    @property
    def seconds(self) -> float:
        """In one step."""
        return self.times * self.exposed * self.path.time(self.sent)

    @property
    def latency(self) -> float:
        """Of `seconds`, what an endless bandwidth would leave."""
        return self.times * self.exposed * self.path.time(0)


def replica_of(question: Question, some: Estimate) -> Replica:
    """One of its replicas, that with the slowest links, as it was timed."""
    engine = question.known.engines[question.goal.engine]
    return Replica(stages_of(question, some.candidate), some.kv_tokens, engine, question.known)


def workload_of(question: Question, some: Estimate) -> Workload:
    """The load of one replica."""
    goal = question.goal
    return Workload(goal.input_len, goal.output_len, some.concurrency // len(some.candidate.replicas))


def decode_rows(question: Question, some: Estimate) -> StepBatch:
    """What a stage computes in a decoding step."""
    assert some.served is not None
    return replica_of(question, some).rows(workload_of(question, some), some.served.running)


def exchanges(question: Question, some: Estimate, batch: StepBatch | None = None) -> list[Exchange]:
    """All that is sent in one step of each stage: in a decoding step, or as `batch` says."""
    rows = batch or decode_rows(question, some)
    found = []
    for index, stage in enumerate(stages_of(question, some.candidate)):
        found += _of_stage(question, some, index, stage, rows)
    return found


def _of_stage(question: Question, some: Estimate, index: int, stage: Stage, batch: StepBatch) -> list[Exchange]:
    groups, cluster = some.candidate.stages, question.cluster
    tensor, times = stage.tensor_parallel, sum(count * all_reduces(layer) for layer, count in stage.kinds)
    message = batch.rows * stage.hidden * 2
    found = []
    if path := stage.path:
        found.append(
            Exchange(
                index, "all-reduces", "all_reduce", times, tensor, groups[index].slowest_link, path, message,
                wire_bytes("all_reduce", tensor, message), question.known.efficiency.all_reduce,
            )
        )  # fmt: skip
    if stage.dispatch_path:
        link = slowest_dispatch(cluster, some.candidate, index)
        for layer, count in stage.kinds:
            if layer.experts is not None:
                one = all_to_all(layer.experts, stage.hidden, batch.rows, tensor=tensor, ranks=stage.expert_parallel)
                found.append(
                    Exchange(
                        index, "all-to-alls", "all_to_all", 2 * count, stage.expert_parallel, link,
                        stage.dispatch_path, one.message, one.sent, imbalance=one.imbalance,
                    )
                )  # fmt: skip
    if stage.gather_path:
        replicas = some.candidate.replicas
        link = cluster.link_between(replicas[0][index].places[0], replicas[-1][index].places[0])
        whole = stage.gathered * len(replicas) / (len(replicas) - 1)
        found.append(
            Exchange(
                index, "gathered weights", "all_gather", 1, len(replicas), link, stage.gather_path, whole,
                stage.gathered,
            )
        )  # fmt: skip
    if stage.next_path:
        link = cluster.link_between(groups[index].places[0], groups[index + 1].places[0])
        found.append(Exchange(index, "pipeline hops", "send_recv", 1, 2, link, stage.next_path, message, message))
    return found


def step_parts(stage: Stage, batch: StepBatch, replica: Replica) -> dict[Part, float]:
    """Seconds of one step of one stage; they add up to `StepTime.total`."""
    engine, efficiency = replica.engine, replica.known.efficiency
    time = step_time(stage, batch, engine, efficiency)
    gathering = stage.gather_path.time(stage.gathered) if stage.gather_path else 0.0
    hop = stage.next_path.time(batch.rows * stage.hidden * 2) if stage.next_path else 0.0
    dispatching = dispatching_seconds(stage, batch)
    experts = time.linear * _experts_share(stage, batch, replica, time)
    return {
        "weights": time.linear - experts,
        "experts": experts,
        "attention": time.attention,
        "activations": time.activations,
        "all-reduces": time.communication - gathering - hop - dispatching,
        "all-to-alls": dispatching,
        "gathered weights": gathering,
        "pipeline hops": hop,
        "layer overhead": time.launches,
        "logits": time.head,
        "scheduler": time.engine,
    }


def dispatching_seconds(stage: Stage, batch: StepBatch) -> float:
    """Of a step: rows to experts of other replicas, and back."""
    if stage.dispatch_path is None:
        return 0.0
    return all_to_all_seconds(
        stage.dispatch_path, stage.kinds, stage.hidden, batch.rows, tensor=stage.tensor_parallel,
        ranks=stage.expert_parallel,
    )  # fmt: skip


def _experts_share(stage: Stage, batch: StepBatch, replica: Replica, time: StepTime) -> float:
    """Of the products' time, by the side of the roofline that binds."""
    memory = compute = 0.0
    for layer, count in stage.kinds:
        if layer.experts is not None:
            reading, multiplying = expert_work(stage, layer, batch.rows, replica.known.efficiency)
            memory += count * reading
            compute += count * multiplying / reached(replica.engine, stage.device)
    if time.linear_memory >= time.linear_compute:
        return memory / time.linear_memory
    return compute / time.linear_compute


def decode_parts(question: Question, some: Estimate) -> dict[Part, float]:
    """Seconds of one decoding step through all stages; they add up to TPOT without others' prompts. Where all wait
    for the slowest stage, they are that one's, as often as it is waited for."""
    assert some.served is not None
    replica, batch = replica_of(question, some), decode_rows(question, some)
    by_stage = [step_parts(stage, batch, replica) for stage in replica.stages]
    if some.served.step > sum(time.total for time in some.served.decode):
        slowest = max(by_stage, key=lambda times: sum(times.values()))
        times = min(len(by_stage), some.served.running)
        return {name: time * times for name, time in slowest.items()}
    return _added(by_stage)


def prompt_parts(question: Question, some: Estimate) -> dict[Part, float]:
    """Seconds that a prompt adds to a step of the slowest stage, when as many come together as usual under the load:
    the next ones wait for no more."""
    assert some.served is not None
    replica, workload, running = replica_of(question, some), workload_of(question, some), some.served.running
    together = replica.prompts_together(workload, running)
    before, after = replica.rows(workload, running), replica.rows_with_prompts(workload, running, together)
    added = []
    for stage in replica.stages:
        without = step_parts(stage, before, replica)
        added.append(
            {name: (time - without[name]) / together for name, time in step_parts(stage, after, replica).items()}
        )
    return max(added, key=lambda times: sum(times.values()))


def parts(question: Question, some: Estimate) -> list[tuple[str, float]]:
    """Of one token: (what, seconds), those that are there; they add up to TPOT."""
    assert some.served is not None
    named: list[tuple[str, float]] = list(decode_parts(question, some).items())
    return [(name, time) for name, time in [*named, (OTHERS_PROMPTS, some.served.prompt_wait)] if time > 0]


def token_parts(question: Question, some: Estimate) -> dict[Part, float]:
    """Of one token, what others' prompts take shared out among the parts: what makes a plan slow, wherever it does.
    They add up to TPOT."""
    assert some.served is not None
    found, prompt = decode_parts(question, some), prompt_parts(question, some)
    scale = some.served.prompt_wait / sum(prompt.values())
    return {name: time + prompt[name] * scale for name, time in found.items()}


def first_token_parts(question: Question, some: Estimate) -> list[tuple[str, float]]:
    """Of the time to the first token: (what, seconds), those of a microsecond and more; they add up to TTFT.

    `engine`: before the prompt is scheduled and after its token; `its prompt`: what it adds to a step of every stage;
    `steps meanwhile`: of the others; `prompts before it`: that came at the same time; `waiting for room` in the KV
    cache, and for the `process in front` of the engine.
    """
    served, replica, workload = some.served, replica_of(question, some), workload_of(question, some)
    assert served is not None
    chunks = math.ceil(workload.input_len * (1 - workload.cached) / replica.engine.chunk)
    through, _ = replica.prompt(workload, served.running)
    found = [
        ("engine", replica.engine.first_token),
        ("its prompt", through),
        ("steps meanwhile", (chunks + 0.5) * served.step),
        ("prompts before it", served.burst),
        ("waiting for room", served.queue),
        ("process in front", served.front),
    ]
    return [(name, time) for name, time in found if time > 1e-6]


def _added(some: list[dict[Part, float]]) -> dict[Part, float]:
    total: dict[Part, float] = defaultdict(float)
    for times in some:
        for name, time in times.items():
            total[name] += time
    return dict(total)


def at_concurrency(question: Question, requests: int) -> Question:
    """The same question about so many requests at once."""
    return replace(question, goal=replace(question.goal, concurrency=requests))
