"""The engine of one replica: the scheduler on one side, the workers on the other, and a loop of four lines."""

from __future__ import annotations

import logging
import sys

import zmq

from holdfast.cache.blocks import BlockPool
from holdfast.cluster.child import Control, run_child
from holdfast.core import wire
from holdfast.schedule.scheduler import Scheduler, fit_model_len

log = logging.getLogger(__name__)


class Engine:
    """Owns the sockets of a replica; what runs when is the scheduler's business."""

    def __init__(self, boot: wire.Boot, control: Control, replica: int) -> None:
        self.boot = boot
        self.replica = replica
        self.control = control
        endpoints = boot.endpoints
        self.requests = self._socket(zmq.PULL)
        self.requests.bind(endpoints.engine(replica))
        self.results = self._socket(zmq.PULL)
        self.results.bind(endpoints.results(replica))
        self.worker = self._socket(zmq.PUSH)
        self.worker.connect(endpoints.worker(f"{replica}.0.0"))
        self.gateway = self._socket(zmq.PUSH)
        self.gateway.connect(endpoints.gateway)
        self._decode_request = wire.decoder(wire.ToEngine).decode
        self._decode_result = wire.decoder(wire.ToEngineFromWorker).decode

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self.control.context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, 0)  # a full queue must never block the loop
        socket.setsockopt(zmq.RCVHWM, 0)
        return socket

    def run(self) -> None:
        """Serve until told to stop."""
        ready = self._from_worker()
        if ready is None:
            return
        assert isinstance(ready, wire.WorkerReady)
        self.scheduler = self._make_scheduler(ready.num_blocks)
        while self._take_requests():
            step = self.scheduler.schedule()
            assert step or not self.scheduler.has_work, "work that is never scheduled"
            outputs = self._execute(step) if step else []
            self.gateway.send(wire.encode(wire.Outputs(self.replica, outputs, self.scheduler.stats())))
            if not self.scheduler.has_work and log.isEnabledFor(logging.DEBUG):
                self.scheduler.check_integrity()  # every reference to every block, whenever we fall idle

    def _make_scheduler(self, num_blocks: int) -> Scheduler:
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
        )
        self.gateway.send(wire.encode(wire.EngineReady(self.replica, max_model_len)))
        self.control.send(wire.encode(wire.Ready()))
        return scheduler

    def _take_requests(self) -> bool:
        """Take in what the gateway has sent, waiting for something if there is no work. False: stop."""
        if self.control in self._poll(self.requests, block=not self.scheduler.has_work):
            return False
        while True:
            try:
                message = self._decode_request(self.requests.recv(zmq.NOBLOCK))
            except zmq.Again:
                return True
            if isinstance(message, wire.Submit):
                self.scheduler.add(message)
            else:
                self.scheduler.abort(message.request_ids)

    def _execute(self, step: wire.Step) -> list[wire.TokenOutput]:
        """Run a step on the worker; what it gave each request."""
        self.worker.send(wire.encode(step))
        result = self._from_worker()
        if isinstance(result, wire.StepResult):
            return self.scheduler.update(result)
        if isinstance(result, wire.StepError):
            return self.scheduler.fail(f"step {result.step_id} failed on rank {result.rank}: {result.error}")
        return []  # told to stop: the control line is still readable, the loop ends next

    def _from_worker(self) -> wire.ToEngineFromWorker | None:
        """The worker's next message; None when told to stop instead."""
        if self.control in self._poll(self.results, block=True):
            return None
        message: wire.ToEngineFromWorker = self._decode_result(self.results.recv())
        return message

    def _poll(self, socket: zmq.Socket[bytes], block: bool) -> set[zmq.Socket[bytes]]:
        """Which of `socket` and the supervisor's line has a message."""
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self.control, zmq.POLLIN)
        return {which for which, _ in poller.poll(None if block else 0)}


def run(boot: wire.Boot, control: Control) -> None:
    Engine(boot, control, replica=int(sys.argv[1].removeprefix("engine "))).run()


if __name__ == "__main__":
    run_child(run)
