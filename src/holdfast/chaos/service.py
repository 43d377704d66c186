"""The service under test: a `holdfast serve` of our own, and its processes."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from holdfast.core.errors import StartupError

_START_SECONDS = 600.0
_STOP_SECONDS = 60.0
_SPOILT_EVERY = 100_000
"""Bytes."""
_TITLE = re.compile(r"holdfast (worker [\d.]+|engine \d+|gateway|store)")


class Service:
    """Started with `flags`, on a port of its own; what it says goes to the file `log`."""

    def __init__(self, model: str, flags: Sequence[str], log: Path) -> None:
        self._faults = log.parent / "faults"
        self._faults.mkdir()
        self._command = [sys.executable, "-m", "holdfast.cli.main", "serve", model, "--port", "0", *flags]
        self._log = log
        self._seen: dict[int, psutil.Process] = {}
        self.url = ""

    async def start(self) -> None:
        """Until it serves. Raises `StartupError` with its last words."""
        with self._log.open("wb") as sink:
            self.process = await asyncio.create_subprocess_exec(
                *self._command, stdout=sink, stderr=sink, env={**os.environ, "HOLDFAST_FAULTS": str(self._faults)}
            )
        for _ in range(int(_START_SECONDS / 0.1)):
            if self.process.returncode is not None:
                raise StartupError(f"holdfast serve ended with {self.process.returncode}:\n{self.said()[-3000:]}")
            if found := re.search(r"serving \S+ at (http://\S+);", self.said()):
                self.url = found[1]
                return
            await asyncio.sleep(0.1)
        raise StartupError(f"holdfast serve did not become ready:\n{self.said()[-3000:]}")

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def processes(self) -> dict[str, psutil.Process]:
        """Its children that live, by their names: "worker 0.0.0", "engine 0", "gateway", "store"."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            self._seen[child.pid] = child
            try:
                title = _TITLE.search(" ".join(child.cmdline()))
            except psutil.NoSuchProcess:
                continue
            if title is not None:
                found[title[1]] = child
        return found

    def afflict(self, worker: str, fault: str) -> None:
        """Let a worker have a fault with its next step."""
        (self._faults / worker.removeprefix("worker ")).write_text(fault)

    def relieve(self, worker: str) -> None:
        """End a fault that lasts."""
        (self._faults / worker.removeprefix("worker ")).unlink(missing_ok=True)

    def spoil(self, dice: random.Random) -> None:
        """Change bytes of the checkpoint store's memory, here and there where there is something."""
        store = self.processes()["store"]
        [path] = [
            file
            for file in Path(f"/proc/{store.pid}/fd").iterdir()
            if str(file.readlink()).startswith("/memfd:holdfast-store")
        ][:1]
        with path.open("r+b", buffering=0) as memory:
            for begin, end in extents(memory.fileno()):
                for at in range(begin, end, _SPOILT_EVERY):
                    place = dice.randrange(at, min(at + _SPOILT_EVERY, end))
                    [byte] = os.pread(memory.fileno(), 1, place)
                    os.pwrite(memory.fileno(), bytes([byte ^ 0xFF]), place)

    async def stop(self) -> tuple[int, list[int]]:
        """SIGTERM; its exit status, and the pids of children that outlived it (they are killed then)."""
        self.processes()
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = await asyncio.wait_for(self.process.wait(), _STOP_SECONDS)
        except TimeoutError:
            self.process.kill()
            status = await self.process.wait()
        left = [child for child in self._seen.values() if child.is_running()]  # by pid and time of birth
        left = [child for child in left if child.status() != psutil.STATUS_ZOMBIE]
        for child in left:
            child.kill()
        return status, [child.pid for child in left]


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
