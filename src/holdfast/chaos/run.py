"""`holdfast chaos`: a service under load, faults one after another, every token compared."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
from rich.console import Console

from holdfast.chaos.config import ChaosConfig, kinds_at
from holdfast.chaos.faults import PATIENCE, Fault, aim, get_over, strike
from holdfast.chaos.flags import value_of
from holdfast.chaos.load import Body, Choices, Load, Refused, Visit, bodies, with_stops
from holdfast.chaos.machines import Node, machines_of
from holdfast.chaos.phases import NEEDS_ALL, Moments
from holdfast.chaos.report import Report, as_json, show
from holdfast.chaos.service import Service
from holdfast.core.errors import ConfigError, StartupError

_UNLESS_GIVEN = {"--max-restarts": "1000000", "--leak-window": "2", "--regrow-interval": "20"}
"""Flags of the service: it is to be disturbed for long."""
_WIDTH = 150
"""Characters of a line that goes to a file."""


def run(model: str, config: ChaosConfig, flags: Sequence[str]) -> int:
    """0 when every request ended as it would have undisturbed, and nothing is left of the service; else 1. Raises
    `ConfigError` for faults that this service cannot have."""
    for flag, path in (("--json", config.report.json), ("--plot", config.report.plot)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"{flag} {path}: there is no folder {Path(path).parent}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the service would outlive us
    report = asyncio.run(_run(model, config, flags))
    show(report, Console(width=None if sys.stdout.isatty() else _WIDTH))
    try:
        if config.report.json is not None:
            Path(config.report.json).write_bytes(msgspec.json.format(as_json(report)))
        if config.report.plot is not None:
            from holdfast.chaos.plot import timeline  # noqa: PLC0415 - matplotlib is slow to import

            timeline(report, Path(config.report.plot))
    except OSError as error:
        raise ConfigError(f"--json/--plot: {error}") from error
    return 0 if report.is_good else 1


async def _run(model: str, config: ChaosConfig, flags: Sequence[str]) -> Report:
    with tempfile.TemporaryDirectory(prefix="holdfast-chaos-") as folder:
        more = [
            word for flag, value in _UNLESS_GIVEN.items() if value_of(flag, flags) is None for word in (flag, value)
        ]
        nodes: list[Node] = []
        if config.fault.machines:
            replicas = int(value_of("--data-parallel-size", flags) or 1)
            if replicas % (config.fault.machines + 1):
                raise ConfigError(
                    f"--machines {config.fault.machines}: they and the first cannot share {replicas} copies evenly "
                    "(--data-parallel-size)"
                )
            here, nodes = machines_of(model, flags, config.fault.machines, replicas, Path(folder))
            more += here
        service = Service(model, [*flags, "--served-model-name", "chaos", *more], Path(folder), nodes)
        left: list[int] = []
        status = 1
        try:
            await service.start()
            has_store = "store" in service.processes()
            kinds = config.fault.kinds(has_store=has_store)
            async with httpx.AsyncClient(base_url=service.url, timeout=PATIENCE, trust_env=False) as client:
                replicas = (await client.get("/cluster")).json()["replicas"]
                num_ranks = max(replica["ranks"] for replica in replicas)
                phases = config.fault.phases(has_store=has_store, num_ranks=num_ranks)
                load, faults, seconds = await _disturb(service, client, config, kinds, phases)
        finally:
            status, left = await service.stop()
        return Report(faults, load, seconds, status, left, service.files_left())


async def _disturb(
    service: Service, client: httpx.AsyncClient, config: ChaosConfig, kinds: list[str], phases: list[str]
) -> tuple[Load, list[Fault], float]:
    asked = bodies("chaos", config.load.requests, config.load.max_tokens, config.fault.seed)
    asked = with_stops(asked, await _calm(client, asked, config.load.streams))
    expected = await _calm(client, asked, config.load.streams)
    load, begun = Load(client, asked, expected), time.monotonic()
    running = asyncio.create_task(load.run(config.load.streams))
    dice, faults, unfinished = random.Random(config.fault.seed), list[Fault](), list[Fault]()
    moments = Moments(service, client, load, dice)
    try:
        while len(faults) < config.fault.kills:
            phase = dice.choice(phases)
            if phase in NEEDS_ALL:
                unfinished = await get_over(service, client, unfinished)
            await _learn_more(client, faults)  # a gateway that goes takes with it what it knows
            moment = await moments.wait(phase)
            kind = dice.choice(kinds_at(phase, kinds, moment.role))
            aimed = await aim(service, kind, dice, config.fault.pair_percent, held=moment.held)
            in_phase = moment.is_now
            new = [*moment.before, strike(service, aimed, dice)]
            new[-1].phase, new[-1].in_phase = phase, in_phase
            faults += new
            last = len(faults) >= config.fault.kills
            unfinished = await get_over(service, client, [*unfinished, *new], whole=last)
            if load.wrong or service.orphans:
                break
            if len(faults) // 10 > (len(faults) - len(new)) // 10:
                print(f"{len(faults)} faults, {load.num_done} requests, all as they should be", flush=True)
        load.over.set()
        await _all_end([running, *(reply for _, reply in moments.probes)], service)
        running.result()
    finally:
        for task in (running, *(reply for _, reply in moments.probes)):
            task.cancel()
    seconds = time.monotonic() - begun
    calm = await _calm(client, [body for body, _ in moments.probes], config.load.streams)
    for number, ((_, reply), undisturbed) in enumerate(zip(moments.probes, calm, strict=True), start=len(asked)):
        await load.compare(number, reply, undisturbed)
    await _learn_more(client, faults)
    return load, faults, seconds


async def _learn_more(client: httpx.AsyncClient, faults: list[Fault]) -> None:
    """What has become of their incidents since they were got over."""
    try:
        told = (await client.get("/cluster")).json()["incidents"]
    except httpx.HTTPError:  # it is gone or hangs: whoever waits for it will say so
        return
    for fault in faults:
        fault.learn(told)


async def _all_end(tasks: Sequence[asyncio.Task[Any]], service: Service) -> None:
    """Raises `StartupError` when they do not: whoever comes back for a reply does so for ever."""
    _, pending = await asyncio.wait(tasks, timeout=PATIENCE)
    if pending:
        raise StartupError(f"requests do not end in {PATIENCE:g} s:\n{service.said()[-3000:]}")


async def _calm(client: httpx.AsyncClient, asked: list[Body], streams: int) -> list[Choices]:
    """What undisturbed replies are."""
    gate = asyncio.Semaphore(streams)

    async def one(body: Body) -> Choices:
        async with gate:
            return await Visit(client, body).reply()

    try:
        return list(await asyncio.gather(*[one(body) for body in asked]))
    except (httpx.HTTPError, ValueError, Refused) as error:
        raise StartupError(f"a request failed undisturbed: {error}") from error
