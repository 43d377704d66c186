"""The process of one worker: takes steps from its engine, gives results back."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import zmq

from holdfast.cache.store import StoreLayout, StoreMemory
from holdfast.cluster.child import Control, run_child
from holdfast.cluster.orders import Line, Order
from holdfast.core import lifecycle, wire
from holdfast.core.boot import RECONNECT_MS, Boot
from holdfast.core.errors import ModelError, RankGaveUp
from holdfast.core.plan import Place
from holdfast.core.points import Points
from holdfast.kernels.cpu.kernels import CpuKernels
from holdfast.kernels.select import import_kernels
from holdfast.models.inspect import stamp_of
from holdfast.models.load import Held
from holdfast.worker.copier import BlockCopier
from holdfast.worker.experts import ExpertMover
from holdfast.worker.faults import Faults
from holdfast.worker.runner import Launched, Runner
from holdfast.worker.start import Post, start_runner
from holdfast.worker.weights import Sums, WeightCheck

log = logging.getLogger(__name__)


class Worker:
    """A process that has one place after another, or waits for one: the weights it holds outlive them."""

    def __init__(self) -> None:
        self._cores = os.sched_getaffinity(0)
        """Ours; each place takes its share of them."""
        self._held: Held | None = None
        self._sums: Sums = {}
        """What is known of these weights to be right."""

    def follow(self, boot: Boot, control: Control, order: Order, line: Line) -> None:
        """Load what is missing, report for duty, run steps until told to stop."""
        role, _, rank = order.name.partition(" ")
        if role == "spare":
            import_kernels(boot.config.device.device)
            control.send(wire.encode(lifecycle.Ready()))
            return wait_for_order(control, line)
        gc.collect()  # what the last place needed
        os.sched_setaffinity(0, self._cores)
        replica, stage, index = (int(part) for part in rank.split("."))
        place, points = Place(boot.plan.replicas[replica], stage, index), Points(order.name)

        def progress(text: str, fraction: float | None) -> None:
            line.check()
            control.send(wire.encode(lifecycle.Progress(text, fraction)))
            points.reach("loading")

        if kept := self._keep(boot, place):
            progress(f"keeps {kept / 1e6:.1f} MB of weights", None)
        progress("loading weights", 0.0)  # an answer is waited for
        with contextlib.ExitStack() as stack:
            steps, results = control.context.socket(zmq.PULL), control.context.socket(zmq.PUSH)
            stack.callback(steps.close)
            stack.callback(results.close)
            steps.bind(boot.endpoints.worker(rank, order.epoch))
            results.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
            results.connect(boot.endpoints.results(replica, order.epoch))
            meeting, own = boot.endpoints.meeting(replica, order.epoch), order.descriptors
            memory, weights = own["replica"], own.get("weights")
            post = Post(boot.plan, replica, place, memory, weights, meeting, again=order.epoch > 0)
            runner = start_runner(boot.config, boot.model, progress, post, self._held)
            if stamp_of(boot.model) != boot.stamp:
                raise ModelError(f"{boot.model.path}: has changed since the service was started")
            loaded = Held.of(runner.decoder.weights).nbytes - kept
            line.when_relieved(runner.abort)
            may_stay = announce(boot, control, results, runner, rank, kept, loaded)
            mover, check = ExpertMover(boot.model, boot.stamp, runner, rank), WeightCheck(runner, rank, self._sums)
            stack.callback(mover.close)
            stack.callback(check.close)
            copier = None
            if (store := own.get("store")) is not None:
                blocks = StoreMemory(store, StoreLayout.of(boot.config, boot.model), points)
                copier = BlockCopier(runner.pages, blocks, place)
            self._held, self._sums = None, {}
            try:
                serve(control, line, steps, results, runner, mover, check, copier)
            except RankGaveUp:
                if not may_stay:
                    raise
                wait_for_order(control, line)
            finally:
                self._held, self._sums = Held.of(runner.decoder.weights), check.sums

    def _keep(self, boot: Boot, place: Place) -> int:
        """Bytes of what `place` needs as it is here. All else is let go, before anything is loaded."""
        if self._held is None:
            return 0
        self._held = self._held.at(boot.model.spec, place)
        here = {**self._held.packed, **self._held.norms}
        self._sums = {name: known for name, known in self._sums.items() if known[0] is here.get(name)}
        return self._held.nbytes


def wait_for_order(control: Control, line: Line) -> None:
    """Until told to stop; raises `Relieved`."""
    poller = zmq.Poller()
    poller.register(control, zmq.POLLIN)
    poller.register(line.fd, zmq.POLLIN)
    while control not in dict(poller.poll()):
        line.check()


def announce(  # noqa: PLR0917
    boot: Boot, control: Control, results: Socket, runner: Runner, rank: str, kept: int, loaded: int
) -> bool:
    """That it is ready, to its engine and to the supervisor; whether it may stay when another dies. What a GPU holds,
    and NCCL, are not taken from one place to the next yet; weights that replicas hold together stay as they are."""
    on_host, is_ours = runner.device.type == "cpu", isinstance(runner.decoder.kernels, CpuKernels)
    may_stay = is_ours and not boot.plan.shard_weights
    ahead = boot.config.scheduler.runs_ahead(runner.device.type)
    results.send(wire.encode(wire.WorkerReady(rank, runner.pages.num_blocks, ahead, is_ours, kept, loaded)))
    may_take = runner.pages.data.nbytes if on_host else 0
    control.send(wire.encode(lifecycle.Ready(may_take, gpu_of(runner.device), may_stay)))
    return may_stay


def gpu_of(device: torch.device) -> str:
    """Its UUID, as the driver names it; "" for a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else ""


