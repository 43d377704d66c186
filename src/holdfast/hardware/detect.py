"""What this machine has: GPUs by NVML, their links by `nvidia-smi topo -m`, RDMA cards and CPUs by the kernel."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

from holdfast.core.errors import ConfigError, StartupError
from holdfast.hardware.catalogue import Device, Link, find_device, find_link
from holdfast.hardware.cluster import Cluster, Node, node_of, usual_topology
from holdfast.hardware.host import available_memory, usable_cores
from holdfast.hardware.topology import Topology, parse_topology

SMI_SECONDS = 30.0
"""How long nvidia-smi may take: a driver that starts anew for it needs some seconds."""

ASSUMED_GB_PER_CORE = 10
ASSUMED_GB_OF_MACHINE = 100
ASSUMED_HERTZ = 2.5e9


def this_machine() -> Cluster:
    """This machine as a cluster of one node: the GPUs that CUDA shows, in its order, else the CPUs as one device.

    Raises ConfigError when CUDA_VISIBLE_DEVICES names a GPU twice, StartupError when the driver fails.
    """
    gpus, said = _gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not gpus:
        device = cpu_device(usable_cores(), available_memory(), cpu_flags())
        alone = replace(usual_topology((device,)), devices=("CPU",))
        return _cluster(Node("", (device,), alone), [*said, device.source])
    numbers, devices = [number for number, _ in gpus], tuple(device for _, device in gpus)
    topology, source = _topology(numbers)
    return _cluster(node_of("", devices, topology, None), [*said, *source])


def _cluster(node: Node, said: Sequence[str]) -> Cluster:
    cards = rdma_cards(Path("/sys/class/infiniband"))
    fastest = max(cards, key=lambda link: link.bandwidth, default=None)
    node = replace(
        node,
        name=platform.node() or "this machine",
        network=fastest,
        nics=max(1, sum(card.bandwidth == fastest.bandwidth for card in cards if fastest)),
        memory_bytes=available_memory(),
    )
    return Cluster((node,), find_link("wan"), tuple(said))


# ---- GPUs --------------------------------------------------------------------------------------------------------


def _gpus(visible: str | None) -> tuple[list[tuple[int, Device]], list[str]]:
    """The GPUs that CUDA would show, each with its number, and what is to be said."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return [], ["no GPU was looked for: nvidia-ml-py is not installed (pip install 'holdfast[gpu]')"]
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver, or no GPU
        return [], []
    try:
        return devices_of(nvml, visible), []
    except nvml.NVMLError as error:
        raise StartupError(f"the NVIDIA driver does not say what GPUs there are: {error}") from error
    finally:
        nvml.nvmlShutdown()


