"""Workers that are not at fault keep their processes and their weights when another one of their replica is lost."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from support.builds import builds
from support.service import Service, wait_for
from support.tiny import tiny_model

pytestmark = pytest.mark.skipif(not builds(), reason="Holdfast was installed without a C compiler")
FLAGS = ("--served-model-name", "m", "--max-model-len", "512", "--kv-cache-memory-bytes", "2M", "--cpu-threads", "1")
TOKENS = "holdfast:generation_tokens_total"
KILL, STOP = signal.SIGKILL, signal.SIGSTOP


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(model: str, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    services: list[Service] = []

    def started(*flags: str) -> Service:
        log = tmp_path / f"log{len(services)}"
        services.append(Service(model, *FLAGS, *flags, log=log))
        return services[-1].wait_ready()

    yield started
    for service in services:
        service.stop()


async def ask(url: str) -> list[str]:
    bodies = [
        {"model": "m", "prompt": f"{i} boats " * (3 + i), "max_tokens": 250, "seed": i, "ignore_eos": True}
        for i in range(6)
    ]
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        replies = await asyncio.gather(*[client.post("/v1/completions", json=body) for body in bodies])
    assert {reply.status_code for reply in replies} == {200}, [reply.text for reply in replies][:2]
    return [reply.json()["choices"][0]["text"] for reply in replies]


async def amid(service: Service, strike: Callable[[], None]) -> list[str]:
    """Replies to requests that are under way when something happens."""
    begun = service.metrics().get(TOKENS, 0)
    asking = asyncio.create_task(ask(service.url))
    await asyncio.to_thread(wait_for, "tokens", lambda: service.metrics()[TOKENS] > begun + 300, 60)
    await asyncio.to_thread(strike)
    return await asking


def send(service: Service, number: signal.Signals, *titles: str) -> Callable[[], None]:
    """To all of them at once."""
    children = [service.child(f"holdfast {title}") for title in titles]

    def strike() -> None:
        for child in children:
            child.send_signal(number)

    return strike


def pids(service: Service, role: str = "worker") -> dict[str, int]:
    """Of its children by name, once all have theirs."""
    found = {}
    for child in psutil.Process(service.process.pid).children(recursive=True):
        try:
            name = " ".join(child.cmdline()).removeprefix("holdfast ").strip()
        except psutil.NoSuchProcess:
            continue
        if name.startswith(role):
            found[name] = child.pid
    return found


def cluster(service: Service) -> dict[str, Any]:
    told: dict[str, Any] = httpx.get(f"{service.url}/cluster").json()
    return told


def again(service: Service, count: int) -> dict[str, Any]:
    """The last of so many incidents, once its replica serves again."""

    def back() -> dict[str, Any] | None:
        told: list[dict[str, Any]] = cluster(service)["incidents"]
        return told[-1] if len(told) == count and told[-1]["back"] else None

    incident: dict[str, Any] = wait_for("it serves again", back, 120)
    service.wait_ready()
    return incident


def test_who_is_not_at_fault_stays(start: Callable[..., Service]):
    """After a death, a hang, an engine's death; a spare takes the place of the dead, and another one is started. A
    restart that somebody wants is one of all processes."""
    service = start("--tensor-parallel-size", "2", "--max-restarts", "9", "--spare-workers", "1")
    calm = asyncio.run(ask(service.url))
    has_spare = lambda: cluster(service)["spare_workers"] == 1  # noqa: E731
    wait_for("a spare", has_spare, 120)

    before, spare = pids(service), pids(service, "spare")["spare 0"]
    assert asyncio.run(amid(service, send(service, KILL, "worker 0.0.1"))) == calm
    told, after = again(service, 1), pids(service)
    assert after == {"worker 0.0.0": before["worker 0.0.0"], "worker 0.0.1": spare}
    assert told["rung"] == "restart"
    assert told["weights_kept"] > 0
    assert told["weights_loaded"] > 0
    wait_for("another spare", has_spare, 120)

    spare = pids(service, "spare")["spare 0"]
    psutil.Process(spare).kill()
    wait_for("it is noticed", lambda: "spare 0 died (killed by SIGKILL)" in service.text(), 10)
    wait_for("another spare", lambda: has_spare() and pids(service, "spare")["spare 0"] != spare, 120)
    assert len(cluster(service)["incidents"]) == 1, "nobody was hit by that"

    before = pids(service)
    assert asyncio.run(amid(service, send(service, KILL, "engine 0"))) == calm
    told = again(service, 2)
    assert pids(service) == before
    assert told["weights_loaded"] == 0

    assert asyncio.run(amid(service, send(service, STOP, "worker 0.0.0"))) == calm
    told, after = again(service, 3), pids(service)
    assert (told["loss"]["kind"], told["loss"]["process"]) == ("hang", "worker 0.0.0")
    assert after["worker 0.0.1"] == before["worker 0.0.1"]
    assert after["worker 0.0.0"] != before["worker 0.0.0"]
    assert not psutil.pid_exists(before["worker 0.0.0"])

    httpx.post(f"{service.url}/cluster/replicas/0/restart").raise_for_status()
    assert again(service, 4)["loss"]["kind"] == "planned"
    assert not set(after.values()) & set(pids(service).values())
    assert asyncio.run(ask(service.url)) == calm


@pytest.mark.parametrize(
    ("cut", "ranks", "victims"),
    [
        ("--tensor-parallel-size", 4, ("worker 0.0.1", "worker 0.0.2")),
        pytest.param("--pipeline-parallel-size", 3, ("worker 0.0.0", "worker 0.1.0"), marks=pytest.mark.slow),
    ],
)
def test_two_ranks_are_lost_at_once(start: Callable[..., Service], cut: str, ranks: int, victims: tuple[str, ...]):
    """The others go on, in new places, and are joined by two when it is time for all ranks again."""
    service = start(cut, str(ranks), "--max-restarts", "0", "--regrow-interval", "5")
    calm, before = asyncio.run(ask(service.url)), pids(service)
    assert asyncio.run(amid(service, send(service, KILL, *victims))) == calm
    left = {pid for name, pid in before.items() if name not in victims}
    wait_for("fewer", lambda: [r["ranks"] for r in cluster(service)["replicas"]] == [ranks - 2], 60)
    assert set(pids(service).values()) == left
    told = cluster(service)["incidents"][-1]
    assert told["rung"] == "reshape"
    assert told["weights_kept"] > 0
    wait_for("all ranks", lambda: [r["ranks"] for r in cluster(service)["replicas"]] == [ranks], 120)
    assert left < set(pids(service).values())
    service.wait_ready()
    assert asyncio.run(ask(service.url)) == calm


@pytest.mark.parametrize(
    ("number", "kind"),
    [(KILL, "death"), pytest.param(STOP, "hang", marks=pytest.mark.slow)],
    ids=["killed", "stopped"],
)
def test_one_that_stays_is_lost_on_the_way(start: Callable[..., Service], number: signal.Signals, kind: str):
    """Others stay again when it was killed. After one that stood still in that moment all are new: as if it had not
    taken its place."""
    service = start("--tensor-parallel-size", "3", "--max-restarts", "9")
    calm, before = asyncio.run(ask(service.url)), pids(service)

    def strike() -> None:
        later = send(service, number, "worker 0.0.0")
        send(service, KILL, "worker 0.0.1")()
        wait_for("two stay", lambda: "2 of its 3 workers stay" in service.text(), 10)
        later()  # while a new process imports what it needs

    assert asyncio.run(amid(service, strike)) == calm
    told, after = again(service, 2), pids(service)
    assert [each["loss"]["kind"] for each in cluster(service)["incidents"]] == ["death", kind]
    assert told["loss"]["process"] == "worker 0.0.0"
    assert after["worker 0.0.0"] != before["worker 0.0.0"]
    assert (after["worker 0.0.2"] == before["worker 0.0.2"]) is (number == KILL)
    assert asyncio.run(ask(service.url)) == calm


def test_nobody_is_left_waiting_when_the_supervisor_is_killed(start: Callable[..., Service]):
    service = start("--tensor-parallel-size", "2", "--spare-workers", "1")
    wait_for("a spare", lambda: cluster(service)["spare_workers"] == 1, 120)
    send(service, KILL, "worker 0.0.1")()
    wait_for("one stays", lambda: "1 of its 2 workers stay" in service.text(), 10)
    service.children = psutil.Process(service.process.pid).children(recursive=True)
    service.process.kill()
    assert service.wait_end() == -KILL


@pytest.mark.slow
def test_nobody_stays_where_weights_are_held_together(start: Callable[..., Service]):
    service = start(
        "--data-parallel-size", "2", "--tensor-parallel-size", "2", "--shard-weights", "--max-restarts", "9"
    )
    before = pids(service)
    send(service, KILL, "worker 1.0.1")()
    again(service, 1)
    after = pids(service)
    assert {name for name in before if before[name] == after[name]} == {"worker 0.0.0", "worker 0.0.1"}
