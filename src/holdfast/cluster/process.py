"""One child process as its parent sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}
"""Unless the user's own environment says otherwise. OpenMP threads that wait for each other must soon sleep: they
share the cores with the gateway and the engine. With one of two cores busy, libgomp's default spinning makes a decode
step of the demo model 13 times slower (this: twice); where nothing else runs this costs 18 %, never spinning 70 %."""


@dataclass(slots=True)
class Child:
    """A running child. `pidfd` becomes readable when it ends; it is never a guess about a reused pid."""

    name: str
    epoch: int
    process: subprocess.Popen[bytes]
    pidfd: int
    death_pipe: int
    """Write end; the child ends when this closes."""
    ready: bool = False

    @property
    def identity(self) -> str:
        """Under which it speaks to its parent: the name alone may be another's, later."""
        return f"{self.name}@{self.epoch}"

    @classmethod
    def start(cls, module: str, name: str, boot_file: str, memory: Mapping[str, int], epoch: int = 0) -> Child:
        """`python -m module name boot_file fd epoch=…`, in a process group of its own. `memory`: descriptors of what
        it shares with others, by the names of `child.inherited`. `epoch`: how many had its name before."""
        read_end, write_end = os.pipe()
        more = [f"{what}={number}" for what, number in {"epoch": epoch, **memory}.items()]
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", module, name, boot_file, str(read_end), *more],
                pass_fds=[read_end, *memory.values()],
                env={**ENVIRONMENT, **os.environ},
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
            pidfd = os.pidfd_open(process.pid)
        except BaseException:
            os.close(write_end)  # which ends the child, if there is one
            raise
        finally:
            os.close(read_end)
        return cls(name, epoch, process, pidfd, write_end)

    def wait(self, deadline: float) -> bool:
        """Whether it has ended by `deadline` (`time.monotonic()` seconds)."""
        try:
            self.process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def is_stopped(self) -> bool:
        """Whether the system holds it, as after SIGSTOP (Linux: state T)."""
        try:
            state = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return False
        return state.rpartition(")")[2].split()[0] == "T"

    def close(self) -> None:
        """Give back the descriptors of an ended child."""
        os.close(self.pidfd)
        os.close(self.death_pipe)

    def how_it_ended(self) -> str:
        """`exit status 1`, `killed by SIGKILL`."""
        code = self.process.returncode
        if code is None:
            return "still running"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
