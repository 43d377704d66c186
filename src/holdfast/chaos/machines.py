"""Other machines of the service under test: `holdfast serve --headless` of our own, each with a network of our own
between it and the first machine, which can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from holdfast.chaos.flags import value_of
from holdfast.core.points import VARIABLE

_TITLE = re.compile(r"holdfast (worker [\d.]+|engine \d+|outpost)")
_CHUNK = 1 << 16
_OWN = ("--checkpoint-memory-bytes", "--kv-cache-memory-bytes", "--cpu-threads", "--spare-workers")
"""Flags of the service that every machine is told itself."""
_END_SECONDS = 30.0


class Wire:
    """Passes on what comes to a port of this machine to another one, and back, unless it is cut: then bytes wait, and
    nobody is told."""

    def __init__(self, port: int) -> None:
        """`port`: where to."""
        self._port = port
        self._is_whole = asyncio.Event()
        self._is_whole.set()
        self._pumps: set[asyncio.Task[None]] = set()

    async def listen(self, port: int) -> None:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", port)

    def cut(self) -> None:
        self._is_whole.clear()

    def drop(self) -> None:
        """End all connections that there are."""
        for pump in self._pumps:
            pump.cancel()

    def mend(self) -> None:
        self._is_whole.set()

    async def close(self) -> None:
        self._server.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._is_whole.wait()
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:  # nobody listens
            writer.close()
            return
        for source, sink in ((reader, back), (there, writer)):
            pump = asyncio.create_task(self._pump(source, sink))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.closing(sink), contextlib.suppress(OSError):
            while data := await source.read(_CHUNK):
                await self._is_whole.wait()
                sink.write(data)
                await sink.drain()


class Node:
    """One machine. It is started again whenever it has ended, until `stop`."""

    def __init__(self, number: int, command: Sequence[str], folder: Path, faults: Path, first_port: int) -> None:
        self.name = f"node {number}"
        self.process: asyncio.subprocess.Process | None = None
        self._command = [*command, "--data-parallel-rpc-port"]
        self._temporary, self._log = folder / f"tmp-{number}", folder / f"log-{number}"
        self._temporary.mkdir()
        self._faults = faults
        self._wires = [Wire(first_port), Wire(first_port + 1)]
        self._sessions: list[int] = []

    async def start(self) -> None:
        """Unless it was, and lives on."""
        if self.process is not None:
            return
        port = free_ports()
        for number, wire in enumerate(self._wires):
            await wire.listen(port + number)
        self._command.append(str(port))
        self._life = asyncio.create_task(self._live())

    async def _live(self) -> None:
        while True:
            with self._log.open("ab") as sink:
                self.process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdout=sink,
                    stderr=sink,
                    env={**os.environ, VARIABLE: str(self._faults), "TMPDIR": str(self._temporary)},
                    start_new_session=True,
                )
            self._sessions.append(self.process.pid)
            await self.process.wait()

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    def processes(self) -> dict[str, psutil.Process]:
        """Those that live, by their names: "node 0", "worker 1.0.0", "engine 1", "outpost 0"."""
        try:
            supervisor = psutil.Process(self.pid)
            children = supervisor.children(recursive=True)
        except psutil.NoSuchProcess:
            return {}
        found = {self.name: supervisor}
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                if (title := _TITLE.search(" ".join(child.cmdline()))) is not None:
                    found[title[1].replace("outpost", self.name.replace("node", "outpost"))] = child
        return found

    def afflict(self, action: str) -> None:
        """`stop`: all its processes at once, as when a machine stands still; `cut`: nobody reaches it; `drop`: its
        connections end, and it can make new ones at once; `leave`: it is to stop."""
        if action == "drop":
            for wire in self._wires:
                wire.drop()
            return
        if action == "cut":
            for wire in self._wires:
                wire.cut()
            return
        everyone = [*self._family()] if action == "stop" else [self.pid]
        for pid in everyone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP if action == "stop" else signal.SIGTERM)

    def relieve(self) -> None:
        for wire in self._wires:
            wire.mend()
        for pid in self._family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _family(self) -> Iterator[int]:
        """Its processes, the supervisor first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            supervisor = psutil.Process(self.pid)
            yield supervisor.pid
            yield from (child.pid for child in supervisor.children(recursive=True))

    async def stop(self) -> tuple[int, list[int]]:
        """Once the service has ended, or is to be left: its exit status, and the pids of processes of it, from any of
        its lives, that are left (they are killed)."""
        assert self.process is not None
        self._life.cancel()
        with contextlib.suppress(asyncio.TimeoutError):  # it ends with the service, unless it is just asking
            await asyncio.wait_for(self.process.wait(), 2.0)
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = await asyncio.wait_for(self.process.wait(), _END_SECONDS)
        except TimeoutError:
            self.process.kill()
            status = await self.process.wait()
        for wire in self._wires:
            await wire.close()
        left = [process for session in self._sessions for process in members_of(session)]
        for process in left:
            process.kill()
        return status, [process.pid for process in left]

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def files_left(self) -> list[str]:
        return sorted(str(path.relative_to(self._temporary)) for path in self._temporary.rglob("*"))


def members_of(session: int) -> list[psutil.Process]:
    """Processes of a session that live, whoever is their parent by now."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def machines_of(
    model: str, flags: Sequence[str], count: int, replicas: int, folder: Path
) -> tuple[list[str], list[Node]]:
    """The flags of the first machine, and `count` others, not started, which share `replicas` evenly with it."""
    key, port = folder / "node.key", free_ports()
    key.write_bytes(secrets.token_bytes(32))
    local = ["--data-parallel-size-local", str(replicas // (count + 1)), "--node-key-file", str(key)]
    local += ["--data-parallel-address", "127.0.0.1"]
    command = [sys.executable, "-m", "holdfast.cli.main", "serve", model, "--headless", *local]
    for flag in _OWN:
        if (value := value_of(flag, flags)) is not None:
            command += [flag, value]
    nodes = [Node(number, command, folder, folder / "faults", port) for number in range(count)]
    return [*local, "--data-parallel-rpc-port", str(port)], nodes


def free_ports() -> int:
    """The first of two that nobody has."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                other.bind(("127.0.0.1", port + 1))
                return port
