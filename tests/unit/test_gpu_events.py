"""What the NVIDIA driver says of a GPU is heard, and who serves with it is replaced. The driver is a stand-in; the
processes are real, but have no GPU."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from holdfast.cluster.children import Children, Ended, Said, TimedOut
from holdfast.cluster.gpus import GpuEvent, GpuWatch
from holdfast.cluster.members import GATEWAY, Member, members
from holdfast.cluster.recovery import Recovery
from holdfast.cluster.starter import Starter
from holdfast.core import lifecycle
from holdfast.core.boot import Boot, Endpoints
from holdfast.core.config import CacheConfig, ServeConfig
from holdfast.models.inspect import inspect_model
from holdfast.parallel.cuts import make_plan
from support.tiny import tiny_model

XID, ECC = 8, 2
TESTS = str(Path(__file__).parents[1])
"""Where processes find `support`."""


class Driver:
    """NVML, as nvidia-ml-py gives it. `happened`: events (UUID, type, number), or errors that are raised."""

    nvmlEventTypeXidCriticalError, nvmlEventTypeDoubleBitEccError, NVML_ERROR_TIMEOUT = XID, ECC, 10

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            super().__init__(f"error {value}")
            self.value = value

    def __init__(self, *uuids: str, without_ecc: str = "") -> None:
        self.uuids = list(uuids)
        self.without_ecc = without_ecc
        self.registered: dict[str, int] = {}
        self.lost: set[str] = set()
        self.happened: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def nvmlInit(self) -> None: ...

    def nvmlEventSetCreate(self) -> str:
        return "events"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return self.uuids.index(uuid)

    def nvmlDeviceGetSupportedEventTypes(self, handle: int) -> int:
        return XID | 4 if self.uuids[handle] == self.without_ecc else XID | ECC | 4

    def nvmlDeviceRegisterEvents(self, handle: int, types: int, events: str) -> None:
        self.registered[self.uuids[handle]] = types

    def nvmlEventSetWait_v2(self, events: str, milliseconds: int) -> Any:
        try:
            happened = self.happened.get(timeout=min(milliseconds, 20) / 1000)
        except queue.Empty:
            raise self.NVMLError(self.NVML_ERROR_TIMEOUT) from None
        if isinstance(happened, Exception):
            raise happened
        uuid, kind, number = happened
        return SimpleNamespace(device=self.uuids.index(uuid), eventType=kind, eventData=number)

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:
        if self.uuids[handle] in self.lost:
            raise self.NVMLError(15)
        return self.uuids[handle].encode()


def wait_for(what: str, condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
    return value


def test_events_of_the_driver_are_told_apart(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    driver = Driver("GPU-a", "GPU-b", without_ecc="GPU-b")
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    watch = GpuWatch()
    assert watch.look() == []
    watch.watch("GPU-a")
    watch.watch("GPU-b")
    watch.watch("GPU-a")
    wait_for("both are registered", lambda: driver.registered == {"GPU-a": XID | ECC, "GPU-b": XID})
    for xid in (13, 31, 43, 45, 63, 79):
        driver.happened.put(("GPU-b", XID, xid))
    [event] = wait_for("Xid 79", watch.look)
    assert event == GpuEvent("GPU-b", "GPU-b: Xid 79, fallen off the bus", for_good=True), "the others are no reason"
    for xid in (13, 31, 43, 45, 63):
        assert f"GPU-b: Xid {xid}" in caplog.messages
    driver.happened.put(("GPU-a", ECC, 0))
    [event] = wait_for("ECC", watch.look)
    assert event == GpuEvent("GPU-a", "GPU-a: double-bit ECC error")
    driver.lost.add("GPU-a")
    driver.happened.put(Driver.NVMLError(15))
    [event] = wait_for("lost", watch.look)
    assert event.uuid == "GPU-a"
    driver.happened.put(Driver.NVMLError(999))
    wait_for("it ends", lambda: not watch._thread.is_alive())
    assert "events of GPUs are not heard: error 999" in caplog.messages


def test_without_the_driver_s_library_nothing_is_heard(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    watch = GpuWatch()
    watch.watch("GPU-a")
    wait_for("it ends", lambda: not watch._thread.is_alive())
    assert watch.look() == []
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_replica_whose_gpu_breaks_is_killed_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only that one, as a loss of its own kind; what the driver said before it served again is of the past."""
    driver = Driver("GPU-a", "GPU-b")
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    gpus = {"worker 0.0.0": "GPU-a", "worker 1.0.0": "GPU-b"}
    monkeypatch.setenv("IDLER_GPUS", json.dumps(gpus))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])]))
    info = inspect_model(tiny_model(tmp_path))
    config = ServeConfig(cache=CacheConfig(checkpoint_memory_bytes=0))
    plan = make_plan(info.spec, data=2)
    (tmp_path / "run").mkdir()
    endpoints = Endpoints(str(tmp_path / "run"))
    with socket.socket() as listener, Children(endpoints) as children:
        starter = Starter(children, Boot(config, info, endpoints, plan), listener)
        all_members = members(plan, has_store=False)
        for member in all_members:
            member.processes = dict.fromkeys(member.processes, "support.idler")
            starter.start(member)
        recovery = Recovery(starter, all_members)
        told: list[lifecycle.ToChild] = []
        send = children.send
        monkeypatch.setattr(children, "send", lambda name, message: (told.append(message), send(name, message)))

        def until(condition: Callable[[], Any]) -> None:
            deadline = time.monotonic() + 60
            while not condition():
                assert time.monotonic() < deadline
                event = children.next_event(time.monotonic() + 0.05)
                if isinstance(event, Said | Ended):
                    recovery.take(event)
                else:
                    assert isinstance(event, TimedOut)
                recovery.look(time.monotonic())
                for member in all_members:
                    member.heard = time.monotonic()  # idlers do not beat

        def serve(member: Member) -> bool:
            return member.state == "serving"

        until(lambda: all(map(serve, all_members)))
        before = {name: child.process.pid for name, child in children.by_name.items()}
        wait_for("both are registered", lambda: len(driver.registered) == 2)
        driver.happened.put(("GPU-b", XID, 31))
        driver.happened.put(("GPU-b", XID, 94))
        until(lambda: not serve(all_members[1]))
        [lost] = [message for message in told if isinstance(message, lifecycle.ReplicaLost)]
        assert lost.replica == 1
        assert lost.comes_back
        assert lost.loss is not None
        assert (lost.loss.kind, lost.loss.process) == ("device", "worker 1.0.0")
        assert "GPU-b: Xid 94, contained memory error" in lost.reason
        until(lambda: serve(all_members[1]))
        after = {name: child.process.pid for name, child in children.by_name.items()}
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {"worker 1.0.0", "engine 1"}
        assert all_members[1].deaths == 1
        assert children.is_alive(GATEWAY)
        children.by_name["worker 0.0.0"].process.send_signal(signal.SIGKILL)
        until(lambda: not serve(all_members[0]))
        lost = [message for message in told if isinstance(message, lifecycle.ReplicaLost)][-1]
        assert lost.loss is not None
        assert lost.loss.kind == "death"
