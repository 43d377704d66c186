"""Second copies of blocks: every other machine's checkpoint store has the first machine's keep what it has, and asks
it for what it lacks.

    node ──Offer──▶ first ──Want──▶ node ──Copy …──▶ first        one offer at a time: what is under way is bounded
    node ──Seek──▶ first ──Copy …, Sought──▶ node

Nobody waits for it: who does not answer is done without for a while. Blocks that are not to be trusted any more end a
*generation*: the first machine takes nothing of an earlier one, and a node that hears of another forgets all it has.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import zmq

from holdfast.cluster import curve
from holdfast.core import lifecycle, wire
from holdfast.core.checkpoints import Copy, Offer, Seek, Sought, ToFirstStore, ToNodeStore, Want
from holdfast.core.errors import ConfigError
from holdfast.core.machines import Network

log = logging.getLogger(__name__)

PART_BYTES = 4_000_000
"""About what is sent in one go."""
WRITTEN_SECONDS = 10.0
"""By which a worker has written a block, or has died."""
RETRY_SECONDS = 5.0
"""After which one that did not answer is asked again."""
_ANSWER_SECONDS = 1.0
_ABSENT_SECONDS = 1.0
"""That a block which was not there is not asked for again."""
_MOST_NAMES = 256
"""In one message."""
_AT_ONCE = 64
"""Blocks looked at in one go."""


class Blocks(Protocol):
    """The store of this machine."""

    def has(self, block: bytes) -> bool:
        """Complete."""

    def is_here(self, block: bytes) -> bool:
        """Begun at least."""

    def get(self, block: bytes) -> tuple[bytes, np.ndarray, bytes] | None:
        """The block before it, the checksums of its cells, and these; None: it is not what was sealed."""

    def put(self, block: bytes, before: bytes, checksums: np.ndarray, cells: bytes) -> bool | None:
        """Keep it. False: the cells are not those of the checksums; None: there is no room, or no need."""

    def forget_all(self) -> None: ...


class Partner:
    """A node's side. `slot_bytes`: of a block."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], network: Network, slot_bytes: int) -> None:
        self.socket = context.socket(zmq.DEALER)
        curve.reach(self.socket, network.key)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for one that is not there
        self.socket.connect(network.store)
        self._at_once = max(PART_BYTES // slot_bytes, 1)
        self._unsent: dict[bytes, float] = {}
        """Blocks that it may not have, the oldest first: since when."""
        self._offer: tuple[int, float] | None = None
        """The one that is not answered yet: its number, since when."""
        self._num_offers = 0
        self._generation: str | None = None
        self._sought: dict[bytes, float] = {}
        """First blocks of what was asked for, since when."""
        self._awaited: dict[bytes, bytes] = {}
        """Blocks that were asked for, by the first of what they were asked for with."""
        self._absent: dict[bytes, float] = {}
        """Blocks that were not there: until when that is believed."""
        self._not_before = 0.0
        self._decode = wire.decoder(ToNodeStore).decode

    def note(self, block: bytes) -> None:
        """It will be written, and is to be copied then."""
        self._unsent[block] = time.monotonic()

    @property
    def is_busy(self) -> bool:
        """Whether `look` is to be called soon."""
        return bool(self._unsent) and self._offer is None and time.monotonic() >= self._not_before

    def seek(self, blocks: Sequence[bytes]) -> bool:
        """Ask for what comes next of them, unless that is done; whether it is worth waiting for."""
        first, now = blocks[0], time.monotonic()
        if first in self._awaited:
            return True
        if self._generation is None or now < self._not_before or self._absent.get(first, 0.0) > now:
            return False
        names = list(blocks[:_MOST_NAMES])
        if not self._send(Seek(names)):
            return False
        self._sought[first] = now
        self._awaited |= dict.fromkeys(names, first)
        return True

    def hear(self, blocks: Blocks) -> None:
        """What it has said."""
        with contextlib.suppress(zmq.Again):
            while True:
                head, *data = self.socket.recv_multipart(zmq.NOBLOCK)
                match self._decode(head):
                    case Want(generation, number, wanted):
                        self._follow(generation, blocks)
                        if self._offer is not None and number == self._offer[0]:
                            self._offer = None
                            self._copy(wanted, blocks)
                    case Copy(generation, block, before) if generation == self._generation:
                        _put(blocks, block, before, data)
                    case Sought(generation, first, count):
                        self._sought.pop(first, None)
                        self._awaited = {name: with_ for name, with_ in self._awaited.items() if with_ != first}
                        self._follow(generation, blocks)
                        if not count:
                            self._absent[first] = time.monotonic() + _ABSENT_SECONDS

    def look(self, blocks: Blocks, all_blocks: Callable[[], Sequence[bytes]]) -> None:
        """Offer what is complete; whoever has not answered is left alone for a while, and offered all again then."""
        now = time.monotonic()
        asked = min(*self._sought.values(), now, self._offer[1] if self._offer else now)
        if now - asked > _ANSWER_SECONDS:
            if now >= self._not_before:
                log.warning("the first machine's checkpoint store does not answer: done without for now")
            self._not_before, self._offer = now + RETRY_SECONDS, None
            self._sought.clear()
            self._awaited.clear()
            self._unsent = dict.fromkeys(all_blocks(), now)
        if len(self._absent) > 10 * _MOST_NAMES:
            self._absent = {block: until for block, until in self._absent.items() if until > now}
        if self._offer is None and now >= self._not_before:
            part = self._complete(blocks, now) if self._generation is not None else []
            if part or self._generation is None:  # what is offered before that is known is not wanted
                self._make_offer(part, now)

    def _complete(self, blocks: Blocks, now: float) -> list[bytes]:
        """Some that can be sent."""
        part: list[bytes] = []
        for block, since in list(islice(self._unsent.items(), _AT_ONCE)):
            if blocks.has(block):
                part.append(block)
            elif not blocks.is_here(block) or now - since > WRITTEN_SECONDS:
                del self._unsent[block]  # it has had to make way, or its worker has died
            else:  # it is still being written: others first
                self._unsent[block] = self._unsent.pop(block)
            if len(part) == self._at_once:
                break
        return part

    def _make_offer(self, part: list[bytes], now: float) -> None:
        self._num_offers += 1
        if not self._send(Offer(self._generation, self._num_offers, part)):
            self._not_before = now + _ANSWER_SECONDS
            return
        self._offer = (self._num_offers, now)
        for block in part:
            del self._unsent[block]

    def _copy(self, wanted: Sequence[bytes], blocks: Blocks) -> None:
        assert self._generation is not None
        for block in wanted:
            if (found := blocks.get(block)) is not None:
                before, checksums, cells = found
                self._send(Copy(self._generation, block, before), checksums.tobytes(), cells)

    def _follow(self, generation: str, blocks: Blocks) -> None:
        if self._generation not in {None, generation}:
            log.warning("the first machine's checkpoint store has forgotten all it had: so does this one")
            blocks.forget_all()
            self._unsent.clear()
        self._generation = generation

    def _send(self, message: ToFirstStore, *data: bytes) -> bool:
        try:
            self.socket.send_multipart([wire.encode(message), *data], zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True


class SecondCopies:
    """The first machine's side."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], network: Network, slot_bytes: int, generation: Path
    ) -> None:
        """`generation`: a file for what the next process has to know. Raises `ConfigError` when nobody can listen
        there."""
        self._guard = curve.admit_nodes(context, network.key)
        self.socket = context.socket(zmq.ROUTER)
        curve.listen(self.socket, network.key)
        self.socket.setsockopt(zmq.LINGER, 0)
        try:
            self.socket.bind(network.store)
        except zmq.ZMQError as error:
            self.close()
            flags = f"--data-parallel-address {network.address} --data-parallel-rpc-port {network.port}"
            raise ConfigError(f"{flags}: the port after it: {error.strerror}") from error
        self._file = generation
        self.generation = generation.read_text() if generation.exists() else "first"
        self._at_once = max(PART_BYTES // slot_bytes, 1)
        self._num_kept = self._num_given = self._num_broken = 0
        self._decode = wire.decoder(ToFirstStore).decode

    def renew(self) -> None:
        """What nodes have is not to be trusted any more."""
        self.generation = uuid.uuid4().hex
        self._file.write_text(self.generation)

    @property
    def state(self) -> lifecycle.CopiesKept:
        return lifecycle.CopiesKept(self._num_kept, self._num_given, self._num_broken)

    def close(self) -> None:
        self.socket.close()
        self._guard.stop()

    def hear(self, blocks: Blocks) -> None:
        """One message of a node."""
        route, head, *data = self.socket.recv_multipart()
        match self._decode(head):
            case Offer(generation, number, names):
                is_now = generation == self.generation
                wanted = [block for block in names if is_now and not blocks.has(block)]
                self._answer(route, Want(self.generation, number, wanted))
            case Copy(generation, block, before) if generation == self.generation:
                kept = _put(blocks, block, before, data)
                self._num_kept += kept is True
                self._num_broken += kept is False
            case Seek(names):
                count = 0
                for block in names[: self._at_once]:
                    found = blocks.get(block) if blocks.has(block) else None
                    if found is None:
                        break
                    before, checksums, cells = found
                    self._answer(route, Copy(self.generation, block, before), checksums.tobytes(), cells)
                    count += 1
                self._num_given += count
                self._answer(route, Sought(self.generation, names[0] if names else b"", count))

    def _answer(self, route: bytes, message: ToNodeStore, *data: bytes) -> None:
        with contextlib.suppress(zmq.Again):  # a node that takes nothing asks again
            self.socket.send_multipart([route, wire.encode(message), *data], zmq.NOBLOCK)


def _put(blocks: Blocks, block: bytes, before: bytes, data: Sequence[bytes]) -> bool | None:
    """Whether it is kept (True), not what it should be (False), or there is no need or no room (None)."""
    if len(data) != 2 or len(data[0]) % 8:
        return False
    return blocks.put(block, before, np.frombuffer(data[0], np.uint64), data[1])
