"""The service under test: a `holdfast serve` of our own, and its processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from holdfast.chaos.flags import value_of
from holdfast.chaos.machines import Node, members_of
from holdfast.core.errors import StartupError
from holdfast.core.points import VARIABLE

_START_SECONDS = 600.0
_STOP_SECONDS = 60.0
_ORPHAN_SECONDS = 60.0
"""Once the supervisor is gone, its children end at once; a loaded machine may need a while for it."""
_LOOK_SECONDS = 5.0
_SPOILT_EVERY = 100_000
"""Bytes."""
_TITLE = re.compile(r"holdfast (worker [\d.]+|engine \d+|gateway|store|hub)")
SUPERVISOR = "supervisor"


@dataclass(frozen=True, slots=True)
class Held:
    """A process that is held at a point of its code."""

    name: str
    process: psutil.Process

    @property
    def is_held(self) -> bool:
        """Whether it is, and lives."""
        try:
            return bool(self.process.status() == psutil.STATUS_STOPPED)
        except psutil.NoSuchProcess:
            return False

    def let_go(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process.send_signal(signal.SIGCONT)


class Service:
    """Started with `flags` in `folder`, which holds what it says, its faults, and the token log unless the flags have
    it elsewhere. Started again, it has the port it had."""

    def __init__(self, model: str, flags: Sequence[str], folder: Path, nodes: Sequence[Node] = ()) -> None:
        """`nodes`: other machines, not started yet."""
        self._nodes = {node.name: node for node in nodes}
        self._joined: set[str] = set()
        """Of them, when it was last looked."""
        self._faults, self._temporary = folder / "faults", folder / "tmp"
        self._faults.mkdir()
        self._temporary.mkdir()
        self._flags = flags
        self._log = folder / "log"
        self._token_log = Path(value_of("--token-log-dir", flags) or folder / "tokens")
        level = (
            "debug" if value_of("--log-level", flags) == "debug" else "info"
        )  # less would not tell what we wait for
        more = ["--token-log-dir", str(self._token_log), "--log-level", level]
        self._command = [sys.executable, "-m", "holdfast.cli.main", "serve", model, "--port", "0", *flags, *more]
        self.url = ""
        self.orphans: list[int] = []
        """Pids of children that outlived their supervisor; they were killed then."""

    async def start(self) -> None:
        """Until it serves. Raises `StartupError` with its last words."""
        port = ["--port", self.url.rpartition(":")[2]] if self.url else []
        with self._log.open("ab") as sink:
            begin = sink.tell()
            self.process = await asyncio.create_subprocess_exec(
                *self._command,
                *port,
                stdout=sink,
                stderr=sink,
                env={**os.environ, VARIABLE: str(self._faults), "TMPDIR": str(self._temporary)},
                start_new_session=True,
            )
        for node in self._nodes.values():
            await node.start()
        for _ in range(int(_START_SECONDS / 0.1)):
            if self.process.returncode is not None:
                raise StartupError(f"holdfast serve ended with {self.process.returncode}:\n{self.said()[-3000:]}")
            if found := re.search(r"serving \S+ at (http://\S+);", self.said(begin)):
                self.url = found[1]
                return
            await asyncio.sleep(0.1)
        raise StartupError(f"holdfast serve did not become ready:\n{self.said()[-3000:]}")

    def said(self, begin: int = 0) -> str:
        """From its byte `begin` on."""
        with self._log.open("rb") as log:
            log.seek(begin)
            return log.read().decode(errors="replace")

    @property
    def said_bytes(self) -> int:
        """How much it has said so far."""
        return self._log.stat().st_size

    def processes(self) -> dict[str, psutil.Process]:
        """Those that live, by their names: "supervisor", "worker 0.0.0", "engine 0", "gateway", "store", "hub"; of
        machines that have joined, too: "node 0", "outpost 0", "worker 1.0.0"."""
        supervisor = psutil.Process(self.process.pid)
        found = {SUPERVISOR: supervisor}
        for child in supervisor.children(recursive=True):
            try:
                title = _TITLE.search(" ".join(child.cmdline()))
            except psutil.NoSuchProcess:
                continue
            if title is not None:
                found[title[1]] = child
        for name in self._joined:
            found |= self._nodes[name].processes()
        if self._nodes and not self._joined:
            found.pop("hub", None)  # which nobody would miss
        return found

    async def look(self) -> None:
        """Which machines have joined."""
        if not self._nodes:
            return
        self._joined = set()
        with contextlib.suppress(httpx.HTTPError, ValueError):
            async with httpx.AsyncClient(base_url=self.url, timeout=_LOOK_SECONDS, trust_env=False) as client:
                machines = (await client.get("/cluster")).json()["machines"]
            there = {int(each["name"].rpartition(":")[2]) for each in machines if each["status"] == "ready"}
            self._joined = {name for name, node in self._nodes.items() if node.pid in there}

    def replicas_of(self, name: str) -> list[int]:
        """Numbers of those that are lost with a machine, its outpost, or the hub."""
        number = name.partition(" ")[2]
        lost = self._joined if name == "hub" else self._joined & {f"node {number}"}
        processes = [process for node in lost for process in self._nodes[node].processes()]
        return [int(process.partition(" ")[2]) for process in processes if process.startswith("engine")]

    def left(self) -> list[psutil.Process]:
        """Those that live, whoever is their parent by now: a session is theirs for life."""
        return members_of(self.process.pid)

    def afflict(self, worker: str, fault: str) -> None:
        """Let a worker have a fault with its next step, or a machine at once."""
        if worker in self._nodes:
            return self._nodes[worker].afflict(fault)
        new = self._faults / "new"
        new.write_text(fault)
        new.rename(self._faults / worker.removeprefix("worker "))  # with all that is in it

    def relieve(self, worker: str) -> None:
        """End a fault that lasts."""
        if worker in self._nodes:
            return self._nodes[worker].relieve()
        (self._faults / worker.removeprefix("worker ")).unlink(missing_ok=True)

    def hold(self, role: str, point: str) -> None:
        """Have the first process of this role that comes to a point stop there, see `core.points`."""
        (self._faults / f"{role}-at-{point}").touch()

    def held(self) -> Held | None:
        """Who is held, or just about to be. Raises `psutil.NoSuchProcess` if it has died of something else."""
        for file in self._faults.glob("held-*"):
            file.unlink()
            _, pid, name = file.name.split("-")
            return Held(name, psutil.Process(int(pid)))
        return None

    def hold_nobody(self) -> None:
        """Any more."""
        for file in self._faults.glob("*-at-*"):
            file.unlink(missing_ok=True)

    def number(self, flag: str, default: int) -> int:
        """Of one of its flags."""
        return int(value_of(flag, self._flags) or default)

    def files_left(self) -> list[str]:
        """Of its private folders, once it has ended. The memory it shares has no names: it goes with the last process
        that has it."""
        here = sorted(str(path.relative_to(self._temporary)) for path in self._temporary.rglob("*"))
        return here + [file for node in self._nodes.values() for file in node.files_left()]

    def spoil(self, dice: random.Random) -> None:
        """Change bytes of the checkpoint store's memory, here and there where there is something."""
        path = self._store_memory()
        with path.open("r+b", buffering=0) as memory:
            for begin, end in extents(memory.fileno()):
                for at in range(begin, end, _SPOILT_EVERY):
                    place = dice.randrange(at, min(at + _SPOILT_EVERY, end))
                    [byte] = os.pread(memory.fileno(), 1, place)
                    os.pwrite(memory.fileno(), bytes([byte ^ 0xFF]), place)

    def _store_memory(self) -> Path:
        """Of the supervisor's descriptors, since the store's own process may just be dead. Others come and go."""
        for file in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if str(file.readlink()).startswith("/memfd:holdfast-store"):
                    return file
        raise StartupError("the service has no checkpoint store")

    async def ended(self) -> float:
        """Its supervisor was killed: when none of its processes was left, in seconds since 1970. Those that do not
        end are killed, and are `orphans`. Raises `StartupError` when the token log is gone with them."""
        await self.process.wait()
        deadline = time.monotonic() + _ORPHAN_SECONDS
        while True:
            if not (left := self.left()) or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.005)
        ended = time.time()
        for orphan in left:
            self.orphans.append(orphan.pid)
            orphan.kill()
        file = self._token_log / "tokens.log"
        if not file.is_file() or not file.stat().st_size:
            raise StartupError(f"{file}: nothing is left of the token log")
        return ended

    async def stop(self) -> tuple[int, list[int]]:
        """SIGTERM; its exit status, and the pids of children that outlived it (they are killed then), now or when its
        supervisor was killed."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = await asyncio.wait_for(self.process.wait(), _STOP_SECONDS)
        except TimeoutError:
            self.process.kill()
            status = await self.process.wait()
        left = self.left()
        for process in left:
            process.kill()
        pids = self.orphans + [process.pid for process in left]
        for node in self._nodes.values():
            one, others = await node.stop()
            status, pids = status or one, pids + others
        return status, pids


def extents(descriptor: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file has something: first byte, and the one after the last."""
    end = 0
    while True:
        try:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        yield begin, end
