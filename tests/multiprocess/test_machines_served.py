"""A service on two machines, as process trees of their own: one of them dies, stands still, leaves, comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from support.checkpoints import random_model, save
from support.service import START_SECONDS, STOP_SECONDS, Service, free_ports, wait_for
from support.tiny import tiny_model

SERVED = ("--served-model-name", "m", "--max-model-len", "512", "--kv-cache-memory-bytes", "4M", "--cpu-threads", "1")
OWN = ("--kv-cache-memory-bytes", "4M", "--cpu-threads", "1")
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0},
    {"frequency_penalty": 0.5, "logprobs": 1},
    {"n": 2},
    {"min_tokens": 100},
)


class Node:
    """`holdfast serve --headless`."""

    def __init__(self, model: str, meet: list[str], log: Path, *flags: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "holdfast.cli.main", "serve", model, "--headless", *meet, *OWN, *flags]
        with log.open("ab") as sink:
            self.process = subprocess.Popen(command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL)

    def family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            supervisor = psutil.Process(self.process.pid)
            return [supervisor, *supervisor.children(recursive=True)]
        return []

    def signal_all(self, number: int) -> None:
        for process in self.family():
            process.send_signal(number)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit status; no process of it may be left."""
        family = self.family()
        self.process.send_signal(number)
        status = self.process.wait(STOP_SECONDS)
        wait_for("all of the node gone", lambda: not [each for each in family if is_there(each)], 5.0)
        return status


