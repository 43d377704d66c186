"""What every child process does before and after its own work: title, logs, death pipe, and a last word.

    python -m MODULE NAME BOOT_FILE DEATH_FD epoch=N [WHAT=FD …]

The child holds the read end of a pipe whose write end only the supervisor has. When the supervisor is gone,
however it went, the read ends and so does the child: no orphan survives. One that was stopped (SIGSTOP) is made to go
on by the system then (PR_SET_PDEATHSIG), so that it can end.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import setproctitle
import zmq

from holdfast.core import lifecycle, wire
from holdfast.core.boot import Boot
from holdfast.core.errors import CollectiveFailed, DeviceGone, ReplicaHangs, UserError
from holdfast.core.logs import setup_logging

Control = zmq.Socket[bytes]
"""A child's DEALER to the supervisor: sends `ToSupervisor`, receives `ToChild`."""

Body = Callable[[Boot, Control], None]


PR_SET_PDEATHSIG = 1
"""Of prctl (linux/prctl.h): the signal that a process gets when its parent has ended."""


def run_child(body: Body) -> None:
    """The main function of a child process: run `body` until it returns, then exit.

    Exit status 0: `body` returned (it was told to stop). 1: it raised; the supervisor has been told why.
    """
    name, boot_file, death_fd = sys.argv[1], sys.argv[2], int(sys.argv[3])
    boot = msgspec.json.decode(Path(boot_file).read_bytes(), type=Boot)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)
    threading.Thread(target=_die_with_parent, args=(death_fd, boot.endpoints.folder), daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # told to everybody; the supervisor decides
        signal.signal(number, signal.SIG_IGN)
    setproctitle.setproctitle(f"holdfast {name}")
    setup_logging(name, boot.config.server.log_level)
    context = zmq.Context()
    context.setsockopt(zmq.LINGER, 0)  # every socket's default: what a dead peer has not taken dies with us
    control = context.socket(zmq.DEALER)
    control.setsockopt(zmq.LINGER, 1000)  # in ms; but the last word gets out
    control.setsockopt(zmq.IDENTITY, f"{name}@{epoch()}".encode())
    control.connect(boot.endpoints.supervisor)
    gc.freeze()  # what the imports made lives for ever: keep the collector from walking it
    status = 0
    try:
        body(boot, control)
    except Exception as error:  # noqa: BLE001 - the process border: reported, then the process ends
        status = 1
        follows = isinstance(error, CollectiveFailed)
        hangs = isinstance(error, ReplicaHangs)
        user_error, gone = isinstance(error, UserError), isinstance(error, DeviceGone)
        failed = lifecycle.Failed(str(error), user_error, traceback.format_exc(), follows, hangs, gone)
        control.send(wire.encode(failed))
    context.destroy()
    sys.exit(status)


def inherited(what: Literal["replica", "weights", "store", "listener"]) -> int | None:
    """A descriptor that the supervisor gave us, if it did: of memory that this process shares with the rest of its
    replica, for the weights with the same rank of other replicas, for the store with all workers; of the socket that
    the service listens on."""
    return _numbers().get(what)


def epoch() -> int:
    """How often a process of this name was started before this one."""
    return _numbers()["epoch"]


def _numbers() -> dict[str, int]:
    return {name: int(number) for name, _, number in (argument.partition("=") for argument in sys.argv[4:])}


def _die_with_parent(death_fd: int, folder: str) -> None:
    os.read(death_fd, 1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
