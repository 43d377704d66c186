"""The GPUs and links that Holdfast knows, from `catalogue.toml`, each with the document its numbers are from.

A user's spelling of a GPU ("a100 80gb", "NVIDIA H100 80GB HBM3", "RTX4090-24GB") is taken apart into words and a
size of memory; a device is meant when it has just these words and about this memory.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from holdfast.core.errors import ConfigError

GIB = 2**30
MEMORY_TOLERANCE = 0.08
"""How far a size in a name may be from the size as sold: B200 goes by 180 and by 192 GB."""

_NOISE = re.compile(
    r"\b(nvidia|geforce|tesla|quadro|amd|instinct|rtx|gpu|tensor|core|graphics|blackwell|generation|edition"
    r"|pairwise|bridged?|hbm\d?e?|oam)\b"
)
_MEMORY = re.compile(r"\b(\d+(?:\.\d+)?)\s?(gib|gb|g)\b")


@dataclass(frozen=True)
class Link:
    """What carries bytes between two devices or nodes.

    `bandwidth`: bytes/s per direction; of a device's NVLinks all together, of one network card or one slot otherwise.
    `latency`: seconds for one hop of a small message. `lanes`: how many links the bandwidth is the sum of.
    `kind`: nvlink (whatever the maker calls its own), pcie, socket, shared-memory, infiniband, roce, ethernet or wan.
    """

    name: str
    kind: str
    bandwidth: float
    latency: float
    source: str
    lanes: int = 1

    def with_lanes(self, lanes: int) -> Link:
        """The same kind of link with so many lanes, as a pair of devices may have: NV2 of six NVLinks."""
        return replace(self, lanes=lanes, bandwidth=self.bandwidth / self.lanes * lanes)


@dataclass(frozen=True)
class Device:
    """A GPU (or, found by detection, the CPUs of a machine).

    `memory_bytes`: what the driver lets a process see, below the size as sold (`memory_sold`). `memory_bandwidth`:
    bytes/s. `flops`: dense rate by dtype in FLOP/s; a dtype the device has no instructions for is absent. `scale_up`:
    its own links to other devices, all together; None if it has none. `fabric`: how these join the devices of a usual
    machine: "switch" (all links to any peer), "mesh" (a link has one peer), "bridge" (small groups), or "none": there
    are none, or bridges are an option that is not assumed. `fabric_devices`: how many devices are joined.
    `peer_to_peer`: whether the driver lets it read another device over PCIe. `tdp`: watts.
    """

    name: str
    memory_bytes: int
    memory_sold: float
    memory_bandwidth: float
    flops: Mapping[str, float] = field(hash=False)
    capability: str
    multiprocessors: int
    tdp: float
    scale_up: Link | None
    fabric: str
    fabric_devices: int
    pcie: Link
    peer_to_peer: bool
    source: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Catalogue:
    """All of `catalogue.toml`, in its order, by name."""

    links: Mapping[str, Link]
    devices: Mapping[str, Device]


@cache
def catalogue() -> Catalogue:
    """The catalogue, read once."""
    text = resources.files(__package__).joinpath("catalogue.toml").read_text(encoding="utf-8")
    return parse_catalogue(text)


def parse_catalogue(text: str) -> Catalogue:
    """Links and devices of a catalogue file. Raises KeyError or TypeError where a field is missing or unknown."""
    tables = tomllib.loads(text)
    links = {entry["name"]: _link(entry) for entry in tables["link"]}
    entries: dict[str, dict[str, Any]] = {}
    for entry in tables["device"]:
        base = entries[entry["like"]] if "like" in entry else {}
        # A short name is one entry's own: what is like another is called otherwise.
        entries[entry["name"]] = {**base, "aliases": [], **{k: v for k, v in entry.items() if k != "like"}}
    devices = {name: _device(entry, links) for name, entry in entries.items()}
    return Catalogue(MappingProxyType(links), MappingProxyType(devices))


def _link(entry: dict[str, Any]) -> Link:
    rest = {key: value for key, value in entry.items() if key not in ("bandwidth_gb", "latency_us")}
    return Link(bandwidth=entry["bandwidth_gb"] * 1e9, latency=entry["latency_us"] / 1e6, **rest)


def _device(entry: dict[str, Any], links: Mapping[str, Link]) -> Device:
    scale_up = entry.get("scale_up", "")
    return Device(
        name=entry["name"],
        aliases=tuple(entry["aliases"]),
        memory_bytes=round(entry["memory_gib"] * GIB),
        memory_sold=entry["memory_gb"] * 1e9,
        memory_bandwidth=entry["bandwidth_gb"] * 1e9,
        flops=MappingProxyType({dtype: round(rate * 1e3) * 1e9 for dtype, rate in entry["tflops"].items()}),
        capability=entry["capability"],
        multiprocessors=entry["sms"],
        tdp=entry["tdp_w"],
        scale_up=links[scale_up] if scale_up else None,
        fabric=entry.get("fabric", "none"),
        fabric_devices=entry.get("fabric_devices", 1),
        pcie=links[entry["pcie"]],
        peer_to_peer=entry["peer_to_peer"],
        source=entry["source"],
    )


def find_device(name: str) -> Device:
    """The device a name means, however it is spelt: as a catalogue, nvidia-smi or a person writes it.

    Where a short name could mean several ("A100"), the first in the catalogue. Raises ConfigError, with the nearest
    names, when none is meant.
    """
    words, memory = _words(name)
    for device in catalogue().devices.values():
        sized = memory is None or abs(memory / device.memory_sold - 1) <= MEMORY_TOLERANCE
        # "178.36GiB-GPU", of a log: only the memory is told, to four digits and as the driver reports it.
        by_memory_alone = not words and memory is not None and abs(memory / device.memory_bytes - 1) < 1e-3
        if (sized and words in _names(device)) or by_memory_alone:
            return device
    raise ConfigError(f"GPU {name!r} is not known; {_nearest(name)}")


def find_link(name: str) -> Link:
    """A link by its name, as "infiniband-ndr". Raises ConfigError, with all names, when there is none."""
    links = catalogue().links
    try:
        return links[name.strip().lower()]
    except KeyError:
        raise ConfigError(f"link {name!r} is not known; known are {', '.join(links)}") from None


def _words(name: str) -> tuple[frozenset[str], float | None]:
    """The words that tell a device from others, and the bytes of memory if the name says how many."""
    text = re.sub(r"[^a-z0-9.]+", " ", name.lower())
    text = re.sub(r"\brtx(?=[a-z]?\d)", "rtx ", text)
    text = re.sub(r"(?<=\d)ti\b", " ti", text)
    text = re.sub(r"\bsxm\d?\b", "sxm", text).replace("pci e", "pcie")
    size = _MEMORY.search(text)
    memory = None
    if size:
        memory = float(size[1]) * (GIB if size[2] == "gib" else 1e9)
        text = _MEMORY.sub(" ", text)
    return frozenset(_NOISE.sub(" ", text).split()), memory


@cache
def _names(device: Device) -> frozenset[frozenset[str]]:
    return frozenset(_words(alias)[0] for alias in (device.name, *device.aliases))


def _nearest(name: str) -> str:
    spellings: dict[str, str] = {}  # -> the catalogue's
    for device in catalogue().devices.values():
        without_size = re.sub(r"-\d+GB", "", device.name)
        for spelling in (device.name, *device.aliases, without_size):
            spellings.setdefault(spelling.lower(), device.name)
    near = difflib.get_close_matches(name.lower(), spellings, n=3, cutoff=0.5)
    if near:
        return f"near are {', '.join(dict.fromkeys(spellings[spelling] for spelling in near))}"
    return f"known are {', '.join(catalogue().devices)}"
