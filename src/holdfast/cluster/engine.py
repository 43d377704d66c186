"""The engine of one replica: the scheduler on one side, the workers on the other, and the loop between them."""

from __future__ import annotations

import contextlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple

import msgspec
import zmq

from holdfast.cache.blocks import BlockPool
from holdfast.cluster.child import Control, run_child
from holdfast.cluster.experts import ExpertBalancer
from holdfast.cluster.hang import LOOK_SECONDS, HangWatch
from holdfast.cluster.keeper import Keeper
from holdfast.cluster.orders import Line, Order
from holdfast.core import lifecycle, wire
from holdfast.core.boot import Boot
from holdfast.core.checkpoints import Find, Forget, FromStore, Keep, Kept
from holdfast.core.errors import ReplicaHangs
from holdfast.core.plan import places
from holdfast.core.points import Points
from holdfast.parallel.segment import RankTally, attach, layout_of, read_chosen, read_tally
from holdfast.schedule.batching import batching_of
from holdfast.schedule.fit import fit_model_len
from holdfast.schedule.scheduler import Scheduler

log = logging.getLogger(__name__)

MOST_UPCOMING = 8
"""Requests whose blocks are fetched before they are let in."""


class Engine:
    """Owns the sockets of a replica; what runs when is the scheduler's business."""

    def __init__(self, boot: Boot, control: Control, order: Order) -> None:
        self.boot = boot
        self.replica = replica = int(order.name.removeprefix("engine "))
        self.epoch = order.epoch
        self.points = Points(f"engine {replica}")
        self.control = control
        endpoints = boot.endpoints
        self.requests = self._socket(zmq.PULL)
        self.requests.bind(endpoints.engine(replica))
        self.results = self._socket(zmq.PULL)
        self.results.bind(endpoints.results(replica, self.epoch))
        self.plan = boot.plan.replicas[replica]
        self.places = places(self.plan)
        self.workers = []
        for place in self.places:
            worker = self._socket(zmq.PUSH)
            worker.connect(endpoints.worker(f"{replica}.{place.name}", self.epoch))
            self.workers.append(worker)
        self.keeper: Keeper | None = None
        self._open_shared_memory(order.descriptors["replica"])
        self.watch, self._looked = HangWatch(boot.config.device.collective_timeout), 0.0  # until workers are ready
        self._beat = 0.0
        self._gateway_epoch, self._greeting = -1, -1
        """Of the gateway that is served, and of its last Hello; none has said any yet."""
        self.gateway = self._socket(zmq.PUSH)
        self.gateway.connect(endpoints.gateway)
        self.store = self._socket(zmq.DEALER)
        self.store.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for one that is not there
        self.store.connect(endpoints.store)
        self._decode_request = wire.decoder(wire.ToEngine).decode
        self._decode_result = wire.decoder(wire.ToEngineFromWorker).decode
        self._decode_stored = wire.decoder(FromStore).decode

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self.control.context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, 0)  # a full queue must never block the loop
        socket.setsockopt(zmq.RCVHWM, 0)
        return socket

    def run(self) -> None:
        """Serve until told to stop."""
        self.ready: list[wire.WorkerReady] = []
        while len(self.ready) < len(self.workers):
            if self._wait_for(self.results, busy=False):
                return
            self.ready.append(self._decode_result(self.results.recv()))
        by_step = not all(each.counts_operations for each in self.ready)
        self.watch = HangWatch(self.boot.config.device.collective_timeout, by_step=by_step)
        depth = self.boot.plan.steps_in_flight(self.replica)
        if self.is_alone:
            depth = 2 if self.ready[0].runs_ahead else 1
        self.scheduler = self._make_scheduler(min(each.num_blocks for each in self.ready), depth)
        if self.boot.config.cache.checkpoint_memory_bytes:
            self.keeper = Keeper(self.scheduler.pool, len(self.workers), self._ask_store, self._tell_workers)
        while not self._wait_for(*self._awaited(depth), busy=self._is_busy):
            self._take_requests()
            outputs = self._take_result()
            self._keep_blocks()
            self._schedule(depth)
            if self.keeper is not None and self.keeper.save() and not self.scheduler.num_in_flight:
                self._schedule(depth)  # what was held until it was saved may be the room that somebody waits for
            if self.balancer is not None and (placement := self.balancer.look()) is not None:
                self._tell_workers(placement)
            waits = self.scheduler.num_in_flight or (self.keeper is not None and self.keeper.is_busy)
            assert waits or not self.scheduler.has_work, "work that is never scheduled"
            stats = self._stats()
            if stats.num_waiting and stats.num_running == self.boot.config.scheduler.max_num_seqs:
                self.points.reach("queued")
            self.gateway.send(
                wire.encode(wire.Outputs(self.replica, self.epoch, outputs, stats, self._gateway_epoch))
            )
            if not waits and log.isEnabledFor(logging.DEBUG):
                self.scheduler.check_integrity()  # every reference to every block, whenever we fall idle

    def _schedule(self, depth: int) -> None:
        while self.scheduler.num_in_flight < depth and (step := self.scheduler.schedule()):
            self._tell_workers(step)

    def _make_scheduler(self, num_blocks: int, depth: int) -> Scheduler:
        config, model = self.boot.config, self.boot.model
        max_model_len = fit_model_len(
            config.model.max_model_len, model.spec.max_positions, num_blocks, config.cache.block_size
        )
        if config.model.max_model_len is None and max_model_len < model.spec.max_positions:
            log.warning(
                "the KV cache holds %d tokens, so requests may have at most that many (the model knows %d); "
                "raise --kv-cache-memory-bytes for more",
                max_model_len,
                model.spec.max_positions,
            )
        scheduler = Scheduler(
            config.scheduler,
            BlockPool(num_blocks, config.cache.block_size),
            max_model_len=max_model_len,
            eos_token_ids=frozenset(model.eos_token_ids),
            prefix_caching=config.cache.enable_prefix_caching,
            batching=batching_of(
                self.boot.plan.pipeline_batching, len(self.plan.stages), depth, config.scheduler.max_num_seqs
            ),
        )
        self.control.send(wire.encode(lifecycle.Ready()))
        return scheduler

    @property
    def is_alone(self) -> bool:
        """Whether there is one worker, with nobody to exchange anything with."""
        return len(self.places) == 1

    def _open_shared_memory(self, descriptor: int) -> None:
        """`counters` reads the tallies of all ranks, in the order of `places`; `balancer` watches their experts."""
        self.balancer: ExpertBalancer | None = None
        model, config = self.boot.model, self.boot.config
        layout = layout_of(self.plan, model.spec, config.scheduler)
        memory = attach(descriptor, layout)

        def counters() -> list[RankTally]:
            return [read_tally(memory, layout, place.stage, place.index) for place in self.places]

        self.counters = counters
        if config.device.enable_eplb:
            self.balancer = ExpertBalancer(
                model.spec,
                self.plan,
                config.device.eplb_step_interval,
                config.device.num_redundant_experts,
                lambda stage: read_chosen(memory, layout, stage),
                planner=ThreadPoolExecutor(1, "experts"),
            )

    @property
    def _is_busy(self) -> bool:
        """Whether the workers have something to do."""
        return self.scheduler.num_in_flight > 0 or (self.keeper is not None and self.keeper.is_loading)

    def _ask_store(self, message: Keep | Find | Forget) -> None:
        with contextlib.suppress(zmq.Again):  # it is not there: what matters is asked again
            self.store.send(wire.encode(message), zmq.NOBLOCK)

    def _keep_blocks(self) -> None:
        """What the store has answered, what there is for it to keep, and who is to come in next."""
        published, distrusted, unclean = self.scheduler.take_news()
        if unclean:
            log.warning("logits that are not finite: %d blocks are forgotten", len(unclean))
            self._tell_workers(wire.ClearBlocks(unclean))
        if self.keeper is None:
            return
        while self.store.poll(0):
            message = self._decode_stored(self.store.recv())
            if isinstance(message, Kept):
                self.keeper.kept(message)
            else:
                self.keeper.found(message)
        if distrusted:
            self.keeper.forget(distrusted)
        self.keeper.keep(published)
        self.keeper.look()
        num_running = len(self.scheduler.running)
        if num_running < self.boot.config.scheduler.max_num_seqs:
            self.keeper.prepare(self.scheduler.upcoming(MOST_UPCOMING), num_running)

    def _tell_workers(self, message: wire.ToWorker) -> None:
        data = wire.encode(message)
        for worker in self.workers:
            worker.send(data)

    def _stats(self) -> wire.EngineStats:
        stats = self.scheduler.stats()
        if self.keeper is not None:
            stats = msgspec.structs.replace(
                stats,
                saved_blocks=self.keeper.num_saved,
                restored_blocks=self.keeper.num_restored,
                broken_blocks=self.keeper.num_broken,
            )
        if self.is_alone:
            return stats
        ranks = [
            wire.RankStats(f"{self.replica}.{place.name}", *astuple(tally))
            for place, tally in zip(self.places, self.counters(), strict=True)
        ]
        return msgspec.structs.replace(stats, ranks=ranks)

    def _awaited(self, depth: int) -> list[zmq.Socket[bytes]]:
        """Whose message lets the loop go on. A request can wait for a result when steps enough are in flight."""
        if self.scheduler.num_in_flight == depth:
            return [self.results]
        return [self.results, self.requests, self.store]

    def _take_requests(self) -> None:
        """Take in what the gateway has sent."""
        while self.requests.poll(0):
            message = self._decode_request(self.requests.recv())
            if isinstance(message, wire.Hello):
                self._greet(message)
            elif message.gateway != self._gateway_epoch:
                continue  # of a gateway that is gone
            elif isinstance(message, wire.CheckWeights):
                self._tell_workers(message)
            elif isinstance(message, wire.Submit):
                if message.output_token_ids:
                    self.points.reach("recovery")
                sequence = self.scheduler.add(message)
                if self.keeper is not None:
                    self.keeper.look_up(sequence)
            else:
                self.scheduler.abort(message.request_ids)

    def _greet(self, hello: wire.Hello) -> None:
        """A gateway is there, the first or the next, or by another way. It knows what is to be gone on with, and asks
        for it again: the blocks that are computed stay cached meanwhile."""
        if (hello.gateway, hello.serial) > (self._gateway_epoch, self._greeting):
            self.scheduler.abort_all()
            self._gateway_epoch, self._greeting = hello.gateway, hello.serial
            ready = wire.EngineReady(
                self.replica,
                self.epoch,
                self.scheduler.max_model_len,
                hello.gateway,
                len(self.places),
                weights_kept=sum(each.weights_kept for each in self.ready),
                weights_loaded=sum(each.weights_loaded for each in self.ready),
                serial=hello.serial,
            )
            self.gateway.send(wire.encode(ready))

    def _take_result(self) -> list[wire.TokenOutput]:
        """What the oldest step in flight gave each request, if it is done."""
        if not self.results.poll(0):
            return []
        result = self._decode_result(self.results.recv())
        if isinstance(result, wire.BlocksLoaded):
            assert self.keeper is not None, result
            self.keeper.loaded(result)
            return []
        if isinstance(result, wire.WeightsChecked):
            self.gateway.send(wire.encode(msgspec.structs.replace(result, gateway=self._gateway_epoch)))
            return []
        if isinstance(result, wire.ExpertsLoaded):
            assert self.balancer is not None, result
            if (message := self.balancer.loaded(result)) is not None:
                self._tell_workers(message)
            return []
        outputs = settle(self.scheduler, result)
        if outputs:
            self.points.reach("sampled")
        if self.balancer is not None:
            self.balancer.step_done()
        return outputs

    def _wait_for(self, *sockets: zmq.Socket[bytes], busy: bool) -> bool:
        """Until one of them has a message, or the store has been waited for long enough; True when told to stop
        instead. Raises `ReplicaHangs` when the ranks of a replica stand still while they are `busy` with a step."""
        poller = zmq.Poller()
        for socket in (self.control, *sockets):
            poller.register(socket, zmq.POLLIN)
        while True:
            waits = busy or (self.keeper is not None and self.keeper.is_busy)
            readable = dict(poller.poll(int(1000 * (LOOK_SECONDS if waits else lifecycle.BEAT_SECONDS))))
            now = time.monotonic()
            if now - self._beat >= lifecycle.BEAT_SECONDS:
                self._beat = now
                with contextlib.suppress(zmq.Again):  # nobody listens: no reason to stand still
                    self.control.send(wire.encode(lifecycle.Beat()), zmq.NOBLOCK)
            if now - self._looked > LOOK_SECONDS or not busy:
                self._looked = now
                if self.watch.look([tally.moves for tally in self.counters()], now, busy=busy):
                    raise ReplicaHangs(
                        f"no rank of replica {self.replica} has come further for {self.watch.deadline:.2f} s"
                    )
            if readable or (self.keeper is not None and self.keeper.is_overdue):
                return self.control in readable


def settle(scheduler: Scheduler, result: wire.StepResult | wire.StepError) -> list[wire.TokenOutput]:
    """What the oldest step in flight gave each request."""
    if isinstance(result, wire.StepResult):
        return scheduler.update(result)
    error = f"step {result.step_id} failed on rank {result.rank}: {result.error}"
    if result.out_of_memory:
        log.warning("%s; it is tried again in smaller steps", error)
        return scheduler.shrink(result.step_id, error)
    return scheduler.fail(result.step_id, error)


def run(boot: Boot, control: Control, order: Order, _: Line) -> None:
    Engine(boot, control, order).run()


if __name__ == "__main__":
    run_child(run)
