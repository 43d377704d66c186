"""What this machine gives the process: cores and memory, with container limits counted in."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores this process may use: by affinity, and by the container's quota of processor time."""
    cores = len(os.sched_getaffinity(0))
    quota, period = (_read("cpu.max") or "max 1").split()
    return cores if quota == "max" else max(min(cores, -(-int(quota) // int(period))), 1)


def available_memory() -> int:
    """Bytes that can be allocated without swapping: the machine's, or the container's if that is less."""
    available = int(psutil.virtual_memory().available)
    limit = _read("memory.max") or "max"
    if limit == "max":
        return available
    pages = dict(line.split() for line in (_read("memory.stat") or "").splitlines())
    cached = int(pages.get("active_file", 0)) + int(pages.get("inactive_file", 0))  # given back when wanted
    used = int(_read("memory.current") or 0) - cached
    return max(min(available, int(limit) - used), 0)


def _read(name: str) -> str | None:
    """A file of this process's cgroup (v2); None outside a container that limits us."""
    try:
        return (_CGROUP / name).read_text().strip()
    except OSError:
        return None
