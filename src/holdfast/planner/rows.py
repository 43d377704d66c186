"""Rows of measurements, as people publish them, turned into questions the planner can answer.

A row is what `csv.DictReader` gives: strings by column. Of serving: source, model, gpu, n_gpus, tp, pp, dtype, batch,
input_len, output_len, metric, unit; of collectives: source, gpu, n_gpus, n_nodes, op, message_bytes. Columns may be
missing, further ones are no harm. What cannot be told raises `ConfigError`, which says what is missing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from holdfast.core.errors import ConfigError
from holdfast.hardware.catalogue import Device, find_device
from holdfast.planner.communication import Operation, Software
from holdfast.planner.shapes.presets import find_model
from holdfast.planner.shapes.shape import ModelShape

Row = Mapping[str, str | None]

DEVICES_PER_NODE = 8
"""Where a row does not say how many nodes there are."""

_OPERATIONS: dict[str, Operation] = {
    "allreduce": "all_reduce",
    "allreducecustom": "all_reduce",
    "customallreduce": "all_reduce",
    "allgather": "all_gather",
    "reducescatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "sendrecv": "send_recv",
    "p2p": "send_recv",
}
_SOFTWARES: tuple[tuple[str, Software], ...] = (
    ("vidur", "torch"),
    ("vllm_eager", "vllm-eager"),
    ("eager", "vllm-eager"),
    ("vllm", "vllm"),
    ("trtllm", "trtllm"),
    ("tensorrt", "trtllm"),
)
_ENGINES = (
    ("fastertransformer", "fastertransformer"),
    ("megatron", "megatron"),
    ("helix", "layerwise"),
    ("sglang", "sglang"),
    ("trtllm", "trtllm"),
    ("tensorrt", "trtllm"),
    ("_trt", "trtllm"),
    ("text-generation-inference", "vllm"),
    ("vllm", "vllm"),
)
_BITS = (
    (re.compile(r"fp32|float32"), 32),
    (re.compile(r"bf16|fp16|half|float16|bfloat16"), 16),
    (re.compile(r"fp8|int8|w8|e4m3|e5m2"), 8),
    (re.compile(r"fp4|int4|w4|awq|gptq"), 4),
)
_SIZES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


@dataclass(frozen=True, slots=True)
class CollectiveRow:
    """One collective: `ranks` in all, on `nodes` nodes; `message` in bytes."""

    software: Software
    device: Device
    nodes: int
    ranks: int
    operation: Operation
    message: float

    @property
    def key(self) -> tuple[str, str, int, int, str]:
        """As in `communication.measured_paths`."""
        return self.software, self.device.name, self.nodes, self.ranks, self.operation


@dataclass(frozen=True, slots=True)
class ServingRow:
    """One measurement of an engine. `batch`: requests at once, or None ("max": as many as fit)."""

    engine: str
    source: str
    shape: ModelShape
    device: Device
    tensor_parallel: int
    pipeline_parallel: int
    expert_parallel: int
    replicas: int
    weight_bits: float | None
    """None: as the checkpoint has them."""
    kv_bits: float
    batch: float | None
    input_len: float | None
    output_len: float | None

    def needs(self, *names: str) -> None:
        """Raises ConfigError for what is asked and not there."""
        for name in names:
            if getattr(self, name) is None:
                raise ConfigError(f"the row gives no number for {name}")


def collective_of(row: Row) -> CollectiveRow:
    """What a row of `measured_collectives.csv` asks."""
    operation = operation_of(row.get("op") or "")
    ranks, nodes = _whole(row, "n_gpus"), _whole(row, "n_nodes", 1)
    if nodes < 1 or ranks < 1 or ranks % nodes:
        raise ConfigError(f"n_gpus {ranks}: not the same number on each of n_nodes {nodes}")
    custom = "custom" in (row.get("op") or "").lower()
    software = _software(row.get("source") or "", custom=custom)
    return CollectiveRow(software, _device(row.get("gpu")), nodes, ranks, operation, _number(row, "message_bytes"))


def collective_in_metric(row: Row) -> CollectiveRow:
    """What a serving row asks whose metric is one of NCCL's: nccl_all_reduce@16384B, nccl_all_reduce_busbw@8GiB."""
    name, _, size = (row.get("metric") or "").lower().partition("@")
    operation = operation_of(re.sub(r"^nccl_|_?(ring_)?busbw.*$", "", name) or "all_reduce")
    ranks = _whole(row, "n_gpus")
    message = 16 * 2.0**30  # a peak or a ceiling: of a message that fills the wire
    if size:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)i?b?", size)
        if not match:
            raise ConfigError(f"metric: {size!r} is no number of bytes")
        message = float(match[1]) * _SIZES[match[2]]
    device = _device(row.get("gpu"))
    nodes = max(1, math.ceil(ranks / max(device.fabric_devices, DEVICES_PER_NODE)))
    return CollectiveRow(_software(row.get("source") or "", custom=False), device, nodes, ranks, operation, message)


