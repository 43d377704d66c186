"""Runs a measurement: warm up, send every request at its time, collect what became of each."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import uvloop

from holdfast.bench.client import WORDS, Client
from holdfast.bench.config import BenchConfig
from holdfast.bench.measure import Outcome
from holdfast.bench.workload import PlannedRequest, PromptMaker, plan_requests
from holdfast.core.errors import ConfigError

OnEnd = Callable[[Outcome], None]


@dataclass(frozen=True, slots=True)
class Run:
    """A measurement that is over."""

    model: str
    outcomes: list[Outcome]
    """Of the requests that ended, in the order they did."""
    planned: int
    duration: float
    """Seconds from the first request to the end of the last."""
    client_cpu: float
    """CPU time of this process during the run, as a share of one core."""
    interrupted: bool


def measure(
    config: BenchConfig, on_start: Callable[[int], None] = lambda _: None, on_end: OnEnd = lambda _: None
) -> Run:
    """Run what `config`, checked, says; `on_start` gets the number of requests, `on_end` each request as it ends.

    Ctrl-C ends the run early, with what has been measured so far. Raises `ConfigError` when there is nothing to
    measure: no server, no such model, an unreadable file.
    """
    planned = plan_requests(config)
    return uvloop.run(_measure(config, planned, on_start, on_end))


async def _measure(
    config: BenchConfig, planned: list[PlannedRequest], on_start: Callable[[int], None], on_end: OnEnd
) -> Run:
    async with Client(config.target) as client:
        model = config.target.model or await client.first_model()
        body_of = await _body_maker(client, model, config)
        await _warm_up(client, planned[0], body_of, config.load.num_warmups)
        on_start(len(planned))
        outcomes: list[Outcome] = []

        def ended(outcome: Outcome) -> None:
            outcomes.append(outcome)
            on_end(outcome)

        cpu, start = time.process_time(), time.perf_counter()
        sending = asyncio.create_task(_send_all(client, planned, body_of, config.load.max_concurrency, ended))
        interrupted = not await _unless_interrupted(sending)
        duration = time.perf_counter() - start
        client_cpu = (time.process_time() - cpu) / duration
    return Run(model, outcomes, len(planned), duration, client_cpu, interrupted)


async def _unless_interrupted(task: asyncio.Task[None]) -> bool:
    """Wait for the task; Ctrl-C cancels it. Returns whether it came to its end."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        await asyncio.wait([task])
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    if task.cancelled():
        return False
    task.result()  # raises what went wrong in it
    return True


async def _send_all(
    client: Client,
    planned: Sequence[PlannedRequest],
    body_of: Callable[[PlannedRequest], bytes],
    max_concurrency: int | None,
    on_end: OnEnd,
) -> None:
    """Send each request when its time has come and a slot is free, and wait for all."""
    slots = asyncio.Semaphore(max_concurrency or len(planned))
    start = time.perf_counter()

    async def send(request: PlannedRequest, body: bytes) -> None:
        outcome = Outcome(request.index, request.arrival, request.output_len, input_tokens=request.input_len or 0)
        try:
            await client.stream(body, outcome, start)
        finally:
            slots.release()
        on_end(outcome)

    async with asyncio.TaskGroup() as group:
        for request in planned:
            body = body_of(request)  # made before its time, so that making it delays no request
            await asyncio.sleep(max(0.0, start + request.arrival - time.perf_counter()))
            await slots.acquire()
            group.create_task(send(request, body))


async def _warm_up(
    client: Client, like: PlannedRequest, body_of: Callable[[PlannedRequest], bytes], count: int
) -> None:
    """Send requests like the first, one after the other. What fails here fails the run before it starts."""
    for number in range(count):
        # block ids and indices no request has: a warm-up must not fill the prefix cache for the measurement
        request = replace(like, index=2**40 + number, block_ids=())
        outcome = Outcome(request.index, 0.0, request.output_len)
        await client.stream(body_of(request), outcome, time.perf_counter())
        if outcome.error is not None:
            raise ConfigError(f"the warm-up request failed, nothing was measured: {outcome.error}")


async def _body_maker(client: Client, model: str, config: BenchConfig) -> Callable[[PlannedRequest], bytes]:
    """What turns a planned request into the JSON to send."""
    wanted = config.requests
    pool: Sequence[int] | Sequence[str] = WORDS
    if config.sends_tokens and wanted.dataset_name != "prompts":
        # special tokens live at either end of a vocabulary
        size = wanted.vocab_size
        pool = range(min(1000, size // 4), size - size // 10) if size else await client.token_pool(model)
    maker = PromptMaker(pool, wanted.seed)
    common: dict[str, Any] = {
        "model": model,
        "temperature": wanted.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if wanted.ignore_eos:
        common["ignore_eos"] = True

    def body_of(request: PlannedRequest) -> bytes:
        prompt = maker.make(request) if request.given is None else request.given
        if config.target.endpoint == "completions":
            content: dict[str, Any] = {"prompt": prompt}
        else:
            content = {"messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
        return msgspec.json.encode({**common, **content, "max_tokens": request.output_len})

    return body_of
