"""What users see of a service under a steady load: time to first token, time per token, tokens per second.

`concurrency` clients ask, wait for the whole answer, and ask again (a closed loop). Continuous batching then has a
cycle: each request decodes for `output` steps, while every other one passes through its prompt once. So

    TPOT = step + (n - 1) · prompt · mixing / output            n requests run at once
    TTFT = first_token + prompt + step / 2 + the wait of a burst + the wait for room

- Only so many run at once as the KV cache has room for (n); the others wait in line, by Little's law a full request's
  time for each place they are behind.
- A measurement begins with a burst: all clients ask at once, and the first of their `waves` requests waits for half
  of the others' prompts.
- Where one process stands in front of the engine, it can be what limits: then requests wait for it.
"""

from __future__ import annotations

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
    prompt: tuple[StepTime, ...]
    """A prompt alone, by stage."""
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
    efficiency, load = known.efficiency, known.load
    tokens = workload.input_len + engine.reserve * workload.output_len
    running = min(workload.concurrency - workload.slots_lost, kv_tokens / tokens)
    running = max(running, 1)
    depth = len(stages)
    rows = max(running / depth, 1)  # a pipeline that is full holds one part of the requests in each stage
    context = workload.input_len + workload.output_len / 2
    decode = tuple(step_time(stage, StepBatch(rows, context), engine, efficiency) for stage in stages)
    prompt = prompt_times(stages, workload, engine, known)
    step, through = sum(time.total for time in decode), sum(time.total for time in prompt)
    slowest = max(time.total for time in prompt)
    wait = (running - 1) * slowest * engine.mixing / max(workload.output_len - 1, 1)
    tpot = step + wait
    burst = load["first_wave"] * (running - 1) / 2 * slowest
    ttft = engine.first_token + through + step / 2 + burst
    total = ttft + tpot * workload.output_len
    queue = total * (workload.concurrency / running - 1) * load["queue"] if workload.concurrency > running else 0.0
    ttft += queue
    busy = workload.concurrency * (engine.front_request + engine.front_token * workload.output_len)
    front = (total**8 + busy**8) ** (1 / 8) - total
    ttft += front
    cycle = ttft + tpot * workload.output_len
    return Served(
        ttft, tpot, workload.concurrency * workload.output_len / cycle, running, decode, prompt, wait, queue, front, burst
    )


def prompt_times(
    stages: Sequence[Stage], workload: Workload, engine: Engine, known: Coefficients
) -> tuple[StepTime, ...]:
    """A prompt alone, in as few steps as it needs. Its tokens look back on half of it in the mean, and on what is
    cached."""
    fresh = workload.input_len * (1 - workload.cached)
    seen = workload.input_len * (1 + workload.cached) / 2
    batch = StepBatch(0, 0, fresh, seen, graph=False)
    return tuple(step_time(stage, batch, engine, known.efficiency) for stage in stages)
