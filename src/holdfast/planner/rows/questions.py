"""Rows of measurements, as people publish them, turned into questions the planner can answer.

A row is what `csv.DictReader` gives: strings by column. Of serving: source, model, gpu, n_gpus, tp, pp, dtype, batch,
input_len, output_len, metric, unit; of collectives: source, gpu, n_gpus, n_nodes, op, message_bytes. Columns may be
missing or empty, further ones (ep among those that are read) are no harm. What cannot be told raises `ConfigError`,
which says what is missing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from os.path import isfile

from holdfast.core.errors import ConfigError
from holdfast.hardware.catalogue import Device, find_device
from holdfast.planner.communication import Operation, Software
from holdfast.planner.shapes.load import load_shape
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
    (re.compile(r"fp8|int8|w8|e4m3|e5m2|8bit"), 8),
    (re.compile(r"fp4|int4|w4|awq|gptq|4bit"), 4),
)
_WEIGHTS_ONLY = re.compile(r"awq|gptq|int4|w4a16|w8a16|4bit|8bit")
"""Formats beside which the KV cache stays in 16 bits."""
_FORMAT_IN_NAME = re.compile(
    r"[-_. ]?\b(awq|gptq|bnb|marlin|quantized|(nv|mx)?fp4|int[48]|w[48]a(4|8|16)|[48]bit)(?=[-_. ]|$)", re.IGNORECASE
)
_READ = ("model", "gpu", "dtype", "metric", "unit", "op")
_BLANK = frozenset({"", "nan", "none", "null", "n/a", "na", "-"})
_SIZES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
MOST_REQUESTS, MOST_TOKENS, MOST_BYTES = 1e6, 1e8, 1e15
"""Of what a row may ask; beyond, something else is meant."""
LONGEST_TEXT = 300
"""Characters; spellings are compared with all that is known, which takes time."""


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
    assumed: str = ""
    """What the row does not say, or not so that it is understood."""

    @property
    def devices(self) -> int:
        return self.replicas * self.tensor_parallel * self.pipeline_parallel

    def needs(self, *names: str) -> None:
        """Raises ConfigError for what is asked and not there."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ConfigError(f"the row gives no number for {', '.join(missing)}")


def plain_row(row: Mapping[str, object]) -> Row:
    """Columns in lower case, values as texts; what stands for nothing ("nan", "n/a") is nothing. Raises ConfigError
    for a text too long to be the name of anything."""
    texts = {str(name).strip().lower(): "" if value is None else str(value).strip() for name, value in row.items()}
    for name in _READ:
        if len(text := texts.get(name, "")) > LONGEST_TEXT:
            raise ConfigError(f"{name} {text[:20]!r}…: has {len(text)} characters, at most {LONGEST_TEXT} are read")
    return {name: "" if text.lower() in _BLANK else text for name, text in texts.items()}


def collective_of(row: Row) -> CollectiveRow:
    """What a row of `measured_collectives.csv` asks."""
    operation = operation_of(row.get("op") or "")
    device, ranks = _devices(row)
    nodes = _whole(row, "n_nodes", 1)
    if nodes < 1 or ranks % nodes:
        raise ConfigError(f"n_gpus {ranks}: not the same number on each of n_nodes {nodes}")
    custom = "custom" in (row.get("op") or "").lower()
    software = _software(row.get("source") or "", custom=custom)
    return CollectiveRow(software, device, nodes, ranks, operation, _number(row, "message_bytes", most=MOST_BYTES))


def collective_in_metric(row: Row) -> CollectiveRow:
    """What a serving row asks whose metric is one of NCCL's: nccl_all_reduce@16384B, nccl_all_reduce_busbw@8GiB."""
    name, _, size = (row.get("metric") or "").lower().partition("@")
    operation = operation_of(re.sub(r"^nccl_|_?(ring_)?busbw.*$", "", name) or "all_reduce")
    device, ranks = _devices(row)
    message = 16 * 2.0**30  # a peak or a ceiling: of a message that fills the wire
    if size:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)i?b?", size)
        if not match:
            raise ConfigError(f"metric: {size!r} is no number of bytes")
        message = min(float(match[1]) * _SIZES[match[2]], MOST_BYTES)
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
    device, count = _device(row.get("gpu") or "")
    shape, named_bits = _model(row.get("model") or "")
    tp, pp, replicas = _degrees(row, shape, count)
    dtype = row.get("dtype") or ""
    stated = _bits(dtype)
    # A quantized checkpoint that is computed in bfloat16 is often published as that.
    bits = min((some for some in (stated, named_bits) if some is not None), default=None)
    assumed = f"dtype {dtype!r} is not known: weights taken as the checkpoint has them" if dtype else ""
    engine = _engine(f"{source} {row.get('metric') or ''}")
    weights_only = _WEIGHTS_ONLY.search(f"{dtype} {row.get('model')}".lower())
    # The cache is as small as the weights where engines multiply with these; SGLang's has the model's type all the
    # same (--kv-cache-dtype auto; docs.sglang.ai, server arguments).
    small = (bits or shape.weight_bits) <= 8 and engine not in ("fastertransformer", "sglang") and not weights_only
    return ServingRow(
        engine=engine,
        source=source,
        shape=shape,
        device=device,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        expert_parallel=_expert_parallel(row, shape),
        replicas=replicas,
        weight_bits=bits,
        kv_bits=8 if small else 16,
        batch=_maybe(row, "batch", MOST_REQUESTS) or None,
        input_len=_maybe(row, "input_len", MOST_TOKENS),
        output_len=_maybe(row, "output_len", MOST_TOKENS),
        assumed=assumed if stated is None and dtype.lower() != "auto" else "",
    )


