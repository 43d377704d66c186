"""How long one step of one pipeline stage takes: what it must move and compute, at the share of the limits that
engines reach.

A roofline (Williams et al., CACM 2009) per kind of work, summed over the layers:

    linear       max(weight bytes / memory, 2 · weights · rows / FLOP/s)        the corner rounded (`sharpness`)
    attention    KV bytes / memory when decoding; 4 · heads · head dim · tokens · context / FLOP/s of a prompt
    activations  what norms, rotations and activations read and write again
    communication  an all-reduce after a layer's attention and one after its MLP (`communication`)
    launches     what a layer costs however little it does; and what a step waits for the host that launches it
    head, engine   logits of the rows that sample; the scheduler, the sampler, the input of each step

All sizes are of one rank. All that is fitted is in `coefficients.toml`; the rest is the model and the datasheet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from types import MappingProxyType

from holdfast.hardware.catalogue import Device
from holdfast.planner.all_to_all import all_to_all_seconds
from holdfast.planner.coefficients import Efficiency, Engine
from holdfast.planner.communication import Fabric, Path, imbalance, path_of, wire_bytes
from holdfast.planner.shapes.shape import Attention, Layer, Matrix, ModelShape
from holdfast.planner.uneven import heads_of_fullest

SCALES = 1.06
"""Of 4-bit weights with an 8-bit scale for every 32 (MXFP4): 4.25 bits. NVFP4 and most integer formats take some more
(`shapes.quantization` has each, for checkpoints that say theirs)."""


HOST_SHARPNESS = 8
"""How suddenly a step takes as long as the host works on it: the power of the norm that stands for max()."""

BLACKWELL = ("10.", "12.")
"""Compute capabilities."""

LOGIT_PASSES = 4
"""How often the sampler reads or writes the logits: cast, temperature, softmax, choice."""

FLOPS_PER_WATT = MappingProxyType({"7.5": 0.417e12, "8.9": 1.034e12, "8.6": 0.499e12})
"""Of 16-bit products, by compute capability: V100 SXM (125e12 / 300 W, the same process), L40S (362e12 / 350 W), A40
(149.7e12 / 300 W), from the catalogue. For generations that have small cards of high peaks."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Consecutive layers on ranks of one kind of device that share each of them."""

    kinds: tuple[tuple[Layer, int], ...]
    """Different layers, and how many of each."""
    hidden: int
    head: Matrix | None
    """On the last stage."""
    device: Device
    tensor_parallel: int
    expert_parallel: int
    """Groups that share out the experts; 1: each expert is cut over all ranks; more than ranks: over other replicas'
    as well."""
    weight_bits: float
    expert_bits: float
    kv_bits: float
    path: Path | None = None
    """For the all-reduces; None: one rank."""
    next_path: Path | None = None
    """To the stage that follows; None: it is the last."""
    gather_path: Path | None = None
    """To the other replicas, where these hold the weights together: what a rank lacks comes over it in every step."""
    gathered: float = 0
    """Bytes of it."""
    dispatch_path: Path | None = None
    """To the experts of other replicas; None: they are all in this one."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What a step computes: `decodes` requests at `context` tokens, and `prompt_tokens` new tokens that look back
    on `prompt_context` tokens each in the mean."""

    decodes: float
    context: float
    prompt_tokens: float = 0
    prompt_context: float = 0
    graph: bool = True

    @property
    def rows(self) -> float:
        return self.decodes + self.prompt_tokens


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step of one stage, by cause."""

    linear: float
    attention: float
    activations: float
    communication: float
    launches: float
    head: float
    engine: float
    linear_memory: float
    """Of `linear`, the side of the roofline that is memory,"""
    linear_compute: float
    """and the one that is arithmetic."""

    @property
    def total(self) -> float:
        return (
            self.linear
            + self.attention
            + self.activations
            + self.communication
            + self.launches
            + self.head
            + self.engine
        )


PARTS = tuple(field.name for field in fields(StepTime))[:7]


def stage_of(
    shape: ModelShape,
    kinds: tuple[tuple[Layer, int], ...],
    engine: Engine,
    *,
    device: Device,
    tensor_parallel: int,
    fabric: Fabric,
    nodes: int = 1,
    expert_parallel: int = 1,
    weight_bits: float | None = None,
    kv_bits: float = 16,
    next_path: Path | None = None,
    gather_path: Path | None = None,
    gathered: float = 0,
    last: bool = True,
) -> Stage:
    """A stage with its paths looked up. `weight_bits` None: as the checkpoint has them; it holds for experts too."""
    path = path_of(engine.software, fabric, nodes, tensor_parallel, "all_reduce") if tensor_parallel > 1 else None
    plain = shape.weight_bits if weight_bits is None else weight_bits
    expert = shape.expert_bits if weight_bits is None else weight_bits
    return Stage(
        kinds=kinds,
        hidden=shape.hidden,
        head=shape.head if last else None,
        device=device,
        tensor_parallel=tensor_parallel,
        expert_parallel=expert_parallel,
        weight_bits=plain,
        expert_bits=expert,
        kv_bits=kv_bits,
        next_path=next_path,
        gather_path=gather_path,
        gathered=gathered,
        path=path,
    )


def step_time(stage: Stage, batch: StepBatch, engine: Engine, efficiency: Efficiency) -> StepTime:
    """How long `stage` takes for `batch`."""
    tp, device, rows = stage.tensor_parallel, stage.device, batch.rows
    memory = device.memory_bandwidth
    plain_flops = flops_of(device, stage.weight_bits, efficiency) * reached(engine, device)
    linear = linear_memory = linear_compute = attention = activations = 0.0
    reduced, launched = 0, 0.0
    for layer, count in stage.kinds:
        reduced += count * all_reduces(layer)
        launched += count * kernels(layer)
        weights, macs = plain_work(layer, tp, rows)
        side_memory = weights * stored_bits(stage.weight_bits) / 8 / read_rate(device, stage.weight_bits, efficiency)
        side_compute = 2 * macs / plain_flops
        if layer.experts is not None:
            expert_memory, expert_compute = expert_work(stage, layer, rows, efficiency)
            side_memory += expert_memory
            side_compute += expert_compute / reached(engine, device)
        linear += count * rounded_max(side_memory, side_compute, efficiency.sharpness)
        linear_memory += count * side_memory
        linear_compute += count * side_compute
        attention += count * _attention(stage, layer, batch, engine, efficiency)
        activations += count * rows * 2 * efficiency.passes * activation_numbers(layer, stage.hidden, tp) / memory
    communication = 0.0
    if stage.path is not None:
        sent = wire_bytes("all_reduce", tp, rows * stage.hidden * 2)
        communication = reduced * efficiency.all_reduce * stage.path.time(sent)
    if stage.gather_path is not None:
        communication += stage.gather_path.time(stage.gathered)
    if stage.dispatch_path is not None:
        communication += all_to_all_seconds(
            stage.dispatch_path, stage.kinds, stage.hidden, rows, tensor=tp, ranks=stage.expert_parallel
        )
    if stage.next_path is not None:
        communication += stage.next_path.time(rows * stage.hidden * 2)
    head = 0.0
    if stage.head is not None:
        # Every row that decodes samples, and of a prompt the last one; the logits are fp32.
        sampled = batch.decodes + (batch.prompt_tokens > 0)
        read = stage.head.params * 2 / tp / (memory * efficiency.memory)
        head = rounded_max(read, read * sampled / rows_at_corner(device, efficiency), efficiency.sharpness)
        head += sampled * stage.head.outputs * 4 * LOGIT_PASSES / tp / memory
    launches = engine.layer * launched
    busy = linear + attention + activations + communication + head + launches
    if host := host_time(stage, batch, engine):
        launches += rounded_max(busy, host, HOST_SHARPNESS) - busy
    return StepTime(
        linear,
        attention,
        activations,
        communication,
        launches,
        head,
        engine.step + engine.row * batch.decodes,
        linear_memory,
        linear_compute,
    )


def host_time(stage: Stage, batch: StepBatch, engine: Engine) -> float:
    """Seconds that the host works on a step while the device does: it launches kernel after kernel, unless a graph
    does, and keeps account of requests where the engine lets that overlap. No step takes less."""
    seconds = engine.host_row * batch.decodes
    if not batch.graph or batch.decodes > engine.graph_rows:
        seconds += engine.layer_eager * sum(count * kernels(layer) for layer, count in stage.kinds)
    return seconds


def rows_at_corner(device: Device, efficiency: Efficiency) -> float:
    """Rows of 16-bit weights at which reading them takes as long as multiplying with them."""
    return flops_of(device, 16, efficiency) / (device.memory_bandwidth * efficiency.memory)


def flops_of(device: Device, weight_bits: float, efficiency: Efficiency) -> float:
    """FLOP/s reached on weights of so many bits; where the device has no such instructions, on the next larger ones:
    32-bit weights, and all weights of a device that has nothing else, at the rate of float32."""
    names = {4: ("fp4",), 8: ("fp8",), 16: ("bf16", "fp16")}
    for bits in (4, 8, 16):
        if weight_bits <= bits * 1.2:
            rates = [device.flops[name] for name in names[bits] if name in device.flops]
            if rates:
                return max(rates) * power_limit(device) * efficiency.matmul[bits]
    return device.flops["fp32"] * efficiency.matmul[16]


def reached(engine: Engine, device: Device) -> float:
    """Of what kernels reach, what those of an engine do: less on devices that were new when it was measured."""
    return engine.matmul * (engine.matmul_blackwell if device.capability.startswith(BLACKWELL) else 1)


def read_rate(device: Device, weight_bits: float, efficiency: Efficiency) -> float:
    """Bytes of weights per second: less where they are multiplied in 4 bits as they are, in tiles for many rows."""
    native = weight_bits <= 4.8 and "fp4" in device.flops
    return device.memory_bandwidth * (efficiency.memory_4bit if native else efficiency.memory)


def power_limit(device: Device) -> float:
    """Share of its peak FLOP/s that a device has the power for, going on the FLOP/s per watt that the largest of its
    generation gets: a T4 has half of a V100's peak at a quarter of its power."""
    best = FLOPS_PER_WATT.get(device.capability)
    peak = max(device.flops.get("bf16", 0), device.flops.get("fp16", 0))
    return min(1, best * device.tdp / peak) if best and peak else 1


