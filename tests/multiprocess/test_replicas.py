"""Several copies of the model under one gateway: the same answers, and those that are left when one dies."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from support.builds import builds
from support.service import Service, wait_for
from support.tiny import tiny_model

NEEDS_C = pytest.mark.skipif(not builds(), reason="Holdfast was installed without a C compiler")
TOKENS = "holdfast:generation_tokens_total"
FLAGS = ("--served-model-name", "m", "--max-model-len", "512", "--kv-cache-memory-bytes", "4M", "--cpu-threads", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("model"))


def bodies(count: int, **more: object) -> list[dict[str, object]]:
    return [
        {"model": "m", "prompt": f"{i} boats went out to sea " * (1 + i % 5), "max_tokens": 30, "seed": i} | more
        for i in range(count)
    ]


async def ask(url: str, asked: list[dict[str, object]]) -> list[httpx.Response]:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        return list(await asyncio.gather(*[client.post("/v1/completions", json=body) for body in asked]))


def texts(replies: list[httpx.Response]) -> list[str]:
    assert {reply.status_code for reply in replies} == {200}, [reply.text for reply in replies][:2]
    return [reply.json()["choices"][0]["text"] for reply in replies]


def test_two_replicas_answer_as_one_does(model: str, tmp_path: Path):
    """And both of them do."""
    answers = []
    for degree in ("1", "2"):
        service = Service(model, *FLAGS, "--data-parallel-size", degree, log=tmp_path / degree).wait_ready()
        try:
            workers = [service.child(f"holdfast worker {i}.0.0") for i in range(int(degree))]
            before = [worker.cpu_times().user for worker in workers]
            answers.append(texts(asyncio.run(ask(service.url, bodies(40)))))
            worked = [worker.cpu_times().user > start for worker, start in zip(workers, before, strict=True)]
        finally:
            assert service.stop() == 0, service.text()[-2000:]
    assert answers[0] == answers[1]
    assert worked == [True, True]


@pytest.mark.parametrize(
    ("victim", "more"),
    [
        ("holdfast engine 1", ()),
        pytest.param("holdfast worker 1.0.0", ("--shard-weights",), marks=NEEDS_C),
    ],
    ids=["engine", "worker, weights held together"],
)
def test_requests_of_a_replica_that_dies_go_on_in_the_other(
    model: str, victim: str, more: tuple[str, ...], tmp_path: Path
):
    """A request that is lost, or gets a token twice, not at all, or another one than it would have got. What is left
    serves on, and ends with 1 when it dies too."""
    flags = ("--data-parallel-size", "2", "--max-restarts", "0")
    service = Service(model, *FLAGS, *flags, *more, log=tmp_path / "log").wait_ready()
    last = service.child("holdfast engine 0")
    kinds = ({}, {"temperature": 0}, {"frequency_penalty": 0.5, "logprobs": 1}, {"n": 2}, {"min_tokens": 100})
    asked = [
        body | kinds[i % 5] for i, body in enumerate(bodies(30, max_tokens=200, ignore_eos=True, temperature=0.7))
    ]

    async def kill_one_amid() -> list[httpx.Response]:
        asking = asyncio.create_task(ask(service.url, asked))
        await asyncio.to_thread(
            wait_for, "tokens", lambda: service.metrics()["holdfast:generation_tokens_total"] > calm_tokens + 500, 30
        )
        service.child(victim).send_signal(signal.SIGKILL)
        return await asking

    try:
        calm = contents(asyncio.run(ask(service.url, asked)))
        calm_tokens = service.metrics()["holdfast:generation_tokens_total"]
        assert contents(asyncio.run(kill_one_amid())) == calm
        moved = re.search(r"(\d+) requests go on", service.text())
        assert moved, service.text()[-2000:]
        assert int(moved[1]) > 3
        assert service.health()[0] == 200
        wait_for("the rest of it is gone", lambda: len(service.living_children()) == 4, 10)
        assert contents(asyncio.run(ask(service.url, asked))) == calm
        last.send_signal(signal.SIGKILL)
        assert service.wait_end() == 1
    finally:
        service.stop()


@pytest.mark.parametrize(
    "more", [(), pytest.param(("--shard-weights",), marks=NEEDS_C)], ids=["", "weights held together"]
)
def test_a_replica_that_died_comes_back(model: str, more: tuple[str, ...], tmp_path: Path):
    """It takes requests again, and gives the same answers."""
    service = Service(model, *FLAGS, "--data-parallel-size", "2", *more, log=tmp_path / "log").wait_ready()
    try:
        calm = contents(asyncio.run(ask(service.url, bodies(30))))
        service.child("holdfast worker 1.0.0").send_signal(signal.SIGKILL)
        assert contents(asyncio.run(ask(service.url, bodies(30)))) == calm
        wait_for("back", lambda: "replica 1 serves again" in service.text(), 30)
        worker = service.wait_ready().child("holdfast worker 1.0.0")
        before = worker.cpu_times().user
        assert contents(asyncio.run(ask(service.url, bodies(30)))) == calm
        assert worker.cpu_times().user > before
    finally:
        assert service.stop() == 0, service.text()[-3000:]


@pytest.mark.slow
def test_both_replicas_die_at_once_again_and_again(model: str, tmp_path: Path):
    """What the dead leave is not mistaken for what the new have: nobody is forgotten, nothing is lost."""
    flags = ("--data-parallel-size", "2", "--max-restarts", "9")
    service = Service(model, *FLAGS, *flags, log=tmp_path / "log").wait_ready()
    try:
        calm = contents(asyncio.run(ask(service.url, bodies(20))))
        for deaths in range(1, 4):
            for replica in (1, 0):
                service.child(f"holdfast worker {replica}.0.0").send_signal(signal.SIGKILL)
            wait_for("both back", lambda: service.text().count("serves again") == 2 * deaths, 30)  # noqa: B023
            service.wait_ready()
            wait_for("six processes", lambda: len(service.living_children()) == 6, 5)
            assert contents(asyncio.run(ask(service.url, bodies(20)))) == calm
        incidents = httpx.get(f"{service.url}/cluster").json()["incidents"]
        assert len(incidents) == 6
        assert {incident["loss"]["process"] for incident in incidents} == {"worker 0.0.0", "worker 1.0.0"}
        assert all(incident["back"] for incident in incidents)
    finally:
        assert service.stop() == 0, service.text()[-3000:]


def contents(replies: list[httpx.Response]) -> list[object]:
    """What they say, without ids and times."""
    assert {reply.status_code for reply in replies} == {200}, [reply.text for reply in replies][:2]
    return [(reply.json()["choices"], reply.json()["usage"]["completion_tokens"]) for reply in replies]


@pytest.mark.parametrize(("flag", "said"), [("0", "must be at least 1"), ("65", "must be at most 64")])
def test_degrees_that_cannot_be_are_refused(model: str, flag: str, said: str, tmp_path: Path):
    service = Service(model, *FLAGS, "--data-parallel-size", flag, log=tmp_path / "log")
    assert service.process.wait(60) == 2
    assert f"--data-parallel-size {flag}: {said}" in service.text()


def test_replicas_are_drained_one_after_another(model: str, tmp_path: Path):
    """The rolling restart: every process is another one afterwards, and nobody has noticed."""
    service = Service(model, *FLAGS, "--data-parallel-size", "2", log=tmp_path / "log").wait_ready()
    before = {service.child(f"holdfast {role} {replica}").pid for role in ("engine",) for replica in range(2)}
    command = [sys.executable, "-m", "holdfast.cli.main", "drain", service.url]
    asked = bodies(20, max_tokens=300, ignore_eos=True, temperature=0.7)

    async def drained_amid() -> tuple[list[httpx.Response], str]:
        asking = asyncio.create_task(ask(service.url, asked))
        await asyncio.to_thread(wait_for, "tokens", lambda: service.metrics()[TOKENS] > calm_tokens + 300, 30)
        drain = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        said, _ = await drain.communicate()
        assert drain.returncode == 0
        return await asking, said.decode()

    try:
        calm = contents(asyncio.run(ask(service.url, asked)))
        calm_tokens = service.metrics()[TOKENS]
        replies, said = asyncio.run(drained_amid())
        assert contents(replies) == calm
        assert [line[:9] for line in said.splitlines()] == ["replica 0", "replica 1"]
        service.wait_ready()
        assert not before & {child.pid for child in service.living_children()}
        assert {each["loss"]["kind"] for each in service.incidents()} == {"planned"}
        for arguments, words in ((["--replica", "7"], "there are 0, 1"), (["--timeout", "0"], "at least 1")):
            refused = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
            assert (refused.returncode, words in refused.stderr) == (2, True), refused.stderr
    finally:
        assert service.stop() == 0, service.text()[-3000:]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (refused.returncode, "no answer" in refused.stderr) == (2, True), refused.stderr
