"""The gateway's end of the wire: requests to the engines, tokens back, and who is still owed a reply."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from holdfast.core.boot import Endpoints
from holdfast.core.errors import QueueFull, Unavailable
from holdfast.core.lifecycle import Loss, ReplicaLost
from holdfast.core.wire import (
    Abort,
    EngineReady,
    Outputs,
    Submit,
    ToEngine,
    TokenOutput,
    WeightsChecked,
)
from holdfast.gateway.balance import Balancer
from holdfast.gateway.engines import Engines
from holdfast.gateway.incidents import Incident, Incidents, Rung
from holdfast.gateway.metrics import Metrics
from holdfast.gateway.tokenlog import Accepted, LogEntry, TokenLog

logger = logging.getLogger(__name__)

Status = Literal["starting", "ready", "recovering", "draining", "lost"]


@dataclass(slots=True)
class _Live:
    """An engine request that is owed an end."""

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
    """Sends requests to replicas and their outputs to the token log.

    `submit` opens a call in the log and makes its requests live. A request stops being live by exactly one of: an
    output with a `finish`, `abort` by a reader (who then knows the end by itself), or an error that `replica_lost` or
    `end_all` writes into the log. What an engine says about a request that is not live is dropped. The call leaves
    the log when `forget` is called.

    A gateway that was started again (`epoch` > 0) says `Hello` to the engines: they forget what an earlier one asked,
    and what they still say of it is not heard. `resume` makes live what the log holds unfinished.
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
        epoch: int = 0,
    ) -> None:
        """Binds the gateway's PULL. `max_live`: engine requests that may live at once; `per_replica` fewer without
        one of the replicas."""
        self.max_live = max_live
        self.epoch = epoch
        self._per_replica = per_replica
        self._num_replicas = num_replicas
        self._log = log
        self._metrics = metrics
        self._engines = Engines(endpoints, num_replicas, epoch)
        self.checked: asyncio.Queue[WeightsChecked] = asyncio.Queue()
        """What ranks have said of their weights."""
        self._all_ready = asyncio.Event()
        self._ready: dict[int, EngineReady] = {}
        self._promised = 0
        """Tokens a request may hold, as the door knows it."""
        self._coming: set[int] = set(range(num_replicas)) if epoch else set()
        """Replicas that are lost and will announce themselves again."""
        self._balancer = Balancer()
        self._live: dict[str, _Live] = {}
        self.incidents = Incidents()
        self._own_loss: Incident | None = None
        """Of the gateway that this one stands in for."""
        self._serves_since: float | None = None
        self._draining = False
        self._was_ready = False
        self._idle = asyncio.Event()
        if not log.calls:  # else not before `resume` has seen them all
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
                "ranks": self._ready[replica].num_ranks if replica in self._ready else None,
                "requests": loads.get(replica, 0),
            }
            for replica in range(self._num_replicas)
        ]

    async def run(self) -> None:
        """Deliver what the engines say, for ever."""
        while True:
            message = await self._engines.receive()
            if isinstance(message, WeightsChecked):
                self.checked.put_nowait(message)
            elif isinstance(message, EngineReady):
                if not self._engines.is_answer(message):
                    continue
                self._ready[message.replica] = message
                self._coming.discard(message.replica)
                self.incidents.came_back(f"replica {message.replica}", message)
                self._was_ready = True
                self._move([live for live in self._live.values() if live.replica is None])
                if self.epoch or len(self._ready) == self._num_replicas:
                    self._all_ready.set()
            else:
                self._deliver(message)

    def ask_all(self, message: ToEngine) -> dict[int, EngineReady]:
        """Send it to every replica that serves; which ones."""
        for replica in self._ready:
            self._engines.send(replica, message)
        return dict(self._ready)

    @property
    def numbers(self) -> range:
        """Of all replicas, those that are lost too."""
        return range(self._num_replicas)

    def epochs(self) -> dict[int, int]:
        """Of the engines of replicas that serve."""
        return {replica: ready.epoch for replica, ready in self._ready.items()}

    async def wait_ready(self) -> int:
        """Until every replica has announced itself, or, for a gateway that was started again, one of those that are
        left; the tokens a request may hold in each of them."""
        await self._all_ready.wait()
        self._promised = min(ready.max_model_len for ready in self._ready.values())
        return self._promised

    def submit(self, call: Accepted, arrived: float) -> list[LogEntry]:
        """Make a call's engine requests live, all or none; their entries. `arrived` is the monotonic time from which
        users wait.

        Raises `QueueFull` when too many live already, `Unavailable` when there is no replica.
        """
        if self.status != "ready":
            raise Unavailable(f"the service is {self.status}", code=self.status, retry_after=1)
        requests = call.submits
        most = self.max_live - self._per_replica * (self._num_replicas - len(self._ready))
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
        self._idle.clear()
        self._log.open(call)
        for request in requests:
            self._live[request.request_id] = _Live(request, replica, arrived)
            self._engines.send(replica, msgspec.structs.replace(request, gateway=self.epoch))
        return self._log.entries_of(call)

    def resume(self, call: Accepted) -> list[LogEntry]:
        """Make live what the log holds unfinished of a call; it waits for a replica if there is none yet."""
        entries = self._log.entries_of(call)
        for entry in entries:
            if not entry.has_ended:
                live = _Live(entry.submit, None, time.monotonic(), num_tokens=len(entry.token_ids))
                if entry.token_ids:
                    live.first_token = live.last_token = live.arrived
                self._live[entry.submit.request_id] = live
                self._idle.clear()
                self._hit_by_own_loss(live)
                if self._ready:
                    self._move([live])
        return entries

    def all_resumed(self) -> None:
        """Nothing else is left of an earlier gateway; from now on this one serves."""
        self._serves_since = time.time()
        self.incidents.came_back("gateway")
        if not self._live:
            self._idle.set()

    def abort(self, request_ids: Collection[str], reason: Literal["stop", "abort", "error"] = "abort") -> None:
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
        self._log.cut(request_ids)
        for replica, ids in of_replica.items():
            self._engines.send(replica, Abort(ids, self.epoch))

    def forget(self, call: Accepted) -> None:
        """The reply is delivered or nobody waits for it: it leaves the log, and what still lives is aborted."""
        self._log.forget(call.key)
        self.abort([submit.request_id for submit in call.submits])

    def replica_lost(self, lost: ReplicaLost) -> None:
        """The replica is gone, for good or until it announces itself again. Its requests go on in the others, from
        where the token log says they are; without another they wait for the first that comes back, or end with an
        error when none does."""
        replica, ready = lost.replica, self._ready.get(lost.replica)
        if ready is not None and 0 <= lost.epoch < ready.epoch:
            return  # an earlier one
        logger.error("replica %d is lost: %s", replica, lost.reason)
        self._ready.pop(replica, None)
        (self._coming.add if lost.comes_back else self._coming.discard)(replica)
        self._all_ready.clear()
        self._metrics.engine_lost(replica)
        self._engines.renew(replica)
        orphans = [live for live in self._live.values() if live.replica in {replica, None}]
        if lost.loss is not None:
            hit = [live for live in orphans if live.replica == replica]
            waits: Rung = "reshape" if lost.is_smaller else "restart" if self._coming else "error"
            rung = "failover" if self._ready else waits
            self._metrics.replica_lost(lost.loss.kind, rung)
            incident = self.incidents.begin(f"replica {replica}", lost.reason, lost.loss, rung, requests=len(hit))
            for live in hit:
                live.incidents.append(incident)
        if self._ready:
            self._move(orphans)
        elif self._coming:
            for live in orphans:
                live.replica = None
        else:
            self._fail([live.submit.request_id for live in orphans], lost.reason)

    def greet(self, replicas: Sequence[int]) -> None:
        """A machine is there with these: what was said to them before may be lost."""
        for replica in replicas:
            if replica not in self._ready:
                self._engines.renew(replica)

    def stands_in(self, reason: str, loss: Loss) -> None:
        """For a gateway that was lost. Its requests are ours."""
        self._metrics.replica_lost(loss.kind, "restart")
        self._own_loss = self.incidents.begin("gateway", reason, loss, "restart", back=self._serves_since)
        for live in self._live.values():
            self._hit_by_own_loss(live)

    def _hit_by_own_loss(self, live: _Live) -> None:
        if self._own_loss is not None:
            self._own_loss.requests += 1
            live.incidents.append(self._own_loss)

    def _move(self, orphans: Sequence[_Live]) -> None:
        """Have those replicas that there are go on with these requests."""
        for live in orphans:
            known = self._log[live.submit.request_id].token_ids
            loads = self._loads_for([live.submit])
            if not loads:
                self._fail([live.submit.request_id], "the replica came back with less memory than the request needs")
                continue
            live.replica = self._balancer.choose(live.submit.prompt_token_ids, loads)
            self._engines.send(
                live.replica, msgspec.structs.replace(live.submit, output_token_ids=known, gateway=self.epoch)
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
        self._engines.close()

    def _deliver(self, message: Outputs) -> None:
        ready = self._ready.get(message.replica)
        if ready is None or ready.epoch != message.epoch:
            return  # its last words, heard after it was lost
        self._metrics.engine_stats(message.replica, message.epoch, message.stats)
        now = time.monotonic()
        wanted = []
        for output in message.outputs:
            live = self._live.get(output.request_id)
            if live is not None and live.replica == message.replica:  # else it ended, or moved from a lost replica
                wanted.append(output)
        for new in self._log.append(wanted):
            self._observe(self._live[new.request_id], new, now)
            if new.finish == "error":  # which may be the log's own word
                self.abort([new.request_id], "error")
            elif new.finish is not None:
                self._end(new.request_id, new.finish)

    def _fail(self, request_ids: list[str], reason: str) -> None:
        ends = [self._log[name] for name in request_ids]
        self._log.append(
            TokenOutput(entry.submit.request_id, entry.end, [], finish="error", error=reason) for entry in ends
        )
        self.abort(request_ids, "error")

    def _observe(self, live: _Live, new: TokenOutput, now: float) -> None:
        if not (num_new := len(new.token_ids)):
            return
        if live.incidents:
            self._metrics.recovery.observe(time.time() - live.incidents[0].loss.detected)
            known = len(live.submit.prompt_token_ids) + live.num_tokens - 1 if live.num_tokens else 0
            for incident in live.incidents:
                incident.went_on(max(known - new.num_cached_tokens, 0))
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