def stored_bits(weight_bits: float) -> float:
    """Bits a weight takes with its scales; a bare 4 says nothing of them."""
    return weight_bits * SCALES if weight_bits == 4 else weight_bits


def rounded_max(a: float, b: float, power: float) -> float:
    """The larger of two times, more where they are alike: (a^p + b^p)^(1/p)."""
    larger, smaller = max(a, b), min(a, b)
    return larger * float((1 + (smaller / larger) ** power) ** (1 / power))


def plain_work(layer: Layer, tp: int, rows: float) -> tuple[float, float]:
    """Weights that a rank reads, and multiply-adds that it does, of a layer's plain matrices."""
    weights = 0.0
    for matrix in layer.matrices:
        weights += matrix.params if matrix.cut == "replicated" else matrix.params / tp
    return weights, weights * rows


def expert_work(stage: Stage, layer: Layer, rows: float, efficiency: Efficiency) -> tuple[float, float]:
    """Seconds by memory and by arithmetic of the routed experts.

    Of E experts, `rows` tokens that choose k each by chance touch E·(1 - (1 - k/E)^rows) (coupon collector). Groups
    of experts that are more than the stage's ranks lie in other replicas, whose tokens come to them too (DeepSeek-V3,
    arXiv:2412.19437, section 3.4); that way itself is `Stage.dispatch_path`.
    """
    experts = layer.experts
    assert experts is not None
    replicas = max(stage.expert_parallel / stage.tensor_parallel, 1)
    rows *= replicas
    chosen = experts.num_chosen / experts.num_experts
    touched = experts.num_experts * (1 - (1 - chosen) ** rows)
    each = experts.params_each / (stage.tensor_parallel * replicas)
    routed = rows * experts.num_chosen
    busiest = imbalance(experts.num_experts, stage.expert_parallel, routed)
    read = min(touched * busiest, experts.num_experts) * each * stored_bits(stage.expert_bits) / 8
    macs = routed * each * busiest
    flops = flops_of(stage.device, stage.expert_bits, efficiency)
    return read / read_rate(stage.device, stage.expert_bits, efficiency), 2 * macs / flops


