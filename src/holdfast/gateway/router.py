"""The gateway's end of the wire: requests to the engines, tokens back, and who is still owed a reply."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import zmq
import zmq.asyncio

from holdfast.core.errors import QueueFull, TokenLogGap, Unavailable
from holdfast.core.wire import (
    Abort,
    Endpoints,
    EngineReady,
    Loss,
    Outputs,
    Submit,
    ToGateway,
    TokenOutput,
    decoder,
    encode,
)
from holdfast.gateway.balance import Balancer
from holdfast.gateway.incidents import Incident, Incidents, Rung
from holdfast.gateway.metrics import Metrics
from holdfast.gateway.tokenlog import TokenLog

logger = logging.getLogger(__name__)

Status = Literal["starting", "ready", "recovering", "draining", "lost"]


class Mailbox:
    """Outputs of the engine requests of one API call, in order of arrival. One reader."""

    def __init__(self) -> None:
        self._outputs: list[TokenOutput] = []
        self._arrived = asyncio.Event()

    def put(self, output: TokenOutput) -> None:
        self._outputs.append(output)
        self._arrived.set()

    async def get(self) -> list[TokenOutput]:
        """Everything that arrived since the last call; waits until there is something."""
        await self._arrived.wait()
        self._arrived.clear()
        outputs, self._outputs = self._outputs, []
        return outputs


@dataclass(slots=True)
class _Live:
    """An engine request that is owed an end."""

    mailbox: Mailbox
    submit: Submit
    replica: int | None
    """None: it waits for one."""
    arrived: float
    """When its API call came to the door, by the monotonic clock."""
    first_token: float | None = None
    last_token: float = 0.0
    num_tokens: int = 0
    incidents: list[Incident] = field(default_factory=list)
    """That hit it, until it gets its next token."""


class Router:
    """Sends requests to replicas and their outputs to mailboxes.

    `submit` makes a request live and opens its log entry. It stops being live by exactly one of: an output
    with a `finish`, `abort` by the reader (who then knows the end by itself), or an error output from
    `replica_lost` or `end_all`. What an engine says about a request that is not live is dropped. The log entry
    goes when the reader calls `forget`, after its reply was delivered or its client left.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        log: TokenLog,
        metrics: Metrics,
        *,
        max_live: int,
        num_replicas: int = 1,
        per_replica: int = 0,
    ) -> None:
        """Binds the gateway's PULL. `max_live`: engine requests that may live at once; `per_replica` fewer without
        one of the replicas."""
        self.max_live = max_live
        self._per_replica = per_replica
        self._endpoints = endpoints
        self._log = log
        self._metrics = metrics
        self._context = zmq.Context()
        self._incoming = zmq.asyncio.Socket.shadow(self._context.socket(zmq.PULL))
        self._incoming.set_hwm(0)
        self._incoming.bind(endpoints.gateway)
        self._outgoing = {replica: self._connect(replica) for replica in range(num_replicas)}
        self._ready: dict[int, EngineReady] = {}
        self._lost_epoch: dict[int, int] = {}
        """Of each replica that was lost: what this engine, or one before, still says is not heard."""
        self._promised = 0
        """Tokens a request may hold, as the door knows it."""
        self._coming: set[int] = set()
        """Replicas that are lost and will announce themselves again."""
        self._balancer = Balancer()
        self._live: dict[str, _Live] = {}
        self.incidents = Incidents()
        self._draining = False
        self._was_ready = False
        self._all_ready = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def status(self) -> Status:
        if self._draining:
            return "draining"
        if self._ready:
            return "ready"
        if self._coming:
            return "recovering"
        return "lost" if self._was_ready else "starting"

    @property
    def num_live(self) -> int:
        return len(self._live)

    def replicas(self) -> list[dict[str, object]]:
        """What is known of each, for operators."""
        loads = self._loads()
        return [
            {
                "replica": replica,
                "status": "ready" if replica in self._ready else "recovering" if replica in self._coming else "lost",
                "epoch": self._ready[replica].epoch if replica in self._ready else None,
                "requests": loads.get(replica, 0),
            }
            for replica in self._outgoing
        ]

    async def run(self) -> None:
        """Deliver what the engines say, for ever."""
        decode = decoder(ToGateway).decode
        while True:
            message = decode(await self._incoming.recv())
            if isinstance(message, EngineReady):
                if message.epoch <= self._lost_epoch.get(message.replica, -1):
                    continue
                self._ready[message.replica] = message
                self._coming.discard(message.replica)
                self.incidents.came_back(message.replica)
                self._was_ready = True
                self._move([live for live in self._live.values() if live.replica is None])
                if len(self._ready) == len(self._outgoing):
                    self._all_ready.set()
            else:
                self._deliver(message)

    async def wait_ready(self) -> int:
        """Until every replica has announced itself; the tokens a request may hold in each of them."""
        await self._all_ready.wait()
        self._promised = min(ready.max_model_len for ready in self._ready.values())
        return self._promised

    def submit(self, requests: Sequence[Submit], arrived: float) -> Mailbox:
        """Make these engine requests live, all or none. Their ids must never have been used; `arrived` is the
        monotonic time from which users wait.

        Raises `QueueFull` when too many live already, `Unavailable` when there is no replica.
        """
        if self.status != "ready":
            raise Unavailable(f"the service is {self.status}", code=self.status, retry_after=1)
        most = self.max_live - self._per_replica * (len(self._outgoing) - len(self._ready))
        if len(self._live) + len(requests) > most:
            raise QueueFull(
                f"{len(self._live)} sequences are running or waiting, at most {most} may; try again later",
                code="queue_full",
                retry_after=1,
            )
        loads = self._loads_for(requests)
        if not loads:
            raise Unavailable("no replica has room for so long a request now", retry_after=1)
        replica = self._balancer.choose(requests[0].prompt_token_ids, loads)
        mailbox = Mailbox()
        self._idle.clear()
        for request in requests:
            self._live[request.request_id] = _Live(mailbox, request, replica, arrived)
            self._log.open(request.request_id, request.prompt_token_ids, request.params)
            self._outgoing[replica].send(encode(request), zmq.NOBLOCK)
        return mailbox

    def abort(self, request_ids: Iterable[str], reason: Literal["stop", "abort", "error"] = "abort") -> None:
        """End these requests here and in the engine; those that are not live are ignored.

        `reason`: `stop` when the reader found the end in the text, `abort` when nobody reads any more, `error` when
        the reader has been told of one.
        """
        of_replica: dict[int, list[str]] = {}
        for request_id in request_ids:
            if (live := self._live.get(request_id)) is not None:
                if live.replica is not None:
                    of_replica.setdefault(live.replica, []).append(request_id)
                self._end(request_id, reason)
        for replica, ids in of_replica.items():
            self._outgoing[replica].send(encode(Abort(ids)), zmq.NOBLOCK)

    def forget(self, request_ids: Sequence[str]) -> None:
        """The reply is delivered or nobody waits for it: abort what still lives, drop the log entries."""
        self.abort(request_ids)
        for request_id in request_ids:
            self._log.close(request_id)

    def replica_lost(
        self, replica: int, reason: str, *, epoch: int = -1, comes_back: bool = False, loss: Loss | None = None
    ) -> None:
        """The replica is gone, for good or until it announces itself again. Its requests go on in the others, from
        where the token log says they are; without another they wait for the first that comes back, or end with an
        error when none does."""
        logger.error("replica %d is lost: %s", replica, reason)
        self._ready.pop(replica, None)
        self._lost_epoch[replica] = epoch
        (self._coming.add if comes_back else self._coming.discard)(replica)
        self._all_ready.clear()
        self._metrics.engine_lost(replica)
        self._outgoing[replica].close(linger=0)  # with what it had not read yet
        self._outgoing[replica] = self._connect(replica)
        orphans = [live for live in self._live.values() if live.replica in {replica, None}]
        if loss is not None:
            rung: Rung = "failover" if self._ready else "restart" if self._coming else "error"
            self._metrics.replica_lost(loss.kind, rung)
            hit = [live for live in orphans if live.replica == replica]
            incident = Incident(replica, reason, loss, rung, len(hit), time.time())
            self.incidents.add(incident)
            for live in hit:
                live.incidents.append(incident)
        if self._ready:
            self._move(orphans)
        elif self._coming:
            for live in orphans:
                live.replica = None
        else:
            self._fail([live.submit.request_id for live in orphans], reason)

    def _move(self, orphans: Sequence[_Live]) -> None:
        """Have those replicas that there are go on with these requests."""
        for live in orphans:
            known = self._log[live.submit.request_id].token_ids
            loads = self._loads_for([live.submit])
            if not loads:
                self._fail([live.submit.request_id], "the replica came back with less memory than the request needs")
                continue
            live.replica = self._balancer.choose(live.submit.prompt_token_ids, loads)
            self._outgoing[live.replica].send(
                encode(msgspec.structs.replace(live.submit, output_token_ids=known)), zmq.NOBLOCK
            )
        if orphans:
            logger.warning("%d requests go on", len(orphans))

    def _loads_for(self, requests: Sequence[Submit]) -> dict[int, int]:
        """`_loads` of the replicas that hold what these may come to: one that was started again may have less memory
        than all had when the door learned what to let in."""
        longest = max(len(request.prompt_token_ids) + request.params.max_tokens for request in requests)
        rooms = {replica: self._ready[replica].max_model_len for replica in self._ready}
        return {
            replica: load
            for replica, load in self._loads().items()
            if rooms[replica] >= self._promised or rooms[replica] >= longest
        }

    def _loads(self) -> dict[int, int]:
        """Live requests of every replica that can take one."""
        loads = dict.fromkeys(self._ready, 0)
        for live in self._live.values():
            if live.replica in loads:
                loads[live.replica] += 1
        return loads

    async def drain(self, deadline: float) -> None:
        """Take no new request and wait `deadline` seconds for the live ones, then end them with an error."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), deadline)
        if self._live:
            logger.warning("%d requests did not finish within %g s", len(self._live), deadline)
        self.end_all("the service is shutting down")

    def end_all(self, reason: str) -> None:
        """End every live request with a definite error, and take no new ones."""
        self._draining = True
        self._fail(list(self._live), reason)

    def close(self) -> None:
        self._incoming.close(linger=0)
        for socket in self._outgoing.values():
            socket.close(linger=0)
        self._context.term()

    def _connect(self, replica: int) -> zmq.Socket[bytes]:
        # a plain socket: with no limit on its queue a send never waits, so `abort` works in any `finally`
        socket = self._context.socket(zmq.PUSH)
        socket.set_hwm(0)
        socket.connect(self._endpoints.engine(replica))
        return socket

    def _deliver(self, message: Outputs) -> None:
        ready = self._ready.get(message.replica)
        if ready is None or ready.epoch != message.epoch:
            return  # its last words, heard after it was lost
        self._metrics.engine_stats(message.replica, message.stats)
        now = time.monotonic()
        for output in message.outputs:
            live = self._live.get(output.request_id)
            if live is None or live.replica != message.replica:  # ended, or moved from a replica that was lost
                continue
            try:
                new = self._log.append(output)
            except TokenLogGap as error:
                self._fail([output.request_id], str(error))
                continue
            if new is not None:
                self._observe(live, len(new.token_ids), now)
                live.mailbox.put(new)
                if new.finish is not None:
                    self._end(output.request_id, new.finish)

    def _fail(self, request_ids: list[str], reason: str) -> None:
        for request_id in request_ids:
            live = self._live[request_id]
            live.mailbox.put(TokenOutput(request_id, live.num_tokens, [], finish="error", error=reason))
        self.abort(request_ids, "error")

    def _observe(self, live: _Live, num_new: int, now: float) -> None:
        if num_new == 0:
            return
        if live.incidents:
            self._metrics.recovery.observe(time.time() - live.incidents[0].loss.detected)
            for incident in live.incidents:
                incident.went_on()
            live.incidents.clear()
        if live.first_token is None:
            live.first_token = now
            self._metrics.first_token.observe(now - live.arrived)
            self._metrics.prompt_tokens.inc(len(live.submit.prompt_token_ids))
        else:
            self._metrics.inter_token.observe(now - live.last_token)
        live.last_token = now
        live.num_tokens += num_new
        self._metrics.generation_tokens.inc(num_new)

    def _end(self, request_id: str, reason: str) -> None:
        live = self._live.pop(request_id)
        if not self._live:
            self._idle.set()
        self._metrics.request_ended(reason)
        self._metrics.latency.observe(time.monotonic() - live.arrived)
        self._metrics.request_prompt.observe(len(live.submit.prompt_token_ids))
        self._metrics.request_generation.observe(live.num_tokens)
        if live.first_token is not None and live.num_tokens > 1:
            self._metrics.per_token.observe((live.last_token - live.first_token) / (live.num_tokens - 1))
