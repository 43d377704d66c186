"""Second copies of blocks between the stores of two machines: real stores, real sockets between them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import pytest
import zmq

from holdfast.cache.store import StoreLayout, sums_of
from holdfast.cluster import copies, slots
from holdfast.cluster.copies import Partner, SecondCopies
from holdfast.cluster.slots import Store
from holdfast.core.checkpoints import Copy, Find, Found, Keep, Kept
from holdfast.core.errors import ConfigError
from holdfast.core.machines import Network
from holdfast.core.wire import encode
from support.service import free_ports

DEADLINE = 10.0
KEY = b"sixteen bytes or more"
LAYOUT = StoreLayout(num_slots=40, num_layers=2, num_kv_heads=2, cell_bytes=64)


def block(number: int) -> bytes:
    return number.to_bytes(16, "little")


def memory_of(layout: StoreLayout) -> int:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, layout.num_bytes)
    return descriptor


def cells_of(number: int) -> bytes:
    return np.random.default_rng(number).integers(0, 256, LAYOUT.slot_bytes, np.uint8).tobytes()


def write(store: Store, *numbers: int) -> None:
    """As an engine and its workers do, one after another."""
    for number in numbers:
        answer = store.answer(Keep([(block(number), block(number - 1))]))
        assert isinstance(answer, Kept)
        [(_, slot)] = answer.slots
        cells = np.frombuffer(cells_of(number), np.uint8).reshape(2, 2, 2, 64)
        assert store.memory.write(slot, block(number), cells, (0, 2), (0, 2))


class Pair:
    """The first machine's store, and a node's."""

    def __init__(self, folder: Path, first_slots: int = 40) -> None:
        self.node_context = zmq.Context()
        self.network = Network("127.0.0.1", free_ports(), KEY, True, 1.0, "service")
        self.folder = folder
        self.first = Store(memory_of(LAYOUT), LAYOUT)
        if first_slots < LAYOUT.num_slots:
            small = StoreLayout(first_slots, 2, 2, 64)
            self.first = Store(memory_of(small), small)
        self.start_first()
        self.start_node()

    def start_first(self) -> None:
        self.context = zmq.Context()
        self.copies = SecondCopies(self.context, self.network, LAYOUT.slot_bytes, self.folder / "generation")

    def end_first(self) -> None:
        self.copies.close()
        self.context.destroy(linger=0)

    def start_node(self) -> None:
        self.partner = Partner(self.node_context, self.network, LAYOUT.slot_bytes)
        self.node = Store(memory_of(LAYOUT), LAYOUT, partner=self.partner)

    def turn(self) -> list[tuple[bytes, Found]]:
        """What their processes do when something happens, once; what engines of the node are told."""
        while self.copies.socket.poll(0):
            self.copies.hear(self.first)
        self.partner.hear(self.node)
        self.first.look()
        return self.node.look()

    def until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE
        while not done():
            assert time.monotonic() < end, "it does not come"
            self.turn()

    def find(self, *numbers: int) -> int:
        """How many an engine of the node is told of, in the end."""
        end, before = time.monotonic() + DEADLINE, -1
        while time.monotonic() < end:
            found = self.node.answer(Find("key", [block(number) for number in numbers]), b"engine")
            while found is None:
                for _, told in self.turn():
                    found = told
            assert isinstance(found, Found)
            if not found.more and len(found.slots) == before:
                break
            before = len(found.slots)
            if not found.more:
                break
        return len(found.slots)

    def close(self) -> None:
        self.partner.socket.close()
        self.end_first()
        self.node_context.destroy(linger=0)


@pytest.fixture
def pair(tmp_path: Path) -> Generator[Pair, None, None]:
    found = Pair(tmp_path)
    yield found
    found.close()


def test_what_a_node_has_is_copied_to_the_first_machine(pair: Pair) -> None:
    write(pair.node, 1, 2, 3)
    pair.until(lambda: all(pair.first.has(block(number)) for number in (1, 2, 3)))
    for number in (1, 2, 3):
        found = pair.first.get(block(number))
        assert found is not None
        assert (found[0], found[2]) == (block(number - 1), cells_of(number))
    assert pair.copies.state.kept == 3


def test_what_a_node_lacks_comes_from_the_first_machine(pair: Pair) -> None:
    write(pair.first, *range(1, 31))
    pair.until(lambda: pair.partner._generation is not None)
    assert pair.find(*range(1, 36)) == 30
    got = pair.node.get(block(30))
    assert got is not None
    assert got[2] == cells_of(30)
    assert pair.copies.state.given == 30


def test_more_than_goes_at_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.partner._at_once = pair.copies._at_once = 2
    write(pair.node, *range(1, 12))
    pair.until(lambda: pair.first.has(block(11)))
    pair.partner.socket.close()
    pair.start_node()  # with nothing
    pair.until(lambda: pair.partner._generation is not None)
    assert pair.find(*range(1, 12)) == 11


def test_a_block_that_is_there_is_not_sent_again(pair: Pair) -> None:
    write(pair.first, 1)
    write(pair.node, 1, 2)
    pair.until(lambda: pair.first.has(block(2)))
    assert pair.copies.state.kept == 1


def test_a_block_that_is_being_written_is_copied_when_it_is_complete(pair: Pair) -> None:
    pair.node.answer(Keep([(block(7), block(6))]))
    write(pair.node, 1)
    pair.until(lambda: pair.first.has(block(1)))
    assert not pair.first.is_here(block(7))
    write(pair.node, 7)
    pair.until(lambda: pair.first.has(block(7)))


def test_what_is_not_what_it_should_be_is_not_kept(pair: Pair) -> None:
    write(pair.node, 1, 2)
    slot = pair.node.index.slot_of(block(1))
    assert slot is not None
    pair.node.memory.slots[slot, 1, 1, 0, 5] ^= 1  # in the sender's memory
    pair.until(lambda: pair.first.has(block(2)))
    assert not pair.first.has(block(1))
    pair.until(lambda: pair.partner._generation is not None)
    sums = sums_of(memoryview(cells_of(9)), range(0, LAYOUT.slot_bytes, 128), 128, block(9), range(4))
    good = np.array(sums, np.uint64)
    head = encode(Copy(pair.copies.generation, block(9), block(8)))
    for data in ([good.tobytes(), cells_of(8)], [good.tobytes()[:-8], cells_of(9)], [good.tobytes()], [b"x", b"y"]):
        pair.partner.socket.send_multipart([head, *data])
    pair.until(lambda: pair.copies.state.broken == 4)
    assert not pair.first.is_here(block(9))
    pair.partner.socket.send_multipart([head, good.tobytes(), cells_of(9)])
    pair.until(lambda: pair.first.has(block(9)))


def test_nobody_waits_for_a_first_machine_that_is_silent(pair: Pair) -> None:
    write(pair.first, 1)
    pair.until(lambda: pair.partner._generation is not None)
    begun = time.monotonic()
    assert pair.node.answer(Find("key", [block(1)]), b"engine") is None
    told: list[tuple[bytes, Found]] = []
    while not told:
        told = pair.node.look()  # the first machine does nothing
        assert time.monotonic() - begun < DEADLINE
    assert (told[0][1].slots, time.monotonic() - begun < slots.FETCH_SECONDS + 1.0) == ([], True)
    while time.monotonic() - begun < 1.5 * copies._ANSWER_SECONDS:
        pair.node.look()
    assert pair.node.answer(Find("key", [block(1)]), b"engine") == Found("key", [])  # at once, from now on


def test_all_is_offered_again_when_it_answers_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "RETRY_SECONDS", 0.1)
    write(pair.node, 1, 2)
    pair.until(lambda: pair.first.has(block(2)))
    pair.first.forget_all()  # as if its memory had been needed
    pair.end_first()
    write(pair.node, 3)
    begun = time.monotonic()
    while time.monotonic() - begun < 1.2 * copies._ANSWER_SECONDS:
        pair.node.look()
        pair.partner.hear(pair.node)
    pair.start_first()
    write(pair.node, 4)
    pair.until(lambda: all(pair.first.has(block(number)) for number in (3, 4)))


def test_what_is_not_trusted_any_more_does_not_come_back(pair: Pair) -> None:
    """A node that has not heard of it yet offers what it has: nothing of it is taken, and the node forgets it."""
    write(pair.node, 1, 2)
    pair.until(lambda: pair.first.has(block(2)))
    pair.first.forget_all()
    pair.copies.renew()
    write(pair.node, 3)
    pair.until(lambda: not pair.node.is_here(block(1)))
    for _ in range(50):
        pair.turn()
    assert not len(pair.first.index)
    assert not len(pair.node.index)
    write(pair.node, 4)
    pair.until(lambda: pair.first.has(block(4)))
    pair.end_first()  # the next process knows
    pair.start_first()
    assert pair.copies.generation == (pair.folder / "generation").read_text() != "first"


def test_a_first_machine_with_little_room_keeps_what_it_can(tmp_path: Path) -> None:
    pair = Pair(tmp_path, first_slots=3)
    try:
        write(pair.node, *range(1, 20))
        pair.until(lambda: not pair.partner._unsent and pair.partner._offer is None)
        for _ in range(20):
            pair.turn()
        assert len(pair.first.index) == 3
        assert pair.find(1, 2, 3) == 3  # of its own
    finally:
        pair.close()


def test_a_port_that_is_taken_is_named(pair: Pair) -> None:
    complaint = pytest.raises(ConfigError, match=f"--data-parallel-rpc-port {pair.network.port}: the port after it")
    with zmq.Context() as context, complaint:
        SecondCopies(context, pair.network, 1, pair.folder / "generation")
