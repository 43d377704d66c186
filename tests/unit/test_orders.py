"""What a process is told to be: the latest order counts, and nothing of the others is left open."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from holdfast.cluster.orders import Line, Order, Relieved, send
from holdfast.cluster.plans import seats
from holdfast.core.plan import Place, ReplicaPlan, places
from holdfast.core.spec import DecoderSpec
from holdfast.models.inspect import inspect_model
from holdfast.parallel.cuts import make_plan
from holdfast.planner.replan import replan
from support.checkpoints import random_model, save


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Line, threading.Event]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    gone = threading.Event()
    with ours:
        yield ours, Line(theirs, gone.set), gone
    assert gone.wait(10)
    theirs.close()


def give(line: socket.socket, name: str, epoch: int, text: bytes) -> None:
    """An order with a file that says `text`."""
    file = os.memfd_create("test")
    os.write(file, text)
    send(line, Order(name, epoch, {"boot": file}))
    os.close(file)


def readable(line: Line) -> bool:
    return bool(select.select([line.fd], [], [], 0)[0])


def test_the_latest_order_counts(ends: tuple[socket.socket, Line, threading.Event]):
    ours, line, _ = ends
    line.check()
    before = set(os.listdir("/proc/self/fd"))
    came = threading.Semaphore(0)
    line.when_relieved(came.release)
    for epoch in range(3):
        give(ours, "worker 0.0.1", epoch, b"%d" % epoch)
        assert came.acquire(timeout=10)
    assert readable(line)
    with pytest.raises(Relieved):
        line.check()
    order = line.take()
    assert (order.name, order.epoch) == ("worker 0.0.1", 2)
    assert os.pread(order.descriptors["boot"], 10, 0) == b"2"
    assert not readable(line)
    line.check()
    order.close()
    assert set(os.listdir("/proc/self/fd")) == before, "descriptors of orders that nobody took"


def test_one_who_is_busy_is_told_at_once(ends: tuple[socket.socket, Line, threading.Event]):
    """Also when the order came before it said what is to be done then."""
    ours, line, gone = ends
    give(ours, "spare 0", 0, b"")
    line.take().close()
    give(ours, "worker 0.0.0", 1, b"")
    assert select.select([line.fd], [], [], 10)[0]
    came = threading.Event()
    line.when_relieved(came.set)
    assert came.is_set()
    line.take().close()
    assert not gone.is_set()


def test_an_order_for_the_dead_is_no_error():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    with ours:
        give(ours, "worker 0.0.0", 0, b"")


# --- who sits where ---


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> DecoderSpec:
    shape = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
    path = save(random_model(model_type="llama", **shape), tmp_path_factory.mktemp("model"))
    return inspect_model(path).spec


def cut(spec: DecoderSpec, tensor: int = 1, pipeline: int = 1) -> ReplicaPlan:
    return make_plan(spec, tensor=tensor, pipeline=pipeline).replicas[0]


def without(some: list[Place], *lost: int) -> list[Place]:
    return [place for index, place in enumerate(some) if index not in lost]


def test_who_stays_keeps_its_place_where_the_plan_is_the_same(spec: DecoderSpec):
    for plan in (cut(spec, tensor=4), cut(spec, pipeline=4), cut(spec, tensor=2, pipeline=2)):
        assert seats(without(places(plan), 0, 2), places(plan)) == [1, 3]
        assert seats(without(places(plan), 3), places(plan)) == [0, 1, 2]
        assert seats([], places(plan)) == []


def test_who_stays_moves_up_where_there_are_fewer_places(spec: DecoderSpec):
    for plan in (cut(spec, tensor=4), cut(spec, pipeline=4), cut(spec, tensor=2, pipeline=2)):
        smaller = replan(spec, places(plan)[1])
        assert smaller is not None
        assert seats(without(places(plan), 1), places(smaller)) == [0, 1, 2]


def test_stages_find_their_layers_again_when_all_ranks_are_back(spec: DecoderSpec):
    """A stage of two ranks that has lost one: the new rank sits beside the other, no stage moves."""
    whole = places(cut(spec, tensor=2, pipeline=2))
    smaller = replan(spec, whole[1])
    assert smaller is not None
    assert seats(places(smaller), whole) in ([0, 2, 3], [1, 2, 3])
    whole = places(cut(spec, pipeline=4))
    smaller = replan(spec, whole[0])
    assert smaller is not None
    assert [place.layers for place in places(smaller)] == [(0, 3), (3, 6), (6, 8)]
    assert seats(places(smaller), whole) == [0, 2, 3]
