"""Whether the machine was ours: two cores are few, and a busy neighbour makes any figure worthless."""

from __future__ import annotations

import contextlib
import itertools
import resource
import time

import psutil

ENOUGH = 0.1
"""Cores that others may use for a timing to count as undisturbed."""
PROBE_SECONDS = 0.2


def _busy() -> float:
    """Seconds of all cores that went into anything, or were taken away by the hypervisor."""
    times = psutil.cpu_times()
    idle: float = times.idle + getattr(times, "iowait", 0.0)
    return float(sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0))


def _own(pid: int | None) -> float:
    """Seconds used by this process, by the children it has waited for, and by process `pid` with its children."""
    waited = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() + waited.ru_utime + waited.ru_stime
    if pid is not None:
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(pid)
            for process in [root, *root.children(recursive=True)]:
                times = process.cpu_times()
                seconds += times.user + times.system
    return seconds


class Watch:
    """Between entry and exit: how many cores others used, on average."""

    def __init__(self, pid: int | None = None) -> None:
        self._pid = pid
        self.others = 0.0

    def __enter__(self) -> Watch:
        self._begin, self._foreign = time.perf_counter(), _busy() - _own(self._pid)
        return self

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self._begin
        self.others = max(0.0, (_busy() - _own(self._pid) - self._foreign) / seconds)


def wait_until_quiet(seconds: float) -> float:
    """Wait, at most about that long, until others leave the cores alone. Nothing of the benchmark may be running.

    Returns the seconds waited, 0 if the first look found quiet.
    """
    begin = time.monotonic()
    for looks in itertools.count():
        with Watch() as watch:
            time.sleep(PROBE_SECONDS)
        waited = time.monotonic() - begin
        if watch.others <= ENOUGH or waited > seconds:
            return waited if looks else 0.0
    raise AssertionError("unreachable")
