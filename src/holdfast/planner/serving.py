"""What users see of a service under a steady load: time to first token, time per token, tokens per second.

`concurrency` clients ask, wait for the whole answer, and ask again (a closed loop). Continuous batching then has a
cycle: each request decodes for `output` steps, while every other one passes through its prompt once. So

    TPOT = step + (n - 1) · prompt · mixing / output            n requests run at once
    TTFT = first_token + prompt + 1.5 · step + the wait of a burst + the wait for room

- `prompt` is what a prompt adds to a step in which the others decode: its weights are read once for all.

- Only so many run at once as the KV cache has room for (n); the others wait in line, by Little's law a full request's
  time for each place they are behind.
- A measurement begins with a burst: all clients ask at once, and the first of their `waves` requests waits for half
  of the others' prompts.
- Where one process stands in front of the engine, it can be what limits: then requests wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.planner.timing import Coefficients, Engine, Stage, StepBatch, StepTime, step_time


@dataclass(frozen=True, slots=True)
class Workload:
    """Tokens per request; requests at once."""

    input_len: int
    output_len: int
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
    def latency(self) -> float:
        """Of a whole request is ttft + (output - 1) · tpot; this is what one step of all stages takes."""
        return sum(stage.total for stage in self.decode)


def serve(
    stages: Sequence[Stage], kv_tokens: float, workload: Workload, engine: Engine, known: Coefficients
) -> Served:
    """The steady state of `workload` on a replica of `stages`, with room for `kv_tokens` tokens in the KV cache."""
    load = known.load
    tokens = workload.input_len + engine.reserve * workload.output_len
    running = min(workload.concurrency - workload.slots_lost, kv_tokens / tokens)
    running = max(running, 1)
    decode = decode_times(stages, workload, running, engine, known)
    step = sum(time.total for time in decode)
    # Prompts that arrive within one step share the next, as far as it may be long.
    together = min(max(running / workload.output_len, 1), max(engine.chunk / workload.input_len, 1))
    through, slowest = _added(stages, workload, running, 1, decode, engine, known)
    shared = slowest if together == 1 else _added(stages, workload, running, together, decode, engine, known)[1]
    wait = (running - 1) * shared * engine.mixing / max(workload.output_len - 1, 1)
    tpot = step + wait
    chunks = math.ceil(workload.input_len * (1 - workload.cached) / engine.chunk)
    burst = load["first_wave"] * (running - 1) / 2 * shared
    ttft = engine.first_token + through + (chunks + 0.5) * step + burst
    total = ttft + tpot * workload.output_len
    queue = total * (workload.concurrency / running - 1) * load["queue"] if workload.concurrency > running else 0.0
    busy = workload.concurrency * (engine.front_request + engine.front_token * workload.output_len)
    front = ((total + queue) ** 8 + busy**8) ** (1 / 8) - total - queue
    # Tokens sent in batches: the first comes with the last of its batch, and there are fewer gaps after it.
    held = max(min(workload.stream_interval, workload.output_len) - 1, 0) * tpot
    ttft += queue + front + held
    tpot -= held / max(workload.output_len - 1, 1)
    cycle = ttft + tpot * (workload.output_len - 1)
    throughput = workload.concurrency * workload.output_len / cycle
    return Served(ttft, tpot, throughput, running, decode, slowest, wait, queue, front, burst)


def decode_times(
    stages: Sequence[Stage], workload: Workload, running: float, engine: Engine, known: Coefficients
) -> tuple[StepTime, ...]:
    """A decoding step of `running` requests half way through their output, by stage. A pipeline that is full holds
    one part of them in each stage."""
    rows = max(running / len(stages), 1)
    batch = StepBatch(rows, workload.input_len + workload.output_len / 2)
    return tuple(step_time(stage, batch, engine, known.efficiency) for stage in stages)


def _added(
    stages: Sequence[Stage],
    workload: Workload,
    running: float,
    prompts: float,
    decode: Sequence[StepTime],
    engine: Engine,
    known: Coefficients,
) -> tuple[float, float]:
    """Seconds that each of so many prompts adds to a step: through all stages, and at the slowest of them. A prompt's
    tokens look back on half of it in the mean, and on what is cached."""
    fresh = workload.input_len * (1 - workload.cached)
    batch = StepBatch(
        max(running / len(stages), 1), workload.input_len + workload.output_len / 2,
        prompts * fresh, workload.input_len * (1 + workload.cached) / 2, graph=False,
    )  # fmt: skip
    times = [
        (step_time(stage, batch, engine, known.efficiency).total - before.total) / prompts
        for stage, before in zip(stages, decode, strict=True)
    ]
    return sum(times), max(times)
