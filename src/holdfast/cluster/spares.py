"""Workers that have imported all they need and have no place yet: they take that of one that died."""

from __future__ import annotations

import logging
import time

from holdfast.cluster.children import Children
from holdfast.cluster.members import WORKER_MODULE
from holdfast.cluster.orders import Order, What
from holdfast.cluster.process import Child

log = logging.getLogger(__name__)

_AGAIN_SECONDS = 5.0
"""After a spare has died before one is started again."""


class Spares:
    """As many as `count`, once `fill` has been called. They belong to no member, and touch no device."""

    def __init__(self, children: Children, count: int) -> None:
        self._children = children
        self._epochs = {f"spare {number}": -1 for number in range(count)}
        """By name: how many had it before."""
        self._here: set[str] = set()
        self._not_before = 0.0

    def __contains__(self, name: str) -> bool:
        return name in self._epochs

    @property
    def num_ready(self) -> int:
        return sum(self._children.by_name[name].ready for name in self._here)

    def fill(self, descriptors: dict[What, int]) -> None:
        """Start those that are missing. Raises `OSError`."""
        for name in self._epochs.keys() - self._here if time.monotonic() >= self._not_before else ():
            self._epochs[name] += 1
            self._children.start(WORKER_MODULE, Order(name, self._epochs[name], descriptors))
            self._here.add(name)

    @property
    def is_full(self) -> bool:
        return len(self._here) == len(self._epochs)

    def take(self) -> Child | None:
        """One that is to get another order at once, ready if there is one: also one that is not is ahead of a new
        process."""
        by_name = self._children.by_name
        for name in sorted(self._here, key=lambda name: (not by_name[name].ready, name)):
            self._here.remove(name)
            if self._children.is_alive(name) and not by_name[name].is_stopped():
                return self._children.release(name)
            log.error("%s stands still (SIGSTOP): it is killed, and replaced", name)
            self._children.kill([name])
        return None

    def ended(self, name: str) -> None:
        """By itself, or somebody has killed it."""
        log.error("%s died (%s)", name, self._children.by_name[name].how_it_ended())
        self._here.discard(name)
        self._not_before = time.monotonic() + _AGAIN_SECONDS
