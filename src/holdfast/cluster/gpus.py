"""What the NVIDIA driver tells of GPUs that break: Xid and ECC events, by NVML.

Which Xids are the device's fault, and leave a process on it with nothing to go on with, is from NVIDIA's catalogue
("Xid errors", docs.nvidia.com/deploy/xid-errors). Xid 63, a row that will be remapped at the next reset, is no reason
to stop; 13, 31, 43 and 45 are an application's own faults, and the worker that made them says so itself.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

log = logging.getLogger(__name__)

BREAKS = {
    48: "double-bit ECC error",
    64: "a row could not be remapped",
    74: "NVLink error",
    79: "fallen off the bus",
    94: "contained memory error",
    95: "uncontained memory error",
    119: "the GPU's system processor does not answer",
    120: "error of the GPU's system processor",
}
"""Xids after which nothing that is on the device is of use."""
FOR_GOOD = {64, 79}
"""Of those: what no new process gets over."""
_WAIT_MS = 500


@dataclass(frozen=True, slots=True)
class GpuEvent:
    """A GPU, by UUID, is not to be used any more as it is; or, `for_good`, not at all."""

    uuid: str
    reason: str
    for_good: bool = False
    heard: float = field(default_factory=time.monotonic, compare=False)


class GpuWatch:
    """Of the GPUs that workers name. The driver is asked on a thread of its own, since one that is in trouble may not
    answer; nothing is asked before there is a GPU."""

    def __init__(self) -> None:
        self._watched: set[str] = set()
        self._new: SimpleQueue[str] = SimpleQueue()
        self._happened: deque[GpuEvent] = deque()
        self._thread: threading.Thread | None = None

    def watch(self, uuid: str) -> None:
        if uuid not in self._watched:
            self._watched.add(uuid)
            self._new.put(uuid)
        if self._thread is None:
            self._thread = threading.Thread(target=self._listen, name="nvml", daemon=True)
            self._thread.start()

    def look(self) -> list[GpuEvent]:
        """What has happened since the last look."""
        return [self._happened.popleft() for _ in range(len(self._happened))]

    def _listen(self) -> None:
        try:
            nvml: Any = importlib.import_module("pynvml")
        except ImportError:
            log.warning("events of GPUs are not heard: nvidia-ml-py is not installed (pip install 'holdfast[gpu]')")
            return
        try:
            nvml.nvmlInit()
            handles: dict[str, Any] = {}
            events = nvml.nvmlEventSetCreate()
            while True:
                self._register(nvml, events, handles)
                self._hear(nvml, events, handles)
        except nvml.NVMLError as error:
            log.warning("events of GPUs are not heard: %s", error)

    def _register(self, nvml: Any, events: Any, handles: dict[str, Any]) -> None:
        """Those that are new. One without ECC has no such events."""
        wanted = nvml.nvmlEventTypeXidCriticalError | nvml.nvmlEventTypeDoubleBitEccError
        try:
            while True:
                uuid = self._new.get_nowait()
                try:
                    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
                    supported = nvml.nvmlDeviceGetSupportedEventTypes(handle)
                    nvml.nvmlDeviceRegisterEvents(handle, wanted & supported, events)
                    handles[uuid] = handle
                except nvml.NVMLError as error:
                    log.warning("events of %s are not heard: %s", uuid, error)
        except Empty:
            return

    def _hear(self, nvml: Any, events: Any, handles: dict[str, Any]) -> None:
        """The next event, if there is one soon."""
        try:
            event = nvml.nvmlEventSetWait_v2(events, _WAIT_MS)
            uuid = nvml.nvmlDeviceGetUUID(event.device)
        except nvml.NVMLError as error:
            if error.value == nvml.NVML_ERROR_TIMEOUT:
                return
            gone = [uuid for uuid, handle in handles.items() if not _answers(nvml, handle)]
            if not gone:
                raise
            for uuid in gone:
                del handles[uuid]
                self._watched.discard(uuid)  # who names it again finds it answering
                self._happened.append(GpuEvent(uuid, f"{uuid} does not answer: {error}", for_good=True))
            return
        uuid = uuid.decode() if isinstance(uuid, bytes) else uuid  # old releases of nvidia-ml-py
        if event.eventType == nvml.nvmlEventTypeDoubleBitEccError:
            self._happened.append(GpuEvent(uuid, f"{uuid}: double-bit ECC error"))
        elif event.eventData in BREAKS:
            reason = f"{uuid}: Xid {event.eventData}, {BREAKS[event.eventData]}"
            self._happened.append(GpuEvent(uuid, reason, for_good=event.eventData in FOR_GOOD))
        else:
            log.warning("%s: Xid %d", uuid, event.eventData)


def _answers(nvml: Any, handle: Any) -> bool:
    try:
        nvml.nvmlDeviceGetUUID(handle)
    except nvml.NVMLError:
        return False
    return True
