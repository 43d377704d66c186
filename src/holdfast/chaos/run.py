"""`holdfast chaos`: a service under load, faults one after another, every token compared."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from holdfast.chaos.config import ChaosConfig
from holdfast.chaos.load import Body, Choices, Load, Refused, Visit, bodies
from holdfast.chaos.service import Service
from holdfast.core.errors import ConfigError, StartupError

_PATIENCE = 120.0
"""Seconds that getting over a fault may take."""
_SLOW_SECONDS = 2.0
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "spoil": signal.SIGKILL}


@dataclass(slots=True)
class Fault:
    """What was done to whom, and how it was got over. Times: seconds since 1970."""

    kind: str
    victims: list[str]
    at: float
    incidents: list[dict[str, Any]] = field(default_factory=list)
    """As /cluster tells of them."""
    whole_again: float | None = None
    """When every replica served again."""

    @property
    def members(self) -> set[str]:
        """What is lost by it: `replica 0`, `gateway`, `store`. The slow is waited for, the corrupt computed again."""
        if self.kind.startswith(("slow", "corrupt")):
            return set()
        return {
            f"replica {victim.split(' ')[1].partition('.')[0]}" if " " in victim else victim
            for victim in self.victims
        }

    @property
    def detected(self) -> float:
        """Seconds until the first was noticed."""
        return min((incident["loss"]["detected"] for incident in self.incidents), default=self.at) - self.at

    def after(self, name: str) -> list[float]:
        """Seconds from the fault to this moment of its incidents, where there was one."""
        return [incident[name] - self.at for incident in self.incidents if incident[name] is not None]


@dataclass(slots=True)
class Report:
    """All that is known in the end."""

    faults: list[Fault]
    load: Load
    seconds: float
    status: int
    left: list[int]
    url: str

    @property
    def is_good(self) -> bool:
        return not self.load.wrong and not self.left and self.status == 0


def run(model: str, config: ChaosConfig, flags: Sequence[str]) -> int:
    """0 when every request ended as it would have undisturbed, and nothing is left of the service; else 1."""
    report = asyncio.run(_run(model, config, flags))
    show(report, Console())
    try:
        if config.report.json is not None:
            Path(config.report.json).write_bytes(msgspec.json.format(_as_json(report)))
        if config.report.plot is not None:
            from holdfast.chaos.plot import timeline  # noqa: PLC0415 - matplotlib is slow to import

            timeline(report, Path(config.report.plot))
    except OSError as error:
        raise ConfigError(f"--json/--plot: {error}") from error
    return 0 if report.is_good else 1


async def _run(model: str, config: ChaosConfig, flags: Sequence[str]) -> Report:
    with tempfile.TemporaryDirectory(prefix="holdfast-chaos-") as folder:
        more = [] if any(flag.startswith("--max-restarts") for flag in flags) else ["--max-restarts", "1000000"]
        more += [] if any(flag.startswith("--leak-window") for flag in flags) else ["--leak-window", "2"]
        service = Service(model, [*flags, "--served-model-name", "chaos", *more], Path(folder) / "log")
        await service.start()
        left: list[int] = []
        status = 1
        try:
            async with httpx.AsyncClient(base_url=service.url, timeout=_PATIENCE, trust_env=False) as client:
                load, faults, seconds = await _disturb(service, client, config)
        finally:
            status, left = await service.stop()
        return Report(faults, load, seconds, status, left, service.url)


async def _disturb(
    service: Service, client: httpx.AsyncClient, config: ChaosConfig
) -> tuple[Load, list[Fault], float]:
    asked = bodies("chaos", config.load.requests, config.load.max_tokens, config.fault.seed)
    expected = await _calm(client, asked, config.load.streams)
    load, begun = Load(client, asked, expected), time.monotonic()
    running = asyncio.create_task(load.run(config.load.streams))
    dice, faults = random.Random(config.fault.seed), []
    try:
        for number in range(config.fault.kills):
            await asyncio.sleep(dice.uniform(0.0, 1.5))  # anywhere in prefill and decode
            fault = await _strike(service, config.fault.kinds(), dice, config.fault.pair_percent)
            faults.append(fault)
            await _get_over(service, client, fault)
            if load.wrong:
                break
            if (number + 1) % 10 == 0:
                print(f"{number + 1} faults, {load.num_done} requests, all as they should be", flush=True)
    finally:
        load.over.set()
        await running
    seconds = time.monotonic() - begun
    now = {_key(incident): incident for incident in (await client.get("/cluster")).json()["incidents"]}
    for fault in faults:  # by now all is known of them, but what only an earlier gateway knew
        fault.incidents = [now.get(_key(incident), incident) for incident in fault.incidents]
    return load, faults, seconds


def _key(incident: dict[str, Any]) -> tuple[str, float]:
    return incident["member"], incident["loss"]["detected"]


async def _calm(client: httpx.AsyncClient, asked: list[Body], streams: int) -> list[Choices]:
    """What undisturbed replies are."""
    gate = asyncio.Semaphore(streams)

    async def one(body: Body) -> Choices:
        async with gate:
            return await Visit(client, body).reply()

    try:
        return list(await asyncio.gather(*[one(body) for body in asked]))
    except (httpx.HTTPError, ValueError, Refused) as error:
        raise StartupError(f"a request failed before anything was disturbed: {error}") from error


async def _strike(service: Service, kinds: list[str], dice: random.Random, pair_percent: int) -> Fault:
    kind = dice.choice(kinds)
    action, _, roles = kind.partition("-")
    living, victims = service.processes(), []
    for role in roles.split("+"):
        found = sorted(name for name in living if name.startswith(role))
        if not found:
            raise StartupError(f"there is no {role} to {action}:\n{service.said()[-3000:]}")
        victims += dice.sample(found, 2 if len(found) > 1 and dice.randrange(100) < pair_percent else 1)
    if action == "spoil":
        service.spoil(dice)
    fault = Fault(kind, victims, time.time())
    if action in {"error", "slow", "leak", "corrupt"}:
        for victim in victims:
            service.afflict(victim, action)
        return fault
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):  # it died by itself, which is noticed as well
            living[victim].send_signal(_SIGNALS[action])
    return fault


async def _get_over(service: Service, client: httpx.AsyncClient, fault: Fault) -> None:
    """Until every replica serves again, and those requests that were hit go on. Raises `StartupError` when that takes
    too long: then the service hangs."""
    if not fault.members:
        await asyncio.sleep(_SLOW_SECONDS)
        for victim in fault.victims:
            service.relieve(victim)
    deadline = time.time() + _PATIENCE
    while time.time() < deadline:
        await asyncio.sleep(0.02)
        if service.process.returncode is not None:
            raise StartupError(f"the service ended with {service.process.returncode}:\n{service.said()[-3000:]}")
        try:
            state = (await client.get("/cluster")).json()
        except httpx.HTTPError:
            continue
        fault.incidents = [
            incident for incident in state["incidents"] if incident["loss"]["detected"] >= fault.at - 0.001
        ]
        seen = {incident["member"] for incident in fault.incidents}
        whole = all(replica["status"] == "ready" for replica in state["replicas"])
        if seen >= fault.members and whole and all(incident["back"] is not None for incident in fault.incidents):
            fault.whole_again = time.time()
            return
    raise StartupError(
        f"{fault.kind} of {fault.victims} was not got over in {_PATIENCE:g} s:\n{service.said()[-3000:]}"
    )


# --- the report ---


def show(report: Report, console: Console) -> None:
    """Tables, and the verdict."""
    columns = ("fault", "times", "detected", "first token", "all go on", "whole again")
    table = Table(*columns, title="seconds after the fault: median, 99th percentile")
    for kind in sorted({fault.kind for fault in report.faults}):
        faults = [fault for fault in report.faults if fault.kind == kind]
        table.add_row(
            kind,
            str(len(faults)),
            _times([fault.detected for fault in faults if fault.incidents]),
            _times([min(found) for fault in faults if (found := fault.after("first_token"))]),
            _times([max(found) for fault in faults if (found := fault.after("last_token"))]),
            _times([fault.whole_again - fault.at for fault in faults if fault.whole_again is not None]),
        )
    console.print(table)
    recomputed = [incident["recomputed_most"] for fault in report.faults for incident in fault.incidents]
    tokens = sum(incident["recomputed"] for fault in report.faults for incident in fault.incidents)
    hit = sum(incident["requests"] for fault in report.faults for incident in fault.incidents)
    rungs = [incident["rung"] for fault in report.faults for incident in fault.incidents]
    counts = ", ".join(f"{rung} {rungs.count(rung)} times" for rung in sorted(set(rungs)))
    console.print(
        f"{len(report.faults)} faults in {report.seconds:.0f} s; {report.load.num_done} requests served, "
        f"{report.load.num_refused} refused at the door, {report.load.num_unheard} never heard of; {hit} were hit; "
        f"{report.load.num_returns} came back for the rest; {counts or 'no incident'}"
    )
    console.print(f"tokens computed again: {tokens}; of one request at most {max(recomputed, default=0)}")
    lost = sum(wrong.what.startswith("lost") for wrong in report.load.wrong)
    console.print(f"lost requests: {lost}; changed replies: {len(report.load.wrong) - lost}")
    console.print(f"exit status {report.status}, processes left: {len(report.left)}")
    for wrong in report.load.wrong[:5]:
        console.print(f"request {wrong.index}: {wrong.what[:600]}", markup=False)


def _times(seconds: list[float]) -> str:
    if not seconds:
        return "-"
    ordered = sorted(seconds)
    return f"{statistics.median(ordered):.2f}, {ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]:.2f}"


def _as_json(report: Report) -> bytes:
    return msgspec.json.encode(
        {
            "faults": report.faults,
            "seconds": report.seconds,
            "requests": report.load.num_done,
            "refused": report.load.num_refused,
            "unheard": report.load.num_unheard,
            "came_back": report.load.num_returns,
            "wrong": report.load.wrong,
            "exit_status": report.status,
            "processes_left": report.left,
        }
    )
