"""The process of one worker: takes steps from its engine, gives results back."""

from __future__ import annotations

import logging
import sys
import traceback

import zmq

from holdfast.cluster.child import Control, run_child
from holdfast.core import wire
from holdfast.worker.runner import Runner
from holdfast.worker.start import start_runner

log = logging.getLogger(__name__)


def run(boot: wire.Boot, control: Control) -> None:
    """Load the model, report for duty, run steps until told to stop."""
    rank = sys.argv[1].removeprefix("worker ")
    replica = int(rank.split(".")[0])

    def progress(text: str, fraction: float | None) -> None:
        control.send(wire.encode(wire.Progress(text, fraction)))

    steps = control.context.socket(zmq.PULL)
    steps.bind(boot.endpoints.worker(rank))
    results = control.context.socket(zmq.PUSH)
    results.connect(boot.endpoints.results(replica))
    runner = start_runner(boot.config, boot.model, progress)
    results.send(wire.encode(wire.WorkerReady(rank, runner.pages.num_blocks)))
    control.send(wire.encode(wire.Ready()))

    decode = wire.decoder(wire.ToWorker).decode
    poller = zmq.Poller()
    poller.register(steps, zmq.POLLIN)
    poller.register(control, zmq.POLLIN)
    while True:
        readable = dict(poller.poll())
        if control in readable:
            return  # the only word a worker is sent is Stop
        results.send(wire.encode(_run_step(runner, decode(steps.recv()), rank)))


def _run_step(runner: Runner, step: wire.Step, rank: str) -> wire.StepResult | wire.StepError:
    try:
        return runner.run(step)
    except Exception as error:  # noqa: BLE001 - whatever a device raises becomes a definite error of these requests
        log.error("step %d failed\n%s", step.step_id, traceback.format_exc())  # noqa: TRY400
        runner.forget(step)
        return wire.StepError(step.step_id, rank, f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    run_child(run)