def is_there(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


class Two:
    """The first machine, and the node that there is now."""

    def __init__(self, model: str, folder: Path, *flags: str) -> None:
        self.model, self.folder = model, folder
        key = folder / "node.key"
        key.write_bytes(secrets.token_bytes(32))
        port = str(free_ports())
        self.meet = ["--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", port]
        self.meet += ["--node-key-file", str(key)]
        self.flags = [*SERVED, "--data-parallel-size", "2", "--data-parallel-size-local", "1", *self.meet, *flags]
        self.first = Service(model, *self.flags, log=folder / "first")
        self.nodes: list[Node] = []
        self.join()
        self.first.wait_ready()

    def join(self) -> Node:
        self.nodes.append(Node(self.model, self.meet, self.folder / f"node-{len(self.nodes)}"))
        return self.nodes[-1]

    @property
    def node(self) -> Node:
        return self.nodes[-1]

    def cluster(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.first.url}/cluster", timeout=5) as reply:
            found: dict[str, Any] = json.load(reply)
            return found

    def is_whole(self) -> bool:
        return [replica["status"] for replica in self.cluster()["replicas"]] == ["ready", "ready"]

    def wait_whole(self) -> None:
        wait_for("both machines serve", self.is_whole, START_SECONDS)

    def ask(self, amid: Callable[[], object] | None = None) -> list[Any]:
        """Replies of all kinds; `amid` happens when some tokens are there."""
        prompts = [
            {"model": "m", "prompt": f"{i} boats went out to sea " * (1 + i % 5), "seed": i} for i in range(20)
        ]
        shared = {"max_tokens": 150, "ignore_eos": True, "temperature": 0.7}
        asked = [prompt | shared | KINDS[i % len(KINDS)] for i, prompt in enumerate(prompts)]

        def tokens() -> float:
            return self.first.metrics()["holdfast:generation_tokens_total"]

        async def ask() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=self.first.url, timeout=120) as client:
                before = tokens()
                asking = [asyncio.create_task(client.post("/v1/completions", json=body)) for body in asked]
                if amid is not None:
                    await asyncio.to_thread(wait_for, "tokens", lambda: tokens() > before + 400, 30)
                    await asyncio.to_thread(amid)
                return list(await asyncio.gather(*asking))

        replies = asyncio.run(ask())
        assert {reply.status_code for reply in replies} == {200}, [reply.text for reply in replies][:2]
        return [[(choice["text"], choice["logprobs"]) for choice in reply.json()["choices"]] for reply in replies]

    def last_incident(self) -> dict[str, Any]:
        incident: dict[str, Any] = self.cluster()["incidents"][-1]
        return incident

    def close(self) -> None:
        if self.first.process.poll() is None:
            self.first.stop()
        for node in self.nodes:
            if node.process.poll() is None:
                node.signal_all(signal.SIGCONT)
                node.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def two(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    two = Two(model, tmp_path_factory.mktemp("two"))
    yield two
    two.close()


@pytest.fixture(scope="module")
def calm(two: Two) -> list[Any]:
    """Replies when nothing happens."""
    return two.ask()


def test_both_machines_serve(two: Two, calm: list[Any]) -> None:
    [worker] = [each for each in two.node.family() if "worker 1.0.0" in " ".join(each.cmdline())]
    before = worker.cpu_times().user
    assert two.ask() == calm
    assert worker.cpu_times().user > before
    [machine] = two.cluster()["machines"]
    assert (machine["replicas"], machine["status"]) == ([1], "ready")
    kept = two.first.metrics()["holdfast:checkpoint_copies_kept_total"]
    wait_for("second copies", lambda: two.first.metrics()["holdfast:checkpoint_copies_kept_total"] > min(kept, 5), 10)


def test_a_machine_dies_and_another_takes_its_place(two: Two, calm: list[Any]) -> None:
    family = two.node.family()
    assert two.ask(lambda: two.node.process.send_signal(signal.SIGKILL)) == calm
    wait_for("all of it gone", lambda: not [each for each in family if is_there(each)], 10)
    incident = two.last_incident()
    assert (incident["member"], incident["loss"]["kind"], incident["rung"]) == ("replica 1", "machine", "failover")
    assert incident["loss"]["ranks"] == ["worker 1.0.0"]
    assert incident["requests"] > 3
    assert incident["recomputed_most"] < 64
    assert two.first.health()[0] == 200
    assert [machine["status"] for machine in two.cluster()["machines"]] == ["lost"]
    two.join()
    two.wait_whole()
    assert [machine["status"] for machine in two.cluster()["machines"]] == ["ready"]
    assert two.last_incident()["back"] is not None
    assert two.ask() == calm


def test_a_machine_that_stood_still_is_not_heard_before_it_has_joined_again(two: Two, calm: list[Any]) -> None:
    assert two.ask(lambda: two.node.signal_all(signal.SIGSTOP)) == calm
    assert "not been heard for 3 s" in two.last_incident()["reason"]
    assert not two.is_whole()
    two.node.signal_all(signal.SIGCONT)
    two.wait_whole()
    assert len(two.node.family()) > 3  # the same processes
    assert two.ask() == calm


@pytest.mark.parametrize("title", ["holdfast hub", "holdfast outpost", "holdfast engine 1"])
def test_a_process_between_the_machines_dies(two: Two, calm: list[Any], title: str) -> None:
    [victim] = [
        each
        for each in [*psutil.Process(two.first.process.pid).children(), *two.node.family()]
        if " ".join(each.cmdline()).startswith(title)
    ]
    assert two.ask(lambda: victim.send_signal(signal.SIGKILL)) == calm
    assert two.last_incident()["member"] == "replica 1"
    two.wait_whole()
    assert two.ask() == calm


def test_a_replica_elsewhere_is_restarted_on_demand(two: Two, calm: list[Any]) -> None:
    before = two.cluster()["replicas"][1]["epoch"]

    def restart() -> None:
        httpx.post(f"{two.first.url}/cluster/replicas/1/restart").raise_for_status()

    assert two.ask(restart) == calm
    two.wait_whole()
    assert two.cluster()["replicas"][1]["epoch"] == before + 1


def test_a_machine_leaves(two: Two, calm: list[Any]) -> None:
    assert two.ask(two.node.end) == calm
    assert two.node.process.returncode == 0, two.node.log.read_text()[-2000:]
    assert two.last_incident()["loss"]["kind"] == "planned"
    two.join()
    two.wait_whole()


def test_machines_that_cannot_be_had_are_told_why(two: Two, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    another = save(random_model(model_type="llama", num_key_value_heads=2, vocab_size=1024, **sizes), other)
    for model, flags, complaint in (
        (another, (), "its tokens would differ: checkpoint: "),
        (two.model, ("--data-parallel-size-local", "2"), "it has 2 replicas, the service leaves 1 to other machines"),
        (two.model, ("--max-num-seqs", "4"), "--max-num-seqs: with --headless this is what the service says"),
    ):
        node = Node(model, two.meet, tmp_path / "log", *flags)
        assert node.process.wait(START_SECONDS) == 2
        assert complaint in (tmp_path / "log").read_text()
    bad = tmp_path / "bad.key"
    bad.write_bytes(secrets.token_bytes(32))
    node = Node(two.model, [*two.meet[:-1], str(bad)], tmp_path / "log")
    wait_for("a word", lambda: "is its --node-key-file another one?" in (tmp_path / "log").read_text(), START_SECONDS)
    assert node.end() == 0


def test_the_end_of_the_service_is_that_of_its_machines(model: str, tmp_path: Path) -> None:
    """And a first machine that was killed is waited for: the next one finishes what it had accepted."""
    two = Two(model, tmp_path, "--token-log-dir", str(tmp_path / "tokens"))
    try:
        body = {"model": "m", "prompt": "boats", "max_tokens": 400, "ignore_eos": True, "seed": 1, "request_id": "x"}
        with httpx.Client(base_url=two.first.url, timeout=60) as client:
            whole = client.post("/v1/completions", json=body | {"request_id": "y"}).json()["choices"][0]["text"]
            more = {"stream": True, "stream_options": {"resumable": True}}
            with client.stream("POST", "/v1/completions", json=body | more) as reply:
                next(reply.iter_lines())
                two.first.process.send_signal(signal.SIGKILL)
        two.first.wait_end()
        two.first = Service(model, *two.flags, log=tmp_path / "second").wait_ready()
        assert two.is_whole()
        again = wait_for("the reply", lambda: reply_of(two.first.url, "cmpl-x"), 60)
        assert again["choices"][0]["text"] == whole
        assert two.first.stop() == 0
        assert two.node.process.wait(STOP_SECONDS) == 0
    finally:
        two.close()


def reply_of(url: str, name: str) -> dict[str, Any] | None:
    reply = httpx.get(f"{url}/v1/requests/{name}", timeout=60)
    return reply.json() if reply.status_code == 200 else None