def serve(  # noqa: PLR0917
    control: Control,
    line: Line,
    steps: Socket,
    results: Socket,
    runner: Runner,
    mover: ExpertMover,
    check: WeightCheck,
    copier: BlockCopier | None,
) -> None:
    """Take steps and give results until told to stop; raises `Relieved` when there is something else to do."""
    rank, speaks, faults = mover.rank, runner.decoder.place.speaks, Faults(mover.rank)
    decode = wire.decoder(wire.ToWorker).decode
    launched: deque[tuple[wire.Step, Launched | wire.StepResult | wire.StepError]] = deque()
    poller = zmq.Poller()
    poller.register(steps, zmq.POLLIN)
    poller.register(control, zmq.POLLIN)
    poller.register(mover.fd, zmq.POLLIN)
    poller.register(check.fd, zmq.POLLIN)
    poller.register(line.fd, zmq.POLLIN)
    while True:
        readable = dict(poller.poll(_patience(copier) if not launched else 0))
        line.check()
        if copier is not None:
            copier.pump()
        report(readable, results, mover, check)
        if control in readable:
            runner.abort()  # others may wait for us in a step
            return  # the only word a worker is sent is Stop
        if steps in readable and len(launched) < (2 if runner.runs_ahead else 1):
            match decode(steps.recv()):
                case wire.Step() as step:
                    launched.append((step, attempt(runner, step, rank, partial(launch, runner, step, faults))))
                case wire.ClearBlocks() | wire.SaveBlocks() | wire.LoadBlocks() as message:
                    tend_blocks(message, runner, copier, results)
                case message:
                    work_beside(message, mover, check)
            continue
        if not launched:
            continue
        step, state = launched[0]
        if runner.runs_ahead and len(launched) == 1 and isinstance(state, Launched) and not state.done:
            continue  # the next step may come before this one is done
        launched.popleft()
        if isinstance(state, Launched):
            state = attempt(runner, step, rank, partial(runner.finish, state))
        if speaks:
            faults.points.reach("sampled")
            results.send(wire.encode(state))


def launch(runner: Runner, step: wire.Step, faults: Faults) -> Launched:
    """Begin a step; raises what that raises, and what was asked for."""
    faults.before_step(runner, step)
    return runner.launch(step)


def tend_blocks(
    message: wire.ClearBlocks | wire.SaveBlocks | wire.LoadBlocks,
    runner: Runner,
    copier: BlockCopier | None,
    results: Socket,
) -> None:
    """Between two steps."""
    match message:
        case wire.ClearBlocks(blocks):
            runner.pages.clear(blocks)
        case wire.SaveBlocks(entries):
            assert copier is not None
            copier.save(entries)
        case wire.LoadBlocks(load_id, entries):
            assert copier is not None
            results.send(wire.encode(wire.BlocksLoaded(load_id, copier.load(entries))))
    runner.moved()


def report(readable: dict[Any, int], results: Socket, *beside: ExpertMover | WeightCheck) -> None:
    """What threads have done."""
    for each in beside:
        if each.fd in readable:
            results.send(wire.encode(each.report()))


def work_beside(
    message: wire.PlaceExperts | wire.UseExperts | wire.DropExperts | wire.CheckWeights,
    mover: ExpertMover,
    check: WeightCheck,
) -> None:
    """Between two steps: what threads begin, or have done."""
    match message:
        case wire.CheckWeights(key):
            check.ask(key)
        case wire.PlaceExperts():
            mover.place(message)
        case wire.UseExperts():
            mover.use()
            check.learn()
        case wire.DropExperts():
            mover.drop()


def _patience(copier: BlockCopier | None) -> int | None:
    """Milliseconds until a look at what the device is sending; None: for ever."""
    return None if copier is None or copier.is_idle else 1


Socket = zmq.Socket[bytes]
T = TypeVar("T")
_NO_MEMORY = ("OutOfMemoryError", "out of memory", "ALLOC_FAILED", "can't allocate memory")
"""How torch, cuBLAS, Triton and the system say so."""
_BROKEN = ("CUDA error", "AcceleratorError", "CUDNN_STATUS", "CUBLAS_STATUS")


def attempt(runner: Runner, step: wire.Step, rank: str, do: Callable[[], T]) -> T | wire.StepError:
    """What `do` returns; or, if it raises, why the step's requests cannot go on. Where other ranks are at the same
    step, there is no going on for this replica: it raises."""
    try:
        return do()
    except Exception as error:
        if not runner.decoder.place.is_alone:
            runner.abort()
            raise
        log.error("step %d failed\n%s", step.step_id, traceback.format_exc())  # noqa: TRY400
        runner.forget(step)
        text = f"{type(error).__name__}: {error}"
        no_memory = isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY)
        if not no_memory and any(words in text for words in _BROKEN):
            raise  # nothing on this device will work again in this process
    if no_memory and runner.device.type == "cuda":
        torch.cuda.empty_cache()
    return wire.StepError(step.step_id, rank, text, out_of_memory=no_memory)


if __name__ == "__main__":
    run_child(Worker().follow)
