"""The gateway, or all of a service, dies: what was accepted is finished, and whoever comes back gets the rest."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.service import Service, demo_model, wait_for

SMALL = ("--kv-cache-memory-bytes", "64M", "--max-model-len", "1024", "--served-model-name", "demo")
BODY: dict[str, Any] = {
    "model": "demo",
    "prompt": "Once upon a time there was a king who",
    "max_tokens": 120,
    "seed": 3,
    "temperature": 0.8,
    "ignore_eos": True,
}
RESUMABLE = {"stream": True, "stream_options": {"resumable": True, "include_usage": True}}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Services that end with the test."""
    services: list[Service] = []

    def start(*flags: str) -> Service:
        services.append(Service(demo_model(), *SMALL, *flags, log=tmp_path / "log"))
        return services[-1].wait_ready()

    yield start
    for service in services:
        if service.process.poll() is None:
            service.process.kill()
        service.wait_end()


class Events:
    """What one or several streams of a request have told, one after the other."""

    def __init__(self) -> None:
        self.chunks: list[dict[str, Any]] = []
        self.last_id: str | None = None
        self.done = False

    def take(self, lines: Iterator[str], until: int | None = None) -> Events:
        """Up to `until` chunks of choices."""
        for line in lines:
            if line.startswith("id: "):
                self.last_id = line[4:]
            elif line == "data: [DONE]":
                self.done = True
            elif line.startswith("data: "):
                self.chunks.append(json.loads(line[6:]))
                assert "error" not in self.chunks[-1], self.chunks[-1]
                if until is not None and len(self.chunks) >= until:
                    break
        return self

    def told(self) -> dict[int, list[Any]]:
        """Of each choice its text, its tokens' logprobs, and its ends."""
        told: dict[int, list[Any]] = {}
        for choice in (choice for chunk in self.chunks for choice in chunk["choices"]):
            text, logprobs, ends = told.setdefault(choice["index"], ["", [], []])
            found = (choice.get("logprobs") or {}).get("token_logprobs", [])
            end = [choice["finish_reason"]] if choice["finish_reason"] else []
            told[choice["index"]] = [text + choice["text"], logprobs + found, ends + end]
        return told

    @property
    def usage(self) -> dict[str, Any]:
        usage: dict[str, Any] = self.chunks[-1]["usage"]
        return {**usage, "prompt_tokens_details": None}  # what was cached may differ


def ask(service: Service, body: dict[str, Any], until: int | None = None) -> Events:
    events = Events()
    with (
        contextlib.suppress(httpx.RemoteProtocolError),
        httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=60) as reply,
    ):
        assert reply.status_code == 200, reply.read()
        events.take(reply.iter_lines(), until)
    return events


def come_back(service: Service, name: str, events: Events) -> Events:
    """For the rest; the last id says from where."""
    headers = {} if events.last_id is None else {"Last-Event-ID": events.last_id}
    with httpx.stream("GET", f"{service.url}/v1/requests/{name}/stream", headers=headers, timeout=60) as reply:
        assert reply.status_code == 200, reply.read()
        return events.take(reply.iter_lines())


def ready_again(service: Service) -> None:
    wait_for("ready again", lambda: service.health()[0] == 200, 60)


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0},
        {"n": 2, "logprobs": 1, "stop": [" of the", "zq"]},
        {"echo": True, "frequency_penalty": 0.5, "max_tokens": 60},
    ],
    ids=", ".join,
)
def test_a_stream_goes_on_after_the_gateway_was_killed(start: Callable[..., Service], more: dict[str, Any]) -> None:
    """Without gap or repeat: text, logprobs, ends and usage are as without the kill."""
    service = start()
    body = BODY | RESUMABLE | more
    calm = ask(service, body)
    assert calm.done
    for until in (1, 20):
        name = f"name{until}"
        events = ask(service, body | {"request_id": name}, until)
        service.child("holdfast gateway").kill()
        ready_again(service)
        come_back(service, f"cmpl-{name}", events)
        assert events.done
        assert events.told() == calm.told()
        assert events.usage == calm.usage
        service.wait_ready()  # which learns the new gateway's pid


