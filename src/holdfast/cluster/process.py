"""One child process as its parent sees it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from holdfast.cluster import orders
from holdfast.cluster.orders import Order

ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}
"""Unless the user's own environment says otherwise. OpenMP threads that wait for each other must soon sleep: they
share the cores with the gateway and the engine. With one of two cores busy, libgomp's default spinning makes a decode
step of the demo model 13 times slower (this: twice); where nothing else runs this costs 18 %, never spinning 70 %."""


@dataclass(slots=True)
class Child:
    """A running child. `pidfd` becomes readable when it ends; it is never a guess about a reused pid."""

    name: str
    process: subprocess.Popen[bytes]
    pidfd: int
    line: socket.socket
    """Our end; the child ends when this closes."""
    epoch: int = -1
    ordered: float = 0.0
    """When it got its order (`time.monotonic()`)."""
    was_heard: bool = False
    """Ever."""
    answers: bool = False
    """It has said something under its present order."""
    ready: bool = False

    @property
    def identity(self) -> str:
        """Under which it speaks to its parent: the name alone may be another's, later."""
        return f"{self.name}@{self.epoch}"

    @classmethod
    def start(cls, module: str, name: str, folder: str) -> Child:
        """`python -m module name folder fd`, in a process group of its own. It waits for an order."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", module, name, folder, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**ENVIRONMENT, **os.environ},
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
            pidfd = os.pidfd_open(process.pid)
        except BaseException:
            ours.close()  # which ends the child, if there is one
            raise
        finally:
            theirs.close()
        return cls(name, process, pidfd, ours)

    def order(self, order: Order) -> None:
        """Be this from now on. Raises `OSError` when it cannot be told."""
        self.name, self.epoch = order.name, order.epoch
        self.answers = self.ready = False
        self.ordered = time.monotonic()
        orders.send(self.line, order)

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
        self.line.close()

    def how_it_ended(self) -> str:
        """`exit status 1`, `killed by SIGKILL`."""
        code = self.process.returncode
        if code is None:
            return "still running"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