def devices_of(nvml: Any, visible: str | None) -> list[tuple[int, Device]]:
    """Number and kind of each GPU that CUDA_VISIBLE_DEVICES shows (None: all). `nvml`: the module, initialised."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    order = visible_devices(visible, [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles])
    return [(i, _device_of(nvml, handles[i])) for i in order]


def visible_devices(visible: str | None, uuids: Sequence[str]) -> list[int]:
    """The numbers in CUDA_VISIBLE_DEVICES, which names GPUs by number or by the beginning of their UUID.

    As CUDA does: nothing set shows all, and the first entry that names no GPU ends the list. Raises ConfigError for a
    GPU that is named twice.
    """
    if visible is None:
        return list(range(len(uuids)))
    shown: list[int] = []
    for entry in (entry.strip() for entry in visible.split(",")):
        if re.fullmatch(r"\d+", entry):
            named = [int(entry)] if int(entry) < len(uuids) else []
        else:
            named = [i for i, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
        if len(named) != 1:
            break
        if named[0] in shown:
            raise ConfigError(f"CUDA_VISIBLE_DEVICES={visible}: GPU {entry} is named twice")
        shown += named
    return shown


def _device_of(nvml: Any, handle: Any) -> Device:
    """The catalogue's entry with the memory that this driver leaves; for an unknown GPU what the driver tells."""
    name = _text(nvml.nvmlDeviceGetName(handle))
    memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    usable = int(memory.total - memory.reserved)
    try:
        return replace(find_device(name), memory_bytes=usable)
    except ConfigError:
        pass
    clocks = {
        kind: nvml.nvmlDeviceGetMaxClockInfo(handle, kind) * 1e6 for kind in (nvml.NVML_CLOCK_MEM, nvml.NVML_CLOCK_SM)
    }
    generation = min(max(int(nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)), 3), 6)
    cores = int(nvml.nvmlDeviceGetNumGpuCores(handle))
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Device(
        name=name,
        memory_bytes=usable,
        memory_sold=float(memory.total),
        # Two transfers per clock, as the driver counts clocks of memory.
        memory_bandwidth=2 * clocks[nvml.NVML_CLOCK_MEM] * nvml.nvmlDeviceGetMemoryBusWidth(handle) / 8,
        flops=MappingProxyType({"fp32": 2 * cores * clocks[nvml.NVML_CLOCK_SM]}),  # one fused multiply-add per core
        capability=f"{major}.{minor}",
        multiprocessors=cores // 128,
        tdp=nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
        scale_up=None,
        fabric="none",
        fabric_devices=1,
        pcie=find_link(f"pcie{generation}"),
        peer_to_peer="GeForce" not in name,
        source="not in the catalogue: clocks, cores and bus as the driver reports them, no matrix instructions",
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # old releases of nvidia-ml-py


def _topology(numbers: Sequence[int]) -> tuple[Topology | None, list[str]]:
    """The links of these GPUs, or None with the reason why the usual ones have to be assumed."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None, ["nvidia-smi is not there: how the GPUs are joined is assumed"]
    try:
        run = subprocess.run([tool, "topo", "-m"], capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
        topology = parse_topology(run.stdout, "nvidia-smi topo -m")
        places = [topology.devices.index(f"GPU{number}") for number in numbers]
    except (OSError, subprocess.SubprocessError, ConfigError, ValueError) as error:
        return None, [f"nvidia-smi topo -m failed ({error}): how the GPUs are joined is assumed"]
    return topology.only(places), []


# ---- network cards and CPUs --------------------------------------------------------------------------------------


def rdma_cards(folder: Path) -> list[Link]:
    """The RDMA network cards with an active port, as the kernel lists them in `folder`; rates per direction."""
    cards = []
    for card in sorted(folder.glob("*")):
        for port in sorted(card.glob("ports/*")):
            rate = re.match(r"([\d.]+) Gb/sec", _read(port / "rate"))
            if rate is None or "ACTIVE" not in _read(port / "state"):
                continue
            kind = "infiniband" if _read(port / "link_layer") == "InfiniBand" else "roce"
            cards.append(
                Link(
                    name=card.name,
                    kind=kind,
                    bandwidth=float(rate[1]) * 1e9 / 8,
                    latency=find_link("infiniband-ndr").latency,
                    source="rate as the port reports it; latency of the catalogue",
                )
            )
            break
    return cards


def cpu_device(cores: int, memory: int, flags: frozenset[str]) -> Device:
    """These cores as one device. What the kernel does not tell (bandwidth, and what a clock does) is assumed, and
    `source` says so. `flags`: of /proc/cpuinfo."""
    # FLOP of one core in a clock: multiply-adds in two vector units of 16 or 8 floats; without either, in one of 4.
    per_clock = 64 if "avx512f" in flags else 32 if "fma" in flags else 8
    clocks = psutil.cpu_freq()
    hertz = max(clocks.max, clocks.current) * 1e6 if clocks else 0.0
    physical = (psutil.cpu_count(logical=False) or cores) / (psutil.cpu_count() or cores)
    rate = max(cores * min(physical, 1.0), 1.0) * (hertz or ASSUMED_HERTZ) * per_clock
    bandwidth = min(cores * ASSUMED_GB_PER_CORE, ASSUMED_GB_OF_MACHINE)
    return Device(
        name="cpu",
        memory_bytes=memory,
        memory_sold=float(psutil.virtual_memory().total),
        memory_bandwidth=bandwidth * 1e9,
        flops=MappingProxyType({"fp32": rate, "bf16": 2 * rate if "avx512_bf16" in flags else rate}),
        capability=next((name for name in ("avx512_bf16", "avx512f", "avx2") if name in flags), "portable"),
        multiprocessors=cores,
        tdp=0.0,
        scale_up=None,
        fabric="none",
        fabric_devices=1,
        pcie=find_link("shared-memory"),
        peer_to_peer=True,
        source=f"CPU: {bandwidth} GB/s of memory and {per_clock} FLOP per clock and core are assumed",
    )


def cpu_flags() -> frozenset[str]:
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def _read(path: Path) -> str:
    """A file of the kernel; empty where it has none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