def test_replies_that_are_not_streamed_and_streams_without_ids_are_there(start: Callable[..., Service]) -> None:
    """By the name the client gave; all of them, however often it asks."""
    service = start()
    calm = httpx.post(f"{service.url}/v1/completions", json=BODY, timeout=60).json()
    broken: list[Exception] = []

    def post(name: str, stream: bool) -> None:
        try:
            body = BODY | {"stream": stream}
            httpx.post(f"{service.url}/v1/completions", json=body, headers={"X-Request-Id": name}, timeout=60)
        except httpx.HTTPError as error:
            broken.append(error)

    threads = [threading.Thread(target=post, args=(f"r{stream}", stream)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    wait_for("both run", lambda: service.health()[1].get("requests") == 2, 10)
    service.child("holdfast gateway").kill()
    for thread in threads:
        thread.join(60)
    assert len(broken) == 2, "their connections went with the gateway"
    ready_again(service)
    for name in ("cmpl-rFalse", "cmpl-rTrue") * 2:
        found = httpx.get(f"{service.url}/v1/requests/{name}", timeout=60).json()
        assert (found["id"], found["choices"]) == (name, calm["choices"])
    [incident] = httpx.get(f"{service.url}/cluster").json()["incidents"]
    assert (incident["member"], incident["rung"], incident["requests"]) == ("gateway", "restart", 2)
    assert httpx.get(f"{service.url}/v1/requests/nobody").status_code == 404


def test_a_service_that_was_killed_is_gone_on_with_by_the_next(start: Callable[..., Service], tmp_path: Path) -> None:
    """The supervisor dies and takes all with it; the log stays."""
    folder = ("--token-log-dir", str(tmp_path / "tokens"))
    service = start(*folder)
    calm = ask(service, BODY | RESUMABLE)
    name, events = "mine", ask(service, BODY | RESUMABLE | {"request_id": "mine"}, 10)
    service.process.kill()
    assert service.wait_end() == -signal.SIGKILL
    assert (tmp_path / "tokens" / "tokens.log").stat().st_mode & 0o077 == 0, "prompts are nobody else's business"
    again = start(*folder)
    come_back(again, f"cmpl-{name}", events)
    assert events.told() == calm.told()
    assert again.stop() == 0


@pytest.mark.slow
def test_a_gateway_killed_while_draining_drains_on(start: Callable[..., Service], tmp_path: Path) -> None:
    folder = ("--token-log-dir", str(tmp_path / "tokens"))
    service = start(*folder)
    calm = ask(service, BODY | RESUMABLE)
    events = ask(service, BODY | RESUMABLE | {"request_id": "mine"}, 5)
    service.signal(signal.SIGTERM)
    wait_for("draining", lambda: service.health()[0] == 503, 10)
    service.child("holdfast gateway").kill()
    assert service.wait_end() == 0
    again = start(*folder)
    began = time.monotonic()
    come_back(again, "cmpl-mine", events)
    assert time.monotonic() - began < 0.5, "it was finished before"
    assert events.told() == calm.told()


def test_a_gateway_that_dies_again_and_again_is_given_up(start: Callable[..., Service]) -> None:
    service = start("--max-restarts", "0")
    service.child("holdfast gateway").kill()
    assert service.wait_end() == 1
    assert "gateway died (killed by SIGKILL)" in service.text()


def test_a_client_may_leave_and_come_back(start: Callable[..., Service]) -> None:
    """Only if it said so; else its request is cancelled. Nobody's request is kept for ever."""
    service = start("--resume-window", "2")
    calm = ask(service, BODY | RESUMABLE)
    events = ask(service, BODY | RESUMABLE | {"request_id": "mine"}, 4)
    assert not events.done
    come_back(service, "cmpl-mine", events)
    assert events.told() == calm.told()
    url = f"{service.url}/v1/requests/cmpl-mine"
    for after, status in (("3", 200), ("122", 400), ("1,2", 400), ("-1", 400), ("x", 400), ("9" * 30, 400)):
        assert httpx.get(f"{url}/stream", params={"after": after}).status_code == status, after
    late = {"after": "999"}  # a refusal is no visit, which would keep it for longer
    wait_for("forgotten", lambda: httpx.get(f"{url}/stream", params=late).status_code == 404, 10)
    ask(service, BODY | {"stream": True, "request_id": "mine", "max_tokens": 900}, 4)
    wait_for("cancelled", lambda: service.health()[1] == {"status": "ready", "requests": 0}, 5)
    assert httpx.get(url).status_code == 404
