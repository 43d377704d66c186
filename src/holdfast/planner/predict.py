"""Predictions for rows of measurements, each with a band and, where the row has a value, the error.

    row → what it asks (`rows`) → stages (`timing`) → steps or a steady state (`serving`) → a value in the row's unit
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

from holdfast.core.errors import ConfigError, UserError
from holdfast.hardware.catalogue import find_link
from holdfast.planner.capacity import capacity_of
from holdfast.planner.communication import Fabric, path_of, wire_bytes
from holdfast.planner.engines import ENGINES
from holdfast.planner.fastertransformer import fastertransformer_memory
from holdfast.planner.memory import KV_FORMATS, ServingLoad, ShapeTable, plan_memory, table_of
from holdfast.planner.rows import DEVICES_PER_NODE, CollectiveRow, Row, ServingRow, collective_in_metric, collective_of, serving_of
from holdfast.planner.serving import Served, Workload, serve
from holdfast.planner.shape import Layer, ModelShape
from holdfast.planner.shares import RankShare, even_shares
from holdfast.planner.timing import (
    Coefficients,
    Engine,
    Stage,
    StepBatch,
    coefficients,
    stage_of,
    step_time,
    stored_bits,
)

UNITS = MappingProxyType({"s": 1.0, "ms": 1e3, "us": 1e6, "µs": 1e6, "ns": 1e9})
SIZES = MappingProxyType({"b": 1.0, "gb": 1e-9, "gib": 2.0**-30, "tokens": 1.0, "blocks": 1 / 16})
MAX_REQUESTS = 2048
"""At once, where a row says "as many as fit" (TensorRT-LLM's default of max_batch_size)."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """In the row's unit. `note` says why there is no value."""

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""
    kind: str = ""
    """What was asked, in the planner's words: tpot, ttft, …"""

    def error(self, measured: str | None) -> float | None:
        """predicted / measured - 1."""
        try:
            value = float(measured or "")
        except ValueError:
            return None
        return self.value / value - 1 if self.value is not None and value else None


def predict(row: Row, known: Coefficients | None = None) -> Prediction:
    """The planner's answer to one row; never raises for what is in it."""
    known = known or coefficients()
    try:
        if (row.get("op") or "").strip():
            return _banded(_collective(collective_of(row), row, "us"), "collective", known)
        metric = (row.get("metric") or "").strip().lower()
        if metric.startswith("nccl"):
            return _banded(_collective(collective_in_metric(row), row, "us"), "collective", known)
        kind = kind_of(metric)
        if kind is None:
            return Prediction(None, note=f"metric {metric!r} is not one the planner predicts")
        asked = serving_of(row)
        return _banded(KINDS[kind](asked, known) * _scale(kind, row.get("unit")), kind, known)
    except UserError as error:
        return Prediction(None, note=str(error))


def kind_of(metric: str) -> str | None:
    """Which of `KINDS` a metric is, by the names people give it; None: none, or a percentile."""
    if re.search(r"p\d\d|p99|percentile|max_latency", metric):
        return None
    for pattern, kind in _NAMES:
        if pattern.search(metric):
            return kind
    return None


def _banded(value: float, kind: str, known: Coefficients) -> Prediction:
    band = known.bands.get(kind, known.bands["other"])
    return Prediction(value, value / band, value * band, kind=kind)


def _scale(kind: str, unit: str | None) -> float:
    """From seconds, bytes or tokens per second into the row's unit."""
    unit = (unit or "ms").strip().lower()
    if kind in ("throughput", "decode_throughput", "out_of_memory"):
        return 1
    if kind in ("weights", "memory_used", "kv_tokens"):
        if kind == "memory_used" and unit == "gb":
            unit = "gib"  # what shows the memory in use counts in MiB, and who rounds it says GB
        if unit not in SIZES:
            raise ConfigError(f"unit {unit!r} is not known; known are {', '.join(SIZES)}")
        return SIZES[unit]
    if unit not in UNITS:
        raise ConfigError(f"unit {unit!r} is not known; known are {', '.join(UNITS)}")
    return UNITS[unit]


# -- collectives -----------------------------------------------------------------------------------------------------


def _collective(asked: CollectiveRow, row: Row, unit: str) -> float:
    """Time, or bus bandwidth where the row's unit is one."""
    device = asked.device
    link = device.scale_up if device.scale_up and asked.ranks // asked.nodes <= device.fabric_devices else device.pcie
    fabric = Fabric(device.name, link, find_link("infiniband-ndr") if asked.nodes > 1 else None)
    sent = wire_bytes(asked.operation, asked.ranks, asked.message)
    seconds = path_of(asked.software, fabric, asked.nodes, asked.ranks, asked.operation).time(sent)
    unit = (row.get("unit") or unit).strip().lower()
    if unit.startswith("gb/s"):
        return sent / seconds / 1e9
    return seconds * UNITS.get(unit, 1e6)


# -- serving ---------------------------------------------------------------------------------------------------------


def stages_of(asked: ServingRow, engine: Engine) -> list[Stage]:
    """Even stages on the row's devices, `DEVICES_PER_NODE` of them on a node."""
    device, tp = asked.device, asked.tensor_parallel
    nodes = math.ceil(tp / max(DEVICES_PER_NODE, device.fabric_devices if device.fabric_devices > 16 else 0))
    link = device.scale_up if device.scale_up and min(tp, DEVICES_PER_NODE) <= device.fabric_devices else device.pcie
    fabric = Fabric(device.name, link, find_link("infiniband-hdr") if nodes > 1 else None)
    return [
        stage_of(
            asked.shape, kinds, device, tp, fabric, engine, nodes=nodes, expert_parallel=asked.expert_parallel,
            weight_bits=asked.weight_bits, kv_bits=asked.kv_bits, last=index == asked.pipeline_parallel - 1,
        )
        for index, kinds in enumerate(even_stages(asked.shape, asked.pipeline_parallel))
    ]  # fmt: skip


def even_stages(shape: ModelShape, depth: int) -> list[tuple[tuple[Layer, int], ...]]:
    """Kinds of layers of each of `depth` stages, as equal in number as they can be."""
    if depth == 1:
        return [tuple(shape.kinds)]
    stages = []
    for index in range(depth):
        first, last = (shape.num_layers * edge // depth for edge in (index, index + 1))
        counts: dict[Layer, int] = {}
        for layer in shape.layers[first:last]:
            counts[layer] = counts.get(layer, 0) + 1
        stages.append(tuple(counts.items()))
    return stages


def _served(asked: ServingRow, known: Coefficients, concurrency: float | None = None) -> Served:
    asked.needs("input_len", "output_len")
    assert asked.input_len is not None and asked.output_len is not None
    engine = known.engines[asked.engine]
    run = run_of(asked, known)
    requests = (concurrency or asked.batch or 0) / asked.replicas
    workload = Workload(
        int(asked.input_len), int(asked.output_len), max(1, round(requests)),
        float(run.get("cached", 0)), int(run.get("slots_lost", 0)), int(run.get("stream_interval", 1)),
    )  # fmt: skip
    return serve(stages_of(asked, engine), kv_tokens(replace(asked, batch=None), engine.memory), workload, engine, known)


def run_of(asked: ServingRow, known: Coefficients) -> Mapping[str, float | str]:
    """What is peculiar to a published series; see `coefficients.toml`."""
    for run in known.runs:
        lengths = (run.get("input_len", asked.input_len), run.get("output_len", asked.output_len))
        fits = lengths == (asked.input_len, asked.output_len) and asked.tensor_parallel <= run.get("max_tp", math.inf)
        if str(run["source"]) in asked.source and fits:
            return run
    return {}


def shares_and_load(asked: ServingRow) -> tuple[tuple[RankShare, ...], ServingLoad]:
    shares = even_shares(
        asked.shape.num_layers, tensor=asked.tensor_parallel, pipeline=asked.pipeline_parallel,
        expert=asked.expert_parallel,
    )  # fmt: skip
    context = int((asked.input_len or 0) + (asked.output_len or 0)) or asked.shape.max_context
    formats = {8: KV_FORMATS["fp8"], 16: KV_FORMATS["bfloat16"]}
    return shares, ServingLoad(context, int(asked.batch or 1), 8192, formats[int(asked.kv_bits)])


def weighed(asked: ServingRow) -> ShapeTable:
    """The model with the row's bits of weights."""
    bits = asked.weight_bits
    if bits is None:
        return _table(asked.shape)
    stored = stored_bits(bits)
    return _table(replace(asked.shape, weight_bits=stored, expert_bits=stored))


@lru_cache(maxsize=256)
def _table(shape: ModelShape) -> ShapeTable:
    return table_of(shape)


@lru_cache(maxsize=4096)
def kv_tokens(asked: ServingRow, memory: str) -> int:
    """Tokens that the KV cache of one replica has room for."""
    shares, load = shares_and_load(asked)
    linked = asked.device.scale_up is not None
    capacity = capacity_of(
        weighed(asked), shares, asked.device.memory_bytes, replace(load, sequences=1), ENGINES[memory], linked=linked
    )
    return capacity.kv_tokens


def _tpot(asked: ServingRow, known: Coefficients) -> float:
    asked.needs("batch")
    return _served(asked, known).tpot


def _ttft(asked: ServingRow, known: Coefficients) -> float:
    asked.needs("batch")
    return _served(asked, known).ttft


def _throughput(asked: ServingRow, known: Coefficients) -> float:
    """Output tokens per second with as many requests as the engine runs at once, all replicas together."""
    served = _served(asked, known, None if asked.batch else MAX_REQUESTS * asked.replicas)
    if asked.batch:
        return served.throughput * asked.replicas
    return served.running / (served.latency + served.prompt_wait) * asked.replicas


def _static_batch(asked: ServingRow, known: Coefficients) -> float:
    """A batch that begins and ends together: its prompts in one step, then a step per token."""
    asked.needs("batch", "input_len", "output_len")
    assert asked.output_len is not None
    return _static_prompt(asked, known) + (asked.output_len - 1) * _static_token(asked, known)


def _static_prompt(asked: ServingRow, known: Coefficients) -> float:
    asked.needs("batch", "input_len")
    assert asked.batch is not None and asked.input_len is not None
    engine = known.engines[asked.engine]
    stages = stages_of(asked, engine)
    parts = min(len(stages), int(asked.batch)) or 1
    batch = StepBatch(0, 0, asked.batch / parts * asked.input_len, asked.input_len / 2, graph=False)
    times = [step_time(stage, batch, engine, known.efficiency).total for stage in stages]
    return sum(times) + (parts - 1) * max(times)


def _static_token(asked: ServingRow, known: Coefficients) -> float:
    asked.needs("batch")
    assert asked.batch is not None
    engine = known.engines[asked.engine]
    stages = stages_of(asked, engine)
    context = (asked.input_len or 0) + (asked.output_len or 0) / 2
    parts = min(len(stages), int(asked.batch)) or 1
    batch = StepBatch(asked.batch / parts, context)
    times = [step_time(stage, batch, engine, known.efficiency).total for stage in stages]
    return max(sum(times), parts * max(times))


def _layer(batch: StepBatch, asked: ServingRow, known: Coefficients) -> float:
    engine = known.engines[asked.engine]
    stage = stages_of(asked, engine)[0]
    time = step_time(stage, batch, engine, known.efficiency)
    return (time.total - time.head - time.engine) / sum(count for _, count in stage.kinds)


def _prompt_layer(asked: ServingRow, known: Coefficients) -> float:
    """Of one layer, for `batch` tokens of prompts."""
    asked.needs("batch")
    assert asked.batch is not None
    return _layer(StepBatch(0, 0, asked.batch, known.load["layer_context"] / 2, graph=False), asked, known)


def _decode_layer(asked: ServingRow, known: Coefficients) -> float:
    """Of one layer, for `batch` requests that decode."""
    asked.needs("batch")
    assert asked.batch is not None
    return _layer(StepBatch(asked.batch, known.load["layer_context"]), asked, known)


def _decode_rate(asked: ServingRow, known: Coefficients) -> float:
    asked.needs("batch")
    assert asked.batch is not None
    return asked.batch / _static_token(asked, known)


def _weights(asked: ServingRow, known: Coefficients) -> float:
    """Bytes of the fullest rank."""
    shares, load = shares_and_load(asked)
    return max(rank.weights for rank in plan_memory(weighed(asked), shares, load))


def _kv_room(asked: ServingRow, known: Coefficients) -> float:
    engine = known.engines[asked.engine].memory
    return kv_tokens(replace(asked, batch=None), engine)


def _memory_used(asked: ServingRow, known: Coefficients) -> float:
    """Bytes of the fullest rank, as FasterTransformer allocates."""
    asked.needs("batch", "input_len", "output_len")
    return _ft_memory(asked)


def _out_of_memory(asked: ServingRow, known: Coefficients) -> float:
    """1 where it does not fit, 0 where it does."""
    asked.needs("batch", "input_len", "output_len")
    return float(_ft_memory(asked) > asked.device.memory_bytes)


def _ft_memory(asked: ServingRow) -> int:
    if asked.engine != "fastertransformer":
        raise ConfigError(f"the memory that {asked.engine} uses depends on its settings, which the row does not give")
    assert asked.batch is not None and asked.input_len is not None and asked.output_len is not None
    return fastertransformer_memory(
        weighed(asked), tensor=asked.tensor_parallel, pipeline=asked.pipeline_parallel, batch=int(asked.batch),
        input_len=int(asked.input_len), output_len=int(asked.output_len),
    ).total  # fmt: skip


KINDS: Mapping[str, Callable[[ServingRow, Coefficients], float]] = MappingProxyType(
    {
        "tpot": _tpot,
        "ttft": _ttft,
        "throughput": _throughput,
        "static_batch": _static_batch,
        "static_prompt": _static_prompt,
        "static_token": _static_token,
        "prompt_layer": _prompt_layer,
        "decode_layer": _decode_layer,
        "decode_throughput": _decode_rate,
        "weights": _weights,
        "kv_tokens": _kv_room,
        "memory_used": _memory_used,
        "out_of_memory": _out_of_memory,
    }
)
"""What can be asked → seconds, or tokens per second."""

_NAMES = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"^oom", "out_of_memory"),
        (r"^memory_used", "memory_used"),
        (r"^mem_weights", "weights"),
        (r"^kv_cache_(tokens|blocks16)$", "kv_tokens"),
        (r"prompt_time_per_layer|prefill_time_per_layer", "prompt_layer"),
        (r"decode_time_per_layer", "decode_layer"),
        (r"decode_throughput", "decode_throughput"),
        (r"throughput", "throughput"),
        (r"^ttft|time_to_first", "ttft"),
        (r"^tpot|^itl|inter_token|time_per_output", "tpot"),
        (r"prefill_latency", "static_prompt"),
        (r"latency_per_token", "static_token"),
        (r"e2e_latency", "static_batch"),
    )
)
