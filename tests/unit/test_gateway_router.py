"""The router over real sockets: every live request ends exactly once, and the engine hears of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import zmq
import zmq.asyncio

from holdfast.core.boot import Endpoints
from holdfast.core.errors import QueueFull, Unavailable
from holdfast.core.lifecycle import Loss, ReplicaLost
from holdfast.core.request import SamplingParams
from holdfast.core.wire import (
    Abort,
    EngineReady,
    EngineStats,
    Hello,
    Outputs,
    Submit,
    ToEngine,
    TokenOutput,
    decoder,
    encode,
)
from holdfast.gateway.metrics import Metrics
from holdfast.gateway.router import Router
from holdfast.gateway.tokenlog import Accepted, Reader, TokenLog

STATS = EngineStats(0, 0, 10, 0, 0, 0, 0)
LOSS = Loss("worker 0.0.0", "death", 0, ["worker 0.0.0"], [], 0.0)
DEADLINE = 10


def call(*names: str, max_tokens: int = 8) -> Accepted:
    params = SamplingParams(seed=0, max_tokens=max_tokens)
    return Accepted("cmpl-x", "completions", b"{}", 0, [Submit(name, [1, 2], params) for name in names])


class Wire:
    """The engine's end of the sockets: what the router sends is read here, what it shall get is written here."""

    def __init__(self, router: Router, log: TokenLog, metrics: Metrics, endpoints: Endpoints) -> None:
        self.router, self.log, self.metrics = router, log, metrics
        self.context = zmq.asyncio.Context()
        self.pull = self.context.socket(zmq.PULL)
        self.pull.bind(endpoints.engine(0))
        self.push = self.context.socket(zmq.PUSH)
        self.push.connect(endpoints.gateway)

    async def say(self, *outputs: TokenOutput, stats: EngineStats = STATS) -> None:
        await self.push.send(encode(Outputs(0, 0, list(outputs), stats)))

    async def hear(self) -> Submit | Abort:
        """What the router has sent; but for its greetings."""
        while True:
            message = decoder(ToEngine).decode(await asyncio.wait_for(self.pull.recv(), DEADLINE))
            if not isinstance(message, Hello):
                assert isinstance(message, Submit | Abort)
                return message

    def submit(self, *names: str, waited: float = 0.0, max_tokens: int = 8) -> Reader:
        return Reader(self.router.submit(call(*names, max_tokens=max_tokens), time.monotonic() - waited))

    def sample(self, name: str) -> float | None:
        """A metric's value."""
        found = [line for line in self.metrics.exposition().decode().splitlines() if line.startswith(name + "{")]
        return float(found[0].rsplit(" ", 1)[1]) if found else None


@pytest_asyncio.fixture
async def wire(tmp_path: Path) -> AsyncIterator[Wire]:
    endpoints, log, metrics = Endpoints(str(tmp_path)), TokenLog(), Metrics("m")
    router = Router(endpoints, log, metrics, max_live=3)
    wire = Wire(router, log, metrics, endpoints)
    running = asyncio.create_task(router.run())
    assert router.status == "starting"
    await wire.push.send(encode(EngineReady(0, 0, 64)))
    await asyncio.wait_for(router.wait_ready(), DEADLINE)
    yield wire
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    router.close()
    wire.context.destroy(linger=0)


async def read(mailbox: Reader) -> list[TokenOutput]:
    return await asyncio.wait_for(mailbox.get(), DEADLINE)


async def test_outputs_reach_their_mailbox_through_the_log(wire: Wire) -> None:
    mailbox = wire.submit("a", "b")
    assert [await wire.hear(), await wire.hear()] == [
        Submit(name, [1, 2], SamplingParams(seed=0, max_tokens=8)) for name in "ab"
    ]
    await wire.say(TokenOutput("a", 0, [5]), TokenOutput("b", 0, [6], finish="stop"), TokenOutput("x", 0, [7]))
    assert [(output.request_id, output.token_ids) for output in await read(mailbox)] == [("a", [5]), ("b", [6])]
    assert wire.log["a"].token_ids == [5]
    assert wire.router.num_live == 1
    assert len(wire.log) == 2, "b's reply is not delivered yet"
    wire.router.forget(call("a", "b"))
    assert await wire.hear() == Abort(["a"])
    assert len(wire.log) == wire.router.num_live == 0


