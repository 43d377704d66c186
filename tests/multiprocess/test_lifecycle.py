"""Start, stop and death of the real processes. Guards against orphans, silent ends, and lies on /health."""

from __future__ import annotations

import json
import signal
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from support.service import TITLES, Service, demo_model, wait_for

SMALL = ("--kv-cache-memory-bytes", "64M", "--max-model-len", "1024")


@pytest.fixture
def service(tmp_path: Path, request: pytest.FixtureRequest):
    service = Service(demo_model(), *SMALL, *getattr(request, "param", ()), log=tmp_path / "log")
    try:
        yield service.wait_ready()
    finally:
        if service.process.poll() is None:
            service.process.kill()
        service.wait_end()


class Stream(threading.Thread):
    """One streamed completion in a thread; `first` is set at its first event, `events` are the data lines."""

    def __init__(self, service: Service, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.service, self.max_tokens = service, max_tokens
        self.first, self.events = threading.Event(), []
        self.start()
        assert self.first.wait(60)

    def run(self) -> None:
        body = {"prompt": "Once upon a time", "max_tokens": self.max_tokens, "seed": 7}
        body |= {"stream": True, "ignore_eos": True, "model": "SmolLM2-135M-Instruct.Q4_1"}
        request = urllib.request.Request(
            f"{self.service.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            for line in reply:
                if line.startswith(b"data: "):
                    self.events.append(line[6:].strip().decode())
                    self.first.set()

    def result(self) -> list[str]:
        self.join(60)
        assert not self.is_alive(), "a request was left without a terminal reply"
        return self.events


def test_processes_are_named_and_health_is_true(service: Service):
    assert service.health()[0] == 200
    for title in TITLES:
        assert service.child(title).is_running()
    assert len(service.children) == len(TITLES)
    assert "curl " in service.text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_then_stops(service: Service, number: signal.Signals):
    stream = Stream(service, max_tokens=60)
    service.signal(number)
    wait_for("draining", lambda: service.health()[0] in (503, 0), 10)
    assert service.wait_end() == 0
    events = stream.result()
    assert events[-1] == "[DONE]", "a live request is finished, not cut"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"


def test_a_signal_to_every_process_still_drains(service: Service):
    """systemd and a terminal tell the whole group."""
    stream = Stream(service, max_tokens=60)
    for process in [*service.children, service.process]:
        process.send_signal(signal.SIGTERM)
    assert service.wait_end() == 0
    assert stream.result()[-1] == "[DONE]"


def test_a_second_signal_ends_live_requests_with_an_error(service: Service):
    stream = Stream(service, max_tokens=900)
    service.signal(signal.SIGTERM)
    wait_for("draining", lambda: service.health()[0] == 503, 10)
    service.signal(signal.SIGTERM)
    assert service.wait_end() == 0
    assert "error" in json.loads(stream.result()[-1])


@pytest.mark.parametrize("title", ["holdfast worker 0.0.0", "holdfast engine 0"])
@pytest.mark.parametrize("service", [("--max-restarts", "0")], indirect=True)
def test_a_killed_child_ends_requests_definitely_and_the_service_with_1(service: Service, title: str):
    stream = Stream(service, max_tokens=900)
    service.child(title).kill()
    assert service.wait_end() == 1
    error = json.loads(stream.result()[-1])["error"]
    assert "SIGKILL" in error["message"]
    assert title.removeprefix("holdfast ") in error["message"]


@pytest.mark.parametrize("title", ["holdfast worker 0.0.0", "holdfast engine 0"])
def test_a_killed_child_comes_back_and_its_request_goes_on(service: Service, title: str):
    """Token for token; until it is back /health says so, and new requests are refused at the door."""
    calm = Stream(service, max_tokens=200).result()
    stream = Stream(service, max_tokens=200)
    service.child(title).kill()
    wait_for("recovering", lambda: service.health()[1].get("status") == "recovering", 5)
    assert service.health()[0] == 503
    assert text(stream.result()) == text(calm)
    assert service.health()[0] == 200
    assert text(Stream(service, max_tokens=200).result()) == text(calm)
    service.wait_ready()
    assert len(service.children) == len(TITLES)
    assert "serves again, after" in service.text()


def test_a_worker_that_stands_still_is_replaced(service: Service):
    """It neither ends nor answers: found out by what it no longer counts, killed, and its request goes on."""
    calm = Stream(service, max_tokens=400).result()
    stream = Stream(service, max_tokens=400)
    worker = service.child("holdfast worker 0.0.0")
    stopped = time.monotonic()
    worker.suspend()
    wait_for("found out", lambda: service.health()[0] == 503, 10)
    assert time.monotonic() - stopped < 3.0
    assert text(stream.result()) == text(calm)
    assert not worker.is_running()
    assert "no rank of replica 0 has come further" in service.text()


@pytest.mark.slow
def test_a_worker_that_is_stopped_while_it_starts_or_is_idle_is_replaced(service: Service):
    """It gives no sign of life, nor need it; but that it is held, the system says."""
    calm = Stream(service, max_tokens=200).result()
    stream, title = Stream(service, max_tokens=200), "holdfast worker 0.0.0"
    service.child(title).kill()
    wait_for("recovering", lambda: service.health()[0] == 503, 5)

    def started() -> psutil.Process | None:
        living = {" ".join(child.cmdline()): child for child in psutil.Process(service.process.pid).children()}
        return next((child for command, child in living.items() if "worker 0.0.0" in command), None)

    wait_for("another", started, 10).suspend()
    stopped = time.monotonic()
    wait_for("found out", lambda: "worker 0.0.0 was stopped (SIGSTOP)" in service.text(), 10)
    assert time.monotonic() - stopped < 3.0
    assert text(stream.result()) == text(calm)
    service.wait_ready()
    service.child(title).suspend()  # with nothing to do
    wait_for("found out again", lambda: len(service.incidents()) == 3, 10)
    service.wait_ready()
    assert text(Stream(service, max_tokens=200).result()) == text(calm)
    assert [incident["loss"]["kind"] for incident in service.incidents()] == ["death", "hang", "hang"]


@pytest.mark.parametrize("busy", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_engine_that_stands_still_is_replaced(service: Service, busy: bool):
    """It gives no sign of life: killed, and its request goes on."""
    calm = Stream(service, max_tokens=200).result()
    stream = Stream(service, max_tokens=200) if busy else None
    stopped = time.monotonic()
    service.child("holdfast engine 0").suspend()
    wait_for("found out", lambda: service.health()[0] == 503, 10)
    assert time.monotonic() - stopped < 5.0
    wait_for("back", lambda: service.health()[0] == 200, 30)
    assert text((stream or Stream(service, max_tokens=200)).result()) == text(calm)
    assert "engine 0 has not been heard for 3 s" in service.text()


@pytest.mark.slow
def test_a_pause_of_everything_is_no_hang(service: Service):
    """A laptop that sleeps, a container that is frozen: nothing has happened."""
    calm = Stream(service, max_tokens=400).result()
    stream = Stream(service, max_tokens=400)
    everybody = [psutil.Process(service.process.pid), *service.children]
    for process in everybody:
        process.suspend()
    frozen_until = time.monotonic() + 4.0
    wait_for("a while", lambda: time.monotonic() > frozen_until, 10)
    for process in reversed(everybody):
        process.resume()
    assert text(stream.result()) == text(calm)
    assert "come further" not in service.text()
    assert "is lost" not in service.text()


@pytest.mark.parametrize("service", [("--max-restarts", "1")], indirect=True)
def test_a_child_that_dies_again_and_again_is_given_up(service: Service):
    stream = Stream(service, max_tokens=900)
    service.child("holdfast worker 0.0.0").kill()
    wait_for("it serves again", lambda: "serves again" in service.text(), 30)
    service.wait_ready()
    service.child("holdfast worker 0.0.0").kill()
    assert service.wait_end() == 1
    assert "SIGKILL" in json.loads(stream.result()[-1])["error"]["message"]


def test_stop_while_a_child_comes_back(service: Service):
    """What waits for it is finished first."""
    stream = Stream(service, max_tokens=60)
    service.child("holdfast worker 0.0.0").kill()
    wait_for("recovering", lambda: service.health()[0] == 503, 5)
    service.signal(signal.SIGTERM)
    assert service.wait_end() == 0
    assert stream.result()[-1] == "[DONE]"


def text(events: list[str]) -> str:
    """Of a whole stream."""
    assert events[-1] == "[DONE]", events[-1]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1] if json.loads(event)["choices"])


def test_no_orphan_when_the_supervisor_is_killed(service: Service):
    """Not even of those that stand still."""
    for title in ("holdfast worker 0.0.0", "holdfast gateway"):
        service.child(title).suspend()
    service.process.kill()
    assert service.wait_end() == -signal.SIGKILL
    assert not service.living_children()


def test_stop_while_loading_leaves_nothing(tmp_path: Path):
    service = Service(demo_model(), *SMALL, log=tmp_path / "log")
    wait_for("children started", lambda: psutil.Process(service.process.pid).children(), 30)
    assert service.stop() == 0


def test_a_busy_port_is_said_by_name(service: Service, tmp_path: Path):
    second = Service(demo_model(), *SMALL, "--port", str(service.port), log=tmp_path / "second")
    assert second.wait_end() == 2
    assert str(service.port) in second.text()
    assert "Traceback" not in second.text()
    assert service.health()[0] == 200


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-model-len", "8193"], "--max-model-len 8193: the model knows 8192 positions"),
        (["--max-model-len", "8192", "--kv-cache-memory-bytes", "1M"], "the KV cache holds"),
        (["--kv-cache-memory-bytes", "1"], "a block needs"),
        (["--device", "cuda"], "--device cuda"),
    ],
)
def test_what_cannot_run_is_refused_by_name(tmp_path: Path, flags: list[str], said: str):
    if flags[0] == "--device" and Path("/dev/nvidia0").exists():
        pytest.skip("there is a CUDA device")
    service = Service(demo_model(), *flags, log=tmp_path / "log")
    assert service.wait_end() == 2
    assert said in service.text()
    assert "Traceback" not in service.text()


def test_no_files_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    service = Service(demo_model(), *SMALL, log=tmp_path / "log").wait_ready()
    assert list(tmp_path.glob("holdfast-*"))
    assert service.stop() == 0
    assert not list(tmp_path.glob("holdfast-*"))
