"""What a machine tells of itself is turned into devices and links in the units of the catalogue."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from holdfast.core.errors import ConfigError
from holdfast.hardware import detect
from holdfast.hardware.catalogue import find_device
from holdfast.hardware.detect import cpu_device, devices_of, rdma_cards, this_machine, visible_devices
from support.topologies import printed, sockets

UUIDS = ["GPU-aa11", "GPU-aa22", "GPU-bb33"]


@pytest.mark.parametrize(
    ("visible", "shown"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        ("0, 1", [0, 1]),
        ("GPU-bb,GPU-aa11", [2, 0]),
        ("1,-1,2", [1]),  # CUDA stops at what it does not know
        ("7,0", []),
        ("GPU-aa", []),  # two begin so
    ],
)
def test_visible_devices_are_those_that_cuda_shows(visible: str | None, shown: list[int]) -> None:
    assert visible_devices(visible, UUIDS) == shown


def test_a_device_that_is_made_visible_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES=0,0: GPU 0 is named twice"):
        visible_devices("0,0", UUIDS)


class Driver:
    """What NVML says of a machine, in NVML's units: MiB are bytes, MHz, bits, milliwatts."""

    NVML_CLOCK_MEM, NVML_CLOCK_SM, nvmlMemory_v2 = 2, 1, 2

    class NVMLError(Exception):
        pass

    def __init__(self, *names: str) -> None:
        self.names = names

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:
        return f"GPU-{handle}".encode()

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.names[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int) -> Any:
        return SimpleNamespace(total=24576 * 2**20, reserved=300 * 2**20)

    def nvmlDeviceGetMaxClockInfo(self, handle: int, kind: int) -> int:
        return {self.NVML_CLOCK_MEM: 9751, self.NVML_CLOCK_SM: 1700}[kind]

    def nvmlDeviceGetMemoryBusWidth(self, handle: int) -> int:
        return 384

    def nvmlDeviceGetNumGpuCores(self, handle: int) -> int:
        return 10496

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return 8, 6

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: int) -> int:
        return 4

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return 350_000


def test_a_known_gpu_has_the_memory_that_its_driver_leaves() -> None:
    [(number, device)] = devices_of(Driver("NVIDIA L4", "NVIDIA GeForce RTX 3090"), "1")
    assert number == 1
    assert device.name == "RTX-3090"
    assert device.memory_bytes == (24576 - 300) * 2**20
    assert device.flops == find_device("RTX 3090").flops


def test_an_unknown_gpu_has_what_its_driver_tells() -> None:
    """The clocks, bus and cores of an RTX 3090 under another name give that card's own datasheet rates."""
    [(_, device)] = devices_of(Driver("NVIDIA GeForce RTX 9999"), None)
    known = find_device("RTX 3090")
    assert device.name == "NVIDIA GeForce RTX 9999"
    assert device.memory_bandwidth == pytest.approx(known.memory_bandwidth, rel=0.01)
    assert device.flops["fp32"] == pytest.approx(known.flops["fp32"], rel=0.01)
    assert (device.capability, device.multiprocessors, device.tdp) == (known.capability, known.multiprocessors, 350)
    assert (device.pcie, device.peer_to_peer) == (known.pcie, False)


def test_a_machine_with_gpus_has_their_links(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    turns = sockets((0, 2), (1, 3))
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{printed(turns)}END\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2,3")
    monkeypatch.setattr(detect.importlib, "import_module", lambda _: Driver(*["NVIDIA L4"] * 4))
    cluster = this_machine()
    [node] = cluster.nodes
    assert node.topology.devices == ("GPU1", "GPU2", "GPU3")
    assert [str(node.topology.between(0, i)) for i in (1, 2)] == ["SYS", "PHB"]
    assert cluster.assumptions == ()
    tool.write_text("#!/bin/sh\nexit 9\n")
    [said] = this_machine().assumptions
    assert "how the GPUs are joined is assumed" in said


def test_a_machine_without_gpus_is_its_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cluster = this_machine()
    [device] = cluster.devices
    assert device.name == "cpu"
    assert device.memory_bytes > 10**8
    assert "assumed" in cluster.assumptions[-1]
    wide, narrow = (cpu_device(4, 10**9, frozenset(flags)) for flags in (["avx512f", "fma"], ["fma"]))
    assert wide.flops["fp32"] == pytest.approx(2 * narrow.flops["fp32"])


def test_active_rdma_ports_are_links(tmp_path: Path) -> None:
    for card, rate, state, layer in (
        ("mlx5_0", "400 Gb/sec (4X NDR)", "4: ACTIVE", "InfiniBand"),
        ("mlx5_1", "100 Gb/sec (4X EDR)", "1: DOWN", "InfiniBand"),
        ("mlx5_2", "25 Gb/sec (1X EDR)", "4: ACTIVE", "Ethernet"),
    ):
        port = tmp_path / card / "ports" / "1"
        port.mkdir(parents=True)
        for name, text in (("rate", rate), ("state", state), ("link_layer", layer)):
            (port / name).write_text(text + "\n")
    found = [(card.name, card.kind, card.bandwidth) for card in rdma_cards(tmp_path)]
    assert found == [("mlx5_0", "infiniband", 50e9), ("mlx5_2", "roce", 3.125e9)]
    assert rdma_cards(tmp_path / "nowhere") == []
