"""What was measured on a machine: seconds of matrix products, attention and exchanges. `holdfast probe` writes it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import msgspec

from holdfast.core.errors import ConfigError
from holdfast.core.spec import DecoderSpec
from holdfast.hardware.cluster import Cluster

Format = Literal["float32", "bfloat16", "Q8_0", "Q4_0", "Q4_1"]
Exchanged = Literal["all_reduce", "all_gather", "send"]
RowOperation = Literal["norm", "store_kv", "argmax"]


class Shared(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the machine was shared out meanwhile: `ranks` processes that all measured the same at once, with so many
    `threads` each. `seconds` are the slowest rank's."""

    ranks: int
    threads: int
    seconds: float


class Product(Shared, frozen=True, kw_only=True):
    """rows × inputs times a matrix [outputs, inputs] of `format`, one of several that are read by turns."""

    format: Format
    rows: int
    inputs: int
    outputs: int
    shards: int = 1
    """Virtual shards of the inputs, summed one by one, as those of a row-parallel matrix are."""
    cached: bool = False
    """The matrices lie in a cache; else in memory, in no cache."""


class Attention(Shared, frozen=True, kw_only=True):
    """One layer's attention, keys and values in bfloat16 or float32: so many requests of `queries` tokens each, whose
    last one sees `context` tokens."""

    dtype: Literal["float32", "bfloat16"]
    requests: int
    queries: int
    context: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


class RowWork(Shared, frozen=True, kw_only=True):
    """What is done to rows of so many numbers: a norm; keys and values stored and rotated (`width`: of queries, keys
    and values together); the largest of a row of logits."""

    operation: RowOperation
    rows: int
    width: int


class Turn(Shared, frozen=True, kw_only=True):
    """A whole step of a replica of `stages` stages, from its engine to the workers and back, that has next to nothing
    to compute: `requests` with `tokens` new tokens each. Of a pipeline: until each request has had its turn."""

    stages: int
    requests: int
    tokens: int
    cold: bool = False
    """Of `Profile.cold_model` instead, whose weights push all else out of the caches; its arithmetic is in it."""


class Exchange(Shared, frozen=True, kw_only=True):
    """One of many exchanges in a row. `num_bytes`: of the tensor as each rank has it afterwards; for "send" (to the
    next of two stages) of the tensor that is sent."""

    operation: Exchanged
    num_bytes: int


class Reading(Shared, frozen=True, kw_only=True):
    """All ranks together read `num_bytes` of memory."""

    num_bytes: int


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One machine, measured once. `kernels`: the backend's name. `measured_at`: ISO 8601. `load`: processes that were
    running before (the load average of a minute); those that went on took their share of what was measured."""

    machine: str
    processor: str
    kernels: str
    cores: int
    memory_bytes: int
    holdfast: str
    measured_at: str
    load: float
    readings: tuple[Reading, ...]
    products: tuple[Product, ...]
    attentions: tuple[Attention, ...]
    exchanges: tuple[Exchange, ...]
    row_works: tuple[RowWork, ...] = ()
    turns: tuple[Turn, ...] = ()
    cold_model: DecoderSpec | None = None

    @property
    def memory_bandwidth(self) -> float:
        """Bytes/s that the machine reads at most."""
        return max(reading.num_bytes / reading.seconds for reading in self.readings)

    def flops(self, format: Format) -> float:
        """FLOP/s of the fastest product of a format, all ranks together; 0 where none was measured."""
        products = [product for product in self.products if product.format == format]
        rates = [2 * p.rows * p.inputs * p.outputs * p.ranks / p.seconds for p in products]
        return max(rates, default=0.0)


def default_path() -> Path:
    """Where the profile of this machine is kept for its user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "holdfast" / "profile.json"


def with_profile(cluster: Cluster, profile: Profile) -> Cluster:
    """This machine's CPUs with the rates that were measured in place of those that are assumed; a cluster of GPUs, or
    of other CPUs, as it is."""
    (device, *others) = cluster.devices
    if others or device.name != "cpu" or profile.cores != device.multiprocessors:
        return cluster
    flops = {"fp32": profile.flops("float32"), "bf16": profile.flops("bfloat16")}
    source = f"CPU: rates are those of holdfast probe, {profile.measured_at}, load {profile.load:.1f}"
    known = {name: rate for name, rate in flops.items() if rate} or device.flops
    measured = replace(
        device, memory_bandwidth=profile.memory_bandwidth, flops=MappingProxyType(known), source=source
    )
    node = replace(cluster.nodes[0], devices=(measured,))
    said = tuple(source if text == device.source else text for text in cluster.assumptions)
    return replace(cluster, nodes=(node,), assumptions=said)


def write_profile(profile: Profile, path: Path) -> None:
    """As JSON; what was there is replaced whole. Raises ConfigError where that cannot be written."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(profile)) + b"\n")
        draft.replace(path)
    except OSError as error:
        raise ConfigError(f"profile {path}: cannot be written: {error.strerror}") from error


def read_profile(path: Path) -> Profile:
    """Raises ConfigError, with the field, when it is not there or is no profile."""
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
    except OSError as error:
        raise ConfigError(f"profile {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:  # ValidationError is one: it names the field
        raise ConfigError(f"profile {path}: {error}") from error
    points = (
        *profile.readings,
        *profile.products,
        *profile.attentions,
        *profile.exchanges,
        *profile.row_works,
        *profile.turns,
    )
    if not profile.readings or any(not 0 < point.seconds < 1e6 for point in points):
        raise ConfigError(f"profile {path}: every measurement must have seconds above 0, and there must be a reading")
    return profile
