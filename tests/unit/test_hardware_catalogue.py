"""Names of GPUs are taken as people, tools and tables write them; what is not known is refused with what is near."""

from __future__ import annotations

import csv

import pytest

from holdfast.core.errors import ConfigError
from holdfast.hardware.catalogue import catalogue, find_device, find_link, parse_catalogue
from support.data import data


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("a100 80gb", "A100-80GB-SXM"),
        ("80GB A100", "A100-80GB-SXM"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB-SXM"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB-PCIe"),
        ("A100-80GB pairwise-NVLink", "A100-80GB-PCIe-NVLink"),
        ("Tesla V100-SXM2-32GB", "V100-32GB-SXM"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB-SXM"),
        ("NVIDIA H100 PCIe", "H100-80GB-PCIe"),
        ("H200-SXM-141GB", "H200-141GB-SXM"),
        ("NVIDIA A800-SXM4-80GB", "A800-80GB-SXM"),
        ("H800", "H800-80GB-SXM"),
        ("NVIDIA B200", "B200-180GB"),
        ("B200-192GB", "B200-180GB"),
        ("178.36GiB-GPU", "B200-180GB"),
        ("RTX4090-24GB", "RTX-4090"),
        ("3090ti", "RTX-3090-Ti"),
        ("NVIDIA GeForce RTX 3090", "RTX-3090"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000-Server"),
        ("AMD Instinct MI300X OAM", "MI300X"),
    ],
)
def test_a_device_is_found_by_any_spelling(spelling: str, name: str) -> None:
    assert find_device(spelling).name == name


def test_every_device_is_found_by_its_own_names() -> None:
    """Two entries that claim the same words and size would hide one of them for good."""
    for name, device in catalogue().devices.items():
        assert find_device(name) is device
        assert device.aliases == () or all(find_device(alias).memory_bytes for alias in device.aliases)


def test_an_unknown_name_says_what_is_near() -> None:
    with pytest.raises(ConfigError, match=r"'H10O' is not known; near are H100-80GB-SXM"):
        find_device("H10O")
    with pytest.raises(ConfigError, match=r"'A100-60GB' is not known; near are A100-80GB-SXM"):
        find_device("A100-60GB")  # there is none of this size: not to be taken for the 80 GB one
    with pytest.raises(ConfigError, match=r"'24GB' is not known"):
        find_device("24GB")
    with pytest.raises(ConfigError, match=r"link 'nvlink9' is not known; known are nvlink1"):
        find_link("nvlink9")


def test_figures_are_plausible() -> None:
    """A slip of a digit in the table: each figure against another of the same entry, or the standard's."""
    for device in catalogue().devices.values():
        assert 0.9 < device.memory_bytes / device.memory_sold < 1.08, device.name
        assert device.source
        half = device.flops["fp16"]
        assert 1.5 <= half / device.flops["fp32"] <= 40, device.name
        assert device.flops.get("bf16", half) == half, device.name
        for dtype in ("fp8", "int8", "fp4"):
            if dtype in device.flops and not (device.name == "B300-270GB" and dtype == "int8"):
                assert 1.9 <= device.flops[dtype] / half <= 8.1, (device.name, dtype)
        assert 20 <= half / device.memory_bandwidth <= 420, device.name  # FLOP per byte at the ridge
        assert (device.fabric == "none") == (device.fabric_devices == 1), device.name
        assert device.fabric == "none" or device.scale_up is not None, device.name
    links = catalogue().links
    for older, newer in (("pcie3", "pcie4"), ("pcie4", "pcie5"), ("infiniband-hdr", "infiniband-ndr")):
        assert links[newer].bandwidth == pytest.approx(2 * links[older].bandwidth, rel=1e-3)
    assert links["nvlink3"].with_lanes(4).bandwidth == 100e9


def test_what_is_like_another_has_its_figures_but_not_its_short_names() -> None:
    small = find_device("A100-40GB-PCIe")
    assert small.flops == find_device("A100").flops
    assert small.aliases == ()
    assert small.scale_up is not None
    assert small.fabric == "none"  # a bridge is an option


def test_a_wrong_field_is_no_silent_default() -> None:
    with pytest.raises(TypeError):
        parse_catalogue('[[link]]\nname="x"\nkind="pcie"\nbandwith=1\nbandwidth_gb=1\nlatency_us=1\nsource="s"')


@pytest.mark.parametrize("table", ["measured_serving.csv", "measured_collectives.csv"])
def test_all_gpus_of_the_measured_tables_are_known(table: str) -> None:
    with data(table).open() as file:
        names = {row["gpu"] for row in csv.DictReader(file)}
    for name in names - {"RTX5090+RTX3090Ti", "2xRTX3090"}:  # machines, not devices
        find_device(name)
    assert len(names) >= 8
