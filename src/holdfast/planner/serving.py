"""What users see of a service under a steady load: time to first token, time per token, tokens per second.

`concurrency` clients ask, wait for the whole answer, and ask again (a closed loop). Continuous batching then has a
cycle: each request decodes for `output` steps, while every other one passes through its prompt once. So

    TPOT = step + (n - 1) · prompt · mixing / (output - 1)      n requests run at once
    TTFT = first_token + prompt + (steps of the prompt + 0.5) · step + the wait of a burst + the wait for room

- `prompt` is what a prompt adds to a step in which the others decode: its weights are read once for all. It takes
  more than one step where it is longer than the engine's chunk.
- Only so many run at once as the KV cache has room for (n); the others wait in line, by Little's law a full request's
  time for each place they are behind.
- A measurement begins with a burst: all clients ask at once, and such a request waits for half of the others'
  prompts. Engines that run prompts before all else keep those together that came together: their bursts return.
- Where one process stands in front of the engine, it can be what limits: then requests wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from holdfast.planner.coefficients import Coefficients, Engine
from holdfast.planner.timing import Stage, StepBatch, StepTime, rounded_max, step_time

FRONT_SHARPNESS = 8
"""How suddenly the process in front is what limits: the power of the norm that stands for max()."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Tokens per request; requests at once."""

    input_len: int
    output_len: int
    """At least 1."""
    concurrency: int
    cached: float = 0
    """Share of the prompt that the prefix cache has."""
    slots_lost: int = 0
    """Requests fewer than `concurrency` that the engine runs at once."""
    stream_interval: int = 1
    """Tokens that go to the client at once."""


@dataclass(frozen=True, slots=True)
class Served:
    """Seconds; tokens per second of output, all requests together."""

    ttft: float
    tpot: float
    throughput: float
    running: float
    """Requests that run at once."""
    decode: tuple[StepTime, ...]
    """A decoding step, by stage."""
    prompt: float
    """What a prompt adds to a step of the slowest stage."""
    prompt_wait: float
    """Of a token's time, what others' prompts take."""
    queue: float
    """Of TTFT, waiting for room in the KV cache;"""
    front: float
    """for the process in front;"""
    burst: float
    """for the prompts of those that came at the same time."""

    @property
    def step(self) -> float:
        """What a decoding step takes through all stages."""
        return step_of([stage.total for stage in self.decode], self.running)


@dataclass(frozen=True, slots=True)
class Replica:
    """One copy of the model, as far as its time goes."""

    stages: tuple[Stage, ...]
    kv_tokens: float
    """That the KV cache has room for."""
    engine: Engine
    known: Coefficients

    def decode(self, workload: Workload, running: float) -> tuple[StepTime, ...]:
        """A decoding step of `running` requests half way through their output, by stage."""
        return self.step(self.rows(workload, running))

    def prompt(self, workload: Workload, running: float, together: float = 1) -> tuple[float, float]:
        """Seconds that each of so many prompts adds to a step in which `running` requests decode: through all stages,
        and at the slowest of them. A prompt's tokens look back on half of it in the mean, and on what is cached."""
        decodes, both = self.rows(workload, running), self.rows_with_prompts(workload, running, together)
        times = [
            (after.total - before.total) / together
            for after, before in zip(self.step(both), self.step(decodes), strict=True)
        ]
        return sum(times), max(times)

    def rows_with_prompts(self, workload: Workload, running: float, together: float = 1) -> StepBatch:
        """The same step with so many prompts."""
        return replace(
            self.rows(workload, running),
            prompt_tokens=together * workload.input_len * (1 - workload.cached),
            prompt_context=workload.input_len * (1 + workload.cached) / 2,
            graph=False,
        )

    def prompts_together(self, workload: Workload, running: float) -> float:
        """Prompts that arrive within one step share the next, as far as it may be long."""
        return min(max(running / workload.output_len, 1), max(self.engine.chunk / workload.input_len, 1))

    def rows(self, workload: Workload, running: float) -> StepBatch:
        """A pipeline that is full holds one part of the requests in each stage."""
        return StepBatch(max(running / len(self.stages), 1), workload.input_len + workload.output_len / 2)

    def step(self, batch: StepBatch) -> tuple[StepTime, ...]:
        alike = {id(stage): stage for stage in self.stages}  # often one object: reckoned once
        times = {key: step_time(stage, batch, self.engine, self.known.efficiency) for key, stage in alike.items()}
        return tuple(times[id(stage)] for stage in self.stages)


def serve(replica: Replica, workload: Workload) -> Served:
    """The steady state of `workload` on a replica."""
    engine, output = replica.engine, workload.output_len
    room = replica.kv_tokens / (workload.input_len + engine.reserve * output)
    running = max(min(workload.concurrency - workload.slots_lost, room, engine.most_running), 1)
    decode = replica.decode(workload, running)
    step = step_of([time.total for time in decode], running)
    together = replica.prompts_together(workload, running)
    through, slowest = replica.prompt(workload, running)
    shared = slowest if together == 1 else replica.prompt(workload, running, together)[1]
    gaps = max(output - 1, 1)
    wait = (running - 1) * shared * engine.mixing / gaps
    tpot = step + wait
    chunks = math.ceil(workload.input_len * (1 - workload.cached) / engine.chunk)
    burst = engine.burst * (running - 1) / 2 * shared
    ttft = engine.first_token + through + (chunks + 0.5) * step + burst
    total = ttft + tpot * output
    queue = (
        total * (workload.concurrency / running - 1) * replica.known.load["queue"]
        if workload.concurrency > running
        else 0.0
    )
    busy = workload.concurrency * in_front(engine, workload)
    front = rounded_max(total + queue, busy, FRONT_SHARPNESS) - total - queue
    # Tokens sent in batches: the first comes with the last of its batch, and there are fewer gaps after it.
    held = (min(workload.stream_interval, output) - 1) * tpot
    ttft += queue + front + held
    tpot -= held / gaps
    cycle = ttft + tpot * (output - 1)
    # Little's law, of all clients and of those that run: what is fitted of the wait must not make these faster.
    throughput = output * min(workload.concurrency / cycle, running / (cycle - queue - front))
    return Served(ttft, tpot, throughput, running, decode, slowest, wait, queue, front, burst)


def in_front(engine: Engine, workload: Workload) -> float:
    """Seconds that the process in front works on a request."""
    tokens = engine.front_prompt * workload.input_len + engine.front_token * workload.output_len
    return engine.front_request + tokens


def step_of(stages: Sequence[float], running: float) -> float:
    """Seconds between two tokens of a request: through all stages, one after another; or, where as many parts of the
    requests are in flight, until the slowest stage has done all of them."""
    return max(sum(stages), min(len(stages), running) * max(stages))


def bubble(stages: int, microbatches: int) -> float:
    """Share of the time in which a stage of a pipeline stands idle while `microbatches` pass through: (p - 1) /
    (m + p - 1) (Huang et al., GPipe, NeurIPS 2019, section 2.3). Where decoding goes on, the next microbatches follow
    at once, and only fewer microbatches than stages leave a gap."""
    return (stages - 1) / (microbatches + stages - 1)
