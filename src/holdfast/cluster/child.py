"""What every child process does before and after its own work: death line, title, logs, and a last word.

    python -m MODULE NAME FOLDER LINE_FD

The child holds one end of a socket pair (`cluster.orders`) whose other end only the supervisor has. When the
supervisor is gone, however it went, the line ends and so does the child: no orphan survives. One that was stopped
(SIGSTOP) is made to go on by the system then (PR_SET_PDEATHSIG), so that it can end.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial

import setproctitle
import zmq

from holdfast.cluster.orders import Line, Order, Relieved
from holdfast.core import lifecycle, wire
from holdfast.core.boot import Boot
from holdfast.core.errors import CollectiveFailed, DeviceGone, ReplicaHangs, UserError
from holdfast.core.logs import setup_logging

Control = zmq.Socket[bytes]
"""A child's DEALER to the supervisor: sends `ToSupervisor`, receives `ToChild`."""

Body = Callable[[Boot, Control, Order, Line], None]
"""The work of one order. Ends when told to stop; raises `Relieved` for another order."""

PR_SET_PDEATHSIG = 1
"""Of prctl (linux/prctl.h): the signal that a process gets when its parent has ended."""


def run_child(body: Body) -> None:
    """The main function of a child process: follow one order after the other, then exit.

    Exit status 0: `body` returned (it was told to stop). 1: it raised; the supervisor has been told why.
    """
    folder, line = sys.argv[2], int(sys.argv[3])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)
    orders = Line(socket.socket(fileno=line), partial(_die_with_parent, folder))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # told to everybody; the supervisor decides
        signal.signal(number, signal.SIG_IGN)
    context = zmq.Context()
    context.setsockopt(zmq.LINGER, 0)  # every socket's default: what a dead peer has not taken dies with us
    gc.freeze()  # what the imports made lives for ever: keep the collector from walking it
    status = None
    while status is None:
        status = _follow(body, orders.take(), orders, context)
    context.destroy()
    sys.exit(status)


def _die_with_parent(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _follow(body: Body, order: Order, line: Line, context: zmq.Context[Control]) -> int | None:
    """What an order says; the exit status, or None when there is another."""
    boot = order.boot()
    setproctitle.setproctitle(f"holdfast {order.name}")
    setup_logging(order.name, boot.config.server.log_level)
    control = context.socket(zmq.DEALER)
    control.setsockopt(zmq.LINGER, 1000)  # in ms; but the last word gets out
    control.setsockopt(zmq.IDENTITY, f"{order.name}@{order.epoch}".encode())
    control.connect(boot.endpoints.supervisor)
    try:
        body(boot, control, order, line)
    except Relieved:
        line.when_relieved(lambda: None)
        control.close(0)  # nobody hears this name in this epoch any more
        order.close()
        return None
    except Exception as error:  # noqa: BLE001 - the process border: reported, then the process ends
        follows = isinstance(error, CollectiveFailed)
        hangs = isinstance(error, ReplicaHangs)
        user_error, gone = isinstance(error, UserError), isinstance(error, DeviceGone)
        failed = lifecycle.Failed(str(error), user_error, traceback.format_exc(), follows, hangs, gone)
        control.send(wire.encode(failed))
        return 1
    return 0
