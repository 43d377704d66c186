"""The peers as the benchmark sees them: something that starts, runs a job, is held still meanwhile, and ends."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..limits import Limits
from .work import OURS, OUT, THREADS, Job, Model

PEERS_FOLDER = Path(__file__).parent / "peers"
START_SECONDS = 900.0
JOB_SECONDS = 600.0
WARM_UP_TOKENS = 4


LOGS = OUT / "logs"


class PeerError(Exception):
    """A peer ended, hung, or said something else than it should; the run goes on without it."""


@dataclass(frozen=True)
class Timing:
    """One job, once."""

    seconds: float
    prefill_seconds: float
    """Until the last request had its first token."""
    decode_tokens: int
    """What came out after that."""
    tokens: list[int] = field(default_factory=list)
    """Of the first request; empty if the peer does not tell."""
    others: float = 0.0
    """Cores that foreign processes used meanwhile."""
    limits: Limits | None = None
    """What the machine did right before and right after, the better of both: on shared machines the rate of
    memory can halve for minutes."""


class Peer(Protocol):
    """Raises `PeerError` from any of its methods."""

    name: str
    versions: dict[str, str]
    how: str

    @property
    def pid(self) -> int | None: ...

    def start(self, jobs: list[Job]) -> None: ...
    def run(self, job: Job, prompts: list[list[int]]) -> Timing: ...
    def greedy_tokens(self, prompt: list[int], count: int) -> list[int]: ...
    def hold(self) -> None: ...
    def resume(self) -> None: ...
    def stop(self) -> None: ...


def python_of(peer: str) -> str:
    """The interpreter that has `peer`."""
    return sys.executable if peer in OURS else str(OUT / peer / "bin" / "python")


class ChildPeer:
    """A Python process that stays alive and is spoken to in JSON lines (`peers/conversation.py`)."""

    def __init__(self, name: str, model: Model) -> None:
        self.name = name
        self.model = model
        self.versions: dict[str, str] = {}
        self.how = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self, jobs: list[Job]) -> None:
        """Load the model and run each job's shape once, shortened."""
        if self.name in OURS:
            script, arguments = "run_holdfast.py", [str(self.model.holdfast_path), str(THREADS), OURS[self.name]]
        else:
            script, arguments = f"run_{self.name}.py", [str(self.model.folder), str(THREADS)]
        log = LOGS / f"{self.name}.{self.model.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [python_of(self.name), str(PEERS_FOLDER / script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # so that it can be held together with its own children
            )
        ready = self._read(START_SECONDS)
        self.versions, self.how = ready["versions"], ready["how"]
        for job in jobs:
            self._ask(job.prompts(self.model.vocab_size, seed=-1), min(job.output_len, WARM_UP_TOKENS))

    def run(self, job: Job, prompts: list[list[int]]) -> Timing:
        return self._ask(prompts, job.output_len)

    def greedy_tokens(self, prompt: list[int], count: int) -> list[int]:
        return self._ask([prompt], count).tokens

    def _ask(self, prompts: list[list[int]], output_len: int) -> Timing:
        assert self._process
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "output_len": output_len}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._failed("has ended") from error
        return Timing(**self._read(JOB_SECONDS))

    def _read(self, seconds: float) -> dict[str, Any]:
        """The next line, as JSON."""
        assert self._process
        assert self._process.stdout
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise self._failed(f"said nothing for {seconds:g} s")
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise self._failed("has ended")
                self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def _failed(self, what: str) -> PeerError:
        return PeerError(f"{self.name} on {self.model.name} {what}; see the log in {OUT.name}/logs")

    def hold(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._process:
            self._signal(signal.SIGKILL)
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def serving(command: list[str], port: int) -> Iterator[float]:
    """A server, from its start until it is told to end; yields the seconds until `/health` said 200."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{Path(command[0]).name}.log"
    with log.open("wb") as output:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        while not _healthy(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.perf_counter() - begin > START_SECONDS:
                raise PeerError(f"{Path(command[0]).name} did not become healthy; see {os.path.relpath(log)}")
            time.sleep(0.005)
        yield time.perf_counter() - begin
    finally:
        process.terminate()
        process.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