def _degrees(row: Row, shape: ModelShape, count: int) -> tuple[int, int, int]:
    """Tensor and pipeline degree, and replicas. Where n_gpus says more than the degrees, these are replicas."""
    pp = _whole(row, "pp", 1)
    ranks = _whole(row, "n_gpus", count)
    if count and ranks != count:
        raise ConfigError(f"n_gpus {ranks}: gpu {row.get('gpu')!r} says {count}")
    if not 1 <= pp <= shape.num_layers:
        raise ConfigError(f"pp {pp}: the model has {shape.num_layers} layers")
    tp = _whole(row, "tp", max(1, ranks // pp))
    heads = max((layer.attention.num_heads for layer, _ in shape.kinds if layer.attention), default=tp)
    if not 1 <= tp <= heads:
        raise ConfigError(f"tp {tp}: the model has {heads} heads")
    if ranks % (tp * pp):
        raise ConfigError(f"n_gpus {ranks}: no multiple of tp {tp} × pp {pp}")
    return tp, pp, max(1, ranks // (tp * pp))


def _expert_parallel(row: Row, shape: ModelShape) -> int:
    ep = _whole(row, "ep", 1)
    experts = max((layer.experts.num_experts for layer, _ in shape.kinds if layer.experts), default=1)
    if not 1 <= ep <= experts:
        raise ConfigError(f"ep {ep}: the model has {experts if experts > 1 else 'no'} experts")
    return ep


@lru_cache(maxsize=1024)
def _model(name: str) -> tuple[ModelShape, float | None]:
    """The shape, and the bits of the weights where the name says them. A path of a config.json is taken too."""
    if not name:
        raise ConfigError("the row names no model")
    if re.fullmatch(r"\d+(\.\d+)?[bB]", name):
        raise ConfigError(f"model {name!r}: a size alone does not say how the model is shaped")
    if name.endswith(".json") and isfile(name):
        return load_shape(name), None
    plain = _FORMAT_IN_NAME.sub("", name)
    return find_model(plain), _bits(name[len(name.rpartition("/")[0]) :]) if plain != name else None


@lru_cache(maxsize=1024)
def _device(name: str) -> tuple[Device, int]:
    """The device, and how many of them the name says: "8xH100"; 0: nothing."""
    if not name:
        raise ConfigError("the row names no gpu")
    if "+" in name:
        raise ConfigError(f"gpu {name!r}: several types in one name")
    match = re.match(r"(\d{1,6})\s*[x×*]\s*(?=\D)", name, re.IGNORECASE)
    return (find_device(name[match.end() :]), int(match[1])) if match else (find_device(name), 0)


def _devices(row: Row) -> tuple[Device, int]:
    """Of a collective."""
    device, count = _device(row.get("gpu") or "")
    ranks = _whole(row, "n_gpus", count or None)
    if ranks < 2 or (count and ranks != count):
        raise ConfigError(f"n_gpus {ranks}: " + (f"gpu {row.get('gpu')!r} says {count}" if count else "at least 2"))
    return device, ranks


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


def _number(row: Row, name: str, most: float) -> float:
    text = (row.get(name) or "").strip()
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{name} {text!r}: not a number" if text else f"the row gives no {name}") from None
    if not 0 <= value <= most:
        raise ConfigError(f"{name} {text}: must be from 0 to {most:g}")
    return value


def _whole(row: Row, name: str, default: int | None = None) -> int:
    if default is not None and not (row.get(name) or "").strip():
        return default
    value = _number(row, name, most=1e6)
    if value != int(value):
        raise ConfigError(f"{name} {row.get(name)}: not a whole number")
    return int(value)


def _maybe(row: Row, name: str, most: float) -> float | None:
    """None where there is a word ("max", "sharegpt") or nothing. Raises ConfigError for a number out of range."""
    try:
        float((row.get(name) or "").strip())
    except ValueError:
        return None
    return _number(row, name, most)
