"""What is fitted: shares of the limits that engines reach, and what each engine spends besides. From
`coefficients.toml`, which `python -m benchmarks.planner --write` writes."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

from holdfast.planner.communication import Software


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the limits, the same for all engines and devices."""

    memory: float
    """Of the memory bandwidth, streaming weights."""
    memory_4bit: float
    """The same of 4-bit weights that are multiplied as such."""
    kv: float
    """The same, gathering the blocks of the KV cache."""
    matmul: Mapping[int, float]
    """Of the dense FLOP/s, by bits of the weights: 16, 8, 4."""
    attention: float
    """Of the 16-bit FLOP/s, over a prompt."""
    passes: float
    """How often a layer's activations are read or written, on top of the products themselves."""
    sharpness: float
    """Power of the norm that joins the two sides of the roofline."""
    all_reduce: float
    """Share of an all-reduce that is not hidden or fused."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What an engine spends besides, and how it admits requests."""

    name: str
    software: Software
    matmul: float
    """Of the FLOP/s that `Efficiency.matmul` says, what its kernels reach."""
    matmul_blackwell: float
    """The same on Blackwell, for which kernels were not as ripe when they were measured."""
    group_reads: float
    """How often keys and values are read that several query heads share, at most once for each."""
    layer: float
    """Seconds a layer takes at least, replayed from a graph."""
    layer_eager: float
    """Seconds of the host to launch a layer kernel by kernel, as in steps with prompts: a step takes no less than
    all its layers (`timing.host_time`)."""
    step: float
    """Seconds per step."""
    row: float
    """Seconds per step and request."""
    host_row: float
    """Seconds per request that the host spends, handing out tokens, while the device is at work: on top of what it
    takes to launch the step, which takes no less than both."""
    mixing: float
    """Share of a prompt's time by which it delays the requests that decode meanwhile."""
    burst: float
    """Share of requests that come at the same time as all others, and wait for half of the others' prompts."""
    first_token: float
    """Seconds of every request before its prompt is scheduled and after its first token."""
    front_request: float
    """Seconds that the one process in front spends on a request,"""
    front_token: float
    """and on each of its tokens,"""
    front_prompt: float
    """and on each token of its prompt."""
    reserve: float
    """Share of a request's output that must fit before it is admitted: 1 where it is never preempted."""
    memory: str
    """How it takes memory, of `engines.ENGINES`."""
    graph_rows: int
    """Requests at most whose step is replayed from a graph, where nothing else is said: vLLM's largest
    cudagraph_capture_sizes, SGLang's --cuda-graph-max-bs. Known, not fitted."""
    chunk: int
    """Tokens of a step at most."""
    most_running: float
    """Requests at once at most, whatever room there is."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    efficiency: Efficiency
    engines: Mapping[str, Engine]
    runs: tuple[Mapping[str, float | str], ...]
    """What is peculiar to a published series of measurements: see `coefficients.toml`."""
    load: Mapping[str, float]
    bands: Mapping[str, float]
    """By metric: how far off, as a factor, nine in ten predictions are at most."""


@cache
def coefficients() -> Coefficients:
    """Those of `coefficients.toml`, read once."""
    text = resources.files(__package__).joinpath("coefficients.toml").read_text(encoding="utf-8")
    return parse_coefficients(tomllib.loads(text))


def parse_coefficients(tables: Mapping[str, Mapping]) -> Coefficients:  # type: ignore[type-arg]
    """From the tables of the file; times there are in µs. Raises KeyError or TypeError where a name is wrong."""
    efficiency = dict(tables["efficiency"])
    matmul = {bits: efficiency.pop(f"matmul_{bits}bit") for bits in (16, 8, 4)}
    seconds = {
        "layer",
        "layer_eager",
        "step",
        "row",
        "first_token",
        "front_request",
        "front_token",
        "front_prompt",
        "host_row",
    }
    engines = {
        name: Engine(name=name, **{key: value * 1e-6 if key in seconds else value for key, value in entry.items()})
        for name, entry in tables["engine"].items()
    }
    return Coefficients(
        Efficiency(matmul=MappingProxyType(matmul), **efficiency),
        MappingProxyType(engines),
        tuple(MappingProxyType(dict(run)) for run in tables.get("run", ())),
        MappingProxyType(dict(tables["load"])),
        MappingProxyType(dict(tables["bands"])),
    )