async def test_limits(wire: Wire) -> None:
    wire.submit("a", "b")
    with pytest.raises(QueueFull) as full:
        wire.submit("c", "d")
    assert full.value.retry_after is not None
    assert wire.router.num_live == 2, "all or none"


async def test_a_lost_replica_ends_its_requests_once(wire: Wire) -> None:
    mailbox = wire.submit("a")
    wire.router.replica_lost(ReplicaLost(0, "killed by SIGKILL"))
    await wire.say(TokenOutput("a", 0, [5], finish="stop"))  # a last gasp
    [end] = await read(mailbox)
    assert (end.finish, end.error) == ("error", "killed by SIGKILL")
    assert wire.router.status == "lost"
    with pytest.raises(Unavailable):
        wire.submit("b")
    await wire.push.send(encode(EngineReady(0, 0, 64, serial=1)))
    await asyncio.wait_for(wire.router.wait_ready(), DEADLINE)
    assert wire.router.status == "ready"


async def test_gauges_of_a_lost_replica_do_not_stay(wire: Wire) -> None:
    mailbox = wire.submit("a")
    await wire.say(TokenOutput("a", 0, [5]), stats=EngineStats(3, 2, 10, 5, 0, 0, 0))
    await read(mailbox)
    gauges = ("holdfast:num_requests_running", "holdfast:num_requests_waiting", "holdfast:kv_cache_usage_perc")
    assert [wire.sample(name) for name in gauges] == [3, 2, 0.5]
    wire.router.replica_lost(ReplicaLost(0, "killed"))
    assert [wire.sample(name) for name in gauges] == [0, 0, 0]


async def test_waiting_is_measured_from_the_arrival_at_the_door(wire: Wire) -> None:
    mailbox = wire.submit("a", waited=100.0)
    await wire.say(TokenOutput("a", 0, [5], finish="length"))
    await read(mailbox)
    for name in ("holdfast:time_to_first_token_seconds_sum", "holdfast:e2e_request_latency_seconds_sum"):
        assert wire.sample(name) == pytest.approx(100.0, abs=DEADLINE)


async def test_a_gap_ends_the_request_with_an_error(wire: Wire) -> None:
    mailbox = wire.submit("a")
    await wire.say(TokenOutput("a", 3, [5]))
    [end] = await read(mailbox)
    assert end.finish == "error"
    assert "starts at token 3" in str(end.error)
    assert isinstance(await wire.hear(), Submit)
    assert await wire.hear() == Abort(["a"])


async def test_drain_waits_for_the_live_then_cuts(wire: Wire) -> None:
    mailbox = wire.submit("a", "b")
    draining = asyncio.create_task(wire.router.drain(0.3))
    await wire.say(TokenOutput("a", 0, [5], finish="length"))
    [first] = await read(mailbox)
    assert first.finish == "length"
    with pytest.raises(Unavailable, match="draining"):
        wire.submit("c")
    await asyncio.wait_for(draining, DEADLINE)
    [second] = await read(mailbox)
    assert (second.request_id, second.finish) == ("b", "error")