def _attention(stage: Stage, layer: Layer, batch: StepBatch, engine: Engine, efficiency: Efficiency) -> float:
    attention = layer.attention
    if attention is None:
        return 0.0
    tp, device = stage.tensor_parallel, stage.device
    seconds = 0.0
    if batch.decodes:
        numbers = attention.numbers_read(round(batch.context)) / kv_parts(attention, tp)
        if attention.kind != "latent":
            numbers *= min(attention.num_heads / attention.num_kv_heads, engine.group_reads)
        seconds += batch.decodes * numbers * stage.kv_bits / 8 / (device.memory_bandwidth * efficiency.kv)
    if batch.prompt_tokens and attention.kind != "linear":
        seen = attention.tokens_read(batch.prompt_context)
        width = attention.num_heads * (attention.head_dim + attention.value_dim)
        flops = 2 * width * batch.prompt_tokens * seen * heads_of_fullest(attention, tp)
        seconds += flops / (flops_of(device, 16, efficiency) / efficiency.matmul[16] * efficiency.attention)
    return seconds


def kv_parts(attention: Attention, tp: int) -> float:
    """Into how many parts ranks cut what they read of keys and values. Heads are whole: of 8 KV heads on 6 ranks
    some read 2, as of 4 ranks all do."""
    heads = attention.num_kv_heads
    return 1 if attention.kind == "latent" else heads / math.ceil(heads / tp)


def all_reduces(layer: Layer) -> int:
    """Of a layer: one after what looks at other tokens and one after the MLP or the experts, where it has both."""
    rows = [matrix.name for matrix in layer.matrices if matrix.cut == "row"]
    mixes = layer.attention is not None
    others = len(rows) - mixes > 0 or layer.experts is not None
    return mixes + others


def kernels(layer: Layer) -> float:
    """Kernels of a layer against those of a dense one, which has four products: routed experts bring their products,
    and the choice, the sorting and the adding up of rows."""
    routed = len(layer.experts.matrices) + 3 if layer.experts else 0
    return (len(layer.matrices) + routed) / 4


def activation_numbers(layer: Layer, hidden: int, tp: int) -> float:
    """Numbers of a token that a layer's products take and give, per rank."""
    wide = sum(matrix.outputs / tp for matrix in layer.matrices if matrix.cut == "column")
    if layer.experts is not None:
        wide += layer.experts.num_chosen * sum(m.outputs / tp for m in layer.experts.matrices if m.cut == "column")
    return 4 * hidden + wide
