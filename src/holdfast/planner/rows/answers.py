"""What the planner says to each kind of question that rows of measurements ask: seconds, bytes, tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, pairwise
from types import MappingProxyType

from holdfast.core.errors import ConfigError
from holdfast.hardware.catalogue import Device, Link, find_link
from holdfast.planner.coefficients import Coefficients, Engine
from holdfast.planner.communication import Fabric, path_of, wire_bytes
from holdfast.planner.memory.capacity import capacity_of
from holdfast.planner.memory.engines import ENGINES
from holdfast.planner.memory.fastertransformer import fastertransformer_memory
from holdfast.planner.memory.ranks import KV_FORMATS, ServingLoad, ShapeTable, plan_memory, table_of
from holdfast.planner.memory.shares import RankShare, even_layers, even_shares
from holdfast.planner.rows.questions import DEVICES_PER_NODE, CollectiveRow, ServingRow
from holdfast.planner.serving import Replica, Served, Workload, serve
from holdfast.planner.shapes.shape import Layer, ModelShape
from holdfast.planner.timing import Stage, StepBatch, stage_of, step_time, stored_bits

HALF = 0.5
MAX_REQUESTS = 2048
"""At once, where a row says "as many as fit" (TensorRT-LLM's default of max_batch_size)."""


def time_of_collective(asked: CollectiveRow) -> tuple[float, float]:
    """Bytes that each rank sends, and seconds."""
    fabric = _fabric(
        asked.device, asked.ranks // asked.nodes, find_link("infiniband-ndr") if asked.nodes > 1 else None
    )
    sent = wire_bytes(asked.operation, asked.ranks, asked.message)
    return sent, path_of(asked.software, fabric, asked.nodes, asked.ranks, asked.operation).time(sent)


def _fabric(device: Device, ranks: int, network: Link | None) -> Fabric:
    """Of `ranks` devices on each node: their own links if these join so many, else PCIe."""
    link = device.scale_up if device.scale_up and ranks <= device.fabric_devices else device.pcie
    return Fabric(device.name, link, network)


def stages_of(asked: ServingRow, engine: Engine) -> list[Stage]:
    """Even stages on the row's devices, `DEVICES_PER_NODE` of them on a node."""
    device, tp = asked.device, asked.tensor_parallel
    nodes = math.ceil(tp / max(DEVICES_PER_NODE, device.fabric_devices if device.fabric_devices > 16 else 0))
    network = find_link("infiniband-hdr") if nodes > 1 else None
    fabric = _fabric(device, min(tp, DEVICES_PER_NODE), network)
    depth = asked.pipeline_parallel
    return [
        stage_of(
            asked.shape, kinds, engine, device=device, tensor_parallel=tp, fabric=fabric, nodes=nodes,
            expert_parallel=asked.expert_parallel, weight_bits=asked.weight_bits, kv_bits=asked.kv_bits,
            last=index == depth - 1,
        )
        for index, kinds in enumerate(even_stages(asked.shape, depth))
    ]  # fmt: skip


def even_stages(shape: ModelShape, depth: int) -> list[tuple[tuple[Layer, int], ...]]:
    """Kinds of layers of each of `depth` stages, of `even_layers`."""
    if depth == 1:
        return [shape.kinds]  # which is kept
    borders = (0, *accumulate(even_layers(shape.num_layers, depth)))
    return [shape.kinds_among(first, last) for first, last in pairwise(borders)]


def _served(asked: ServingRow, known: Coefficients, concurrency: float | None = None) -> Served:
    asked.needs("input_len", "output_len")
    assert asked.input_len is not None
    assert asked.output_len is not None
    engine = known.engines[asked.engine]
    if concurrency is not None:
        engine = replace(engine, host_row=0)  # a benchmark of all that fits: nobody is sent each token as it comes
    run = run_of(asked, known)
    requests = (concurrency or asked.batch or 0) / asked.replicas
    workload = Workload(
        max(int(asked.input_len), 1), max(int(asked.output_len), 1), max(round(requests), 1),
        float(run.get("cached", 0)), int(run.get("slots_lost", 0)), int(run.get("stream_interval", 1)),
    )  # fmt: skip
    room: float = kv_tokens(replace(asked, batch=None), engine.memory)
    if room < asked.input_len + asked.output_len:
        room = math.inf  # somebody has measured it, so it did fit: `shortage` says that it should not
    return serve(Replica(tuple(stages_of(asked, engine)), room, engine, known), workload)


def shortage(asked: ServingRow, known: Coefficients) -> str:
    """Where the planner finds no room for a single request: how short of it a device is."""
    engine = ENGINES[known.engines[asked.engine].memory]
    length = (asked.input_len or 0) + (asked.output_len or 0)
    if kv_tokens(replace(asked, batch=None), engine.name) >= length:
        return ""
    shares, load = shares_and_load(asked)
    fullest = max(rank.weights for rank in plan_memory(weighed(asked), shares, load))
    return (
        f"should not fit: {fullest / 1e9:.3g} GB of weights on a {asked.device.name} of "
        f"{asked.device.memory_bytes / 1e9:.3g} GB leave no room for a request; taken as if it did"
    )


def run_of(asked: ServingRow, known: Coefficients) -> Mapping[str, float | str]:
    """What is peculiar to a published series; see `coefficients.toml`."""
    for run in known.runs:
        lengths = (run.get("input_len", asked.input_len), run.get("output_len", asked.output_len))
        fits = lengths == (asked.input_len, asked.output_len) and asked.tensor_parallel <= float(
            run.get("max_tp", math.inf)
        )
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


def _median_gap(asked: ServingRow, known: Coefficients) -> float:
    """Between two tokens, half of the time: a plain step where fewer than half of the steps have a prompt in them,
    else one that has. Those that have take as much longer as makes the mean."""
    asked.needs("batch", "output_len")
    assert asked.output_len is not None
    served = _served(asked, known)
    engine = known.engines[asked.engine]
    together = min(
        max(served.running / max(asked.output_len, 1), 1), max(engine.chunk / max(asked.input_len or 1, 1), 1)
    )
    with_prompt = min((served.running - 1) / max(asked.output_len - 1, 1) / together, 1)
    return served.step if with_prompt < HALF else served.step + served.prompt_wait / with_prompt


def _median_first(asked: ServingRow, known: Coefficients) -> float:
    """To the first token, for half of the requests: those that did not come with the burst at the beginning, as long
    as it is the smaller part."""
    asked.needs("batch")
    served = _served(asked, known)
    whole = (served.running - 1) / 2 * served.prompt
    return served.ttft - served.burst if served.burst < HALF * whole else served.ttft


def _latency(asked: ServingRow, known: Coefficients) -> float:
    """Of a whole request: TTFT + (output - 1) · TPOT."""
    asked.needs("batch", "input_len", "output_len")
    served = _served(asked, known)
    assert asked.output_len is not None
    return served.ttft + max(asked.output_len - 1, 0) * served.tpot


def _throughput(asked: ServingRow, known: Coefficients) -> float:
    """Output tokens per second with as many requests as the engine runs at once, all replicas together."""
    served = _served(asked, known, None if asked.batch else MAX_REQUESTS * asked.replicas)
    if asked.batch:
        return served.throughput * asked.replicas
    return served.running / (served.step + served.prompt_wait) * asked.replicas


def _static_batch(asked: ServingRow, known: Coefficients) -> float:
    """A batch that begins and ends together: its prompts in one step, then a step per token."""
    asked.needs("batch", "input_len", "output_len")
    assert asked.output_len is not None
    return _static_prompt(asked, known) + (asked.output_len - 1) * _static_token(asked, known)


def _static_prompt(asked: ServingRow, known: Coefficients) -> float:
    asked.needs("batch", "input_len")
    assert asked.batch is not None
    assert asked.input_len is not None
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
    assert asked.batch is not None
    assert asked.input_len is not None
    assert asked.output_len is not None
    return fastertransformer_memory(
        weighed(asked), tensor=asked.tensor_parallel, pipeline=asked.pipeline_parallel, batch=int(asked.batch),
        input_len=int(asked.input_len), output_len=int(asked.output_len),
    ).total  # fmt: skip


KINDS: Mapping[str, Callable[[ServingRow, Coefficients], float]] = MappingProxyType(
    {
        "tpot": _tpot,
        "ttft": _ttft,
        "itl_median": _median_gap,
        "ttft_median": _median_first,
        "latency": _latency,
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
"""What can be asked → seconds, bytes, tokens, or output tokens per second of all replicas together."""

SERVED = frozenset({"tpot", "ttft", "itl_median", "ttft_median", "latency", "throughput"})
"""Kinds whose requests share the room for KV."""