async def test_what_is_left_when_a_replica_is_lost(tmp_path: Path) -> None:
    """Its requests go to the other, from where the log says; the limit sinks; its late words count nothing."""
    endpoints, log, metrics = Endpoints(str(tmp_path)), TokenLog(), Metrics("m")
    router = Router(endpoints, log, metrics, max_live=4, num_replicas=2, per_replica=2)
    wire = Wire(router, log, metrics, endpoints)
    other = wire.context.socket(zmq.PULL)
    other.bind(endpoints.engine(1))
    running = asyncio.create_task(router.run())
    try:
        for replica in (0, 1):
            await wire.push.send(encode(EngineReady(replica, 0, 64)))
        assert await asyncio.wait_for(router.wait_ready(), DEADLINE) == 64
        mailboxes = {name: wire.submit(name) for name in "abc"}
        greeting, first = [decoder(ToEngine).decode(await asyncio.wait_for(other.recv(), DEADLINE)) for _ in range(2)]
        assert greeting == Hello(0)
        assert isinstance(first, Submit)
        moved = first.request_id
        busy = EngineStats(5, 3, 10, 5, 100, 10, 1)
        await wire.push.send(encode(Outputs(1, 0, [TokenOutput(moved, 0, [7, 8])], busy)))
        assert [output.token_ids for output in await read(mailboxes[moved])] == [[7, 8]]
        router.replica_lost(ReplicaLost(1, "killed by SIGKILL"))
        message = await wire.hear()
        while not (isinstance(message, Submit) and message.output_token_ids):  # first come those that were its own
            message = await wire.hear()
        assert (message.request_id, message.prompt_token_ids, message.output_token_ids) == (moved, [1, 2], [7, 8])
        await wire.push.send(encode(Outputs(1, 0, [TokenOutput(moved, 2, [9])], busy)))
        await wire.say(TokenOutput(moved, 2, [10], finish="length"))
        [output] = await read(mailboxes[moved])
        assert (output.start, output.token_ids, output.finish) == (2, [10], "length")
        assert wire.sample("holdfast:num_requests_running") == 0
        with pytest.raises(QueueFull, match="at most 2 may"):
            wire.submit("d")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        router.close()
        wire.context.destroy(linger=0)


async def test_requests_wait_for_a_replica_that_comes_back(wire: Wire) -> None:
    """They go on in the new one from where the log says; what an engine said before it died is not heard after."""
    mailbox = wire.submit("a")
    assert isinstance(await wire.hear(), Submit)
    await wire.say(TokenOutput("a", 0, [5, 6]))
    await read(mailbox)
    wire.router.replica_lost(ReplicaLost(0, "killed", epoch=0, comes_back=True, loss=LOSS))
    assert wire.router.status == "recovering"
    with pytest.raises(Unavailable, match="recovering"):
        wire.submit("b")
    await wire.push.send(encode(EngineReady(0, 0, 64)))  # its own, on the way when it died
    await wire.push.send(encode(EngineReady(0, 1, 64, serial=1)))
    again = await wire.hear()
    assert isinstance(again, Submit)
    assert again.output_token_ids == [5, 6]
    [incident] = wire.router.incidents
    assert (incident.rung, incident.requests, incident.resumed) == ("restart", 1, 0)
    assert incident.back is not None
    await wire.push.send(encode(Outputs(0, 0, [TokenOutput("a", 2, [9])], STATS)))
    await wire.push.send(encode(Outputs(0, 1, [TokenOutput("a", 2, [7], finish="length")], STATS)))
    [output] = await read(mailbox)
    assert output.token_ids == [7]
    assert incident.resumed == 1


async def test_a_replica_that_comes_back_smaller_gets_what_fits(wire: Wire) -> None:
    long, short = wire.submit("a", max_tokens=50), wire.submit("b", max_tokens=5)
    for _ in range(2):
        await wire.hear()
    wire.router.replica_lost(ReplicaLost(0, "killed", epoch=0, comes_back=True, loss=LOSS))
    await wire.push.send(encode(EngineReady(0, 1, 20, serial=1)))
    again = await wire.hear()
    assert isinstance(again, Submit)
    assert again.request_id == "b"
    [end] = await read(long)
    assert end.finish == "error"
    assert "less memory" in str(end.error)
    await wire.push.send(encode(Outputs(0, 1, [TokenOutput("b", 0, [4], finish="length")], STATS)))
    assert [output.token_ids for output in await read(short)] == [[4]]