def operation_of(name: str) -> Operation:
    """By any spelling: "allreduce", "all_reduce_custom", "all_reduce NCCL_NVLS_ENABLE=0"."""
    key = re.sub(r"[^a-z0-9]", "", name.split(maxsplit=1)[0].lower() if name.split() else "")
    if key not in _OPERATIONS:
        raise ConfigError(f"op {name!r} is not known; known are {', '.join(dict.fromkeys(_OPERATIONS.values()))}")
    return _OPERATIONS[key]


def serving_of(row: Row) -> ServingRow:
    """What a row of `measured_serving.csv` asks, but for its metric."""
    source = row.get("source") or ""
    device = _device(row.get("gpu"))
    shape = _model(row.get("model") or "")
    pp = _whole(row, "pp", 1)
    ranks = _whole(row, "n_gpus", 0)
    tp = _whole(row, "tp", 0) or max(1, ranks // pp)
    if shape.num_layers < pp:
        raise ConfigError(f"pp {pp}: the model has {shape.num_layers} layers")
    bits = _bits(row.get("dtype") or "")
    engine = _engine(f"{source} {row.get('metric') or ''}")
    return ServingRow(
        engine=engine,
        source=source,
        shape=shape,
        device=device,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        expert_parallel=_whole(row, "ep", 1),
        replicas=max(1, ranks // (tp * pp)),
        weight_bits=bits,
        kv_bits=8 if (bits or shape.weight_bits) <= 8 and engine != "fastertransformer" else 16,
        batch=_maybe(row, "batch"),
        input_len=_maybe(row, "input_len"),
        output_len=_maybe(row, "output_len"),
    )


@cache
def _model(name: str) -> ModelShape:
    if not name:
        raise ConfigError("the row names no model")
    if re.fullmatch(r"\d+(\.\d+)?[bB]", name):
        raise ConfigError(f"model {name!r}: a size alone does not say how the model is shaped")
    return find_model(name)


@cache
def _device(name: str | None) -> Device:
    if not name:
        raise ConfigError("the row names no gpu")
    if "+" in name or re.match(r"\d+x", name):
        raise ConfigError(f"gpu {name!r}: several in one name")
    return find_device(name)


def _software(source: str, *, custom: bool) -> Software:
    text = source.lower()
    if "nccl" in text and not custom:
        return "nccl"
    for word, software in _SOFTWARES:
        if word in text:
            return software
    return "vllm" if custom else "nccl"


def _engine(text: str) -> str:
    lowered = text.lower()
    if "megatron" in lowered.rpartition(" ")[2]:
        return "megatron"
    for word, engine in _ENGINES:
        if word in lowered:
            return engine
    return "vllm"


def _bits(dtype: str) -> float | None:
    for pattern, bits in _BITS:
        if pattern.search(dtype.lower()):
            return bits
    return None


def _number(row: Row, name: str) -> float:
    text = (row.get(name) or "").strip()
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{name} {text!r}: not a number") from None
    if not math.isfinite(value) or value < 0:
        raise ConfigError(f"{name} {text!r}: not a finite number, or below 0")
    return value


def _whole(row: Row, name: str, default: int | None = None) -> int:
    if default is not None and not (row.get(name) or "").strip():
        return default
    value = _number(row, name)
    if value != int(value) or value > 1_000_000:
        raise ConfigError(f"{name} {row.get(name)!r}: not a whole number up to a million")
    return int(value)


def _maybe(row: Row, name: str) -> float | None:
    """None where there is a word ("max", "sharegpt") or nothing."""
    try:
        return _number(row, name)
    except ConfigError:
        return None
