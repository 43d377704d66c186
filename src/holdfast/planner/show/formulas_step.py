"""The formulas of one step of one stage; see `formulas`, and `timing` for where they are from."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.planner.all_to_all import all_to_all
from holdfast.planner.coefficients import Efficiency, Engine
from holdfast.planner.communication import Path, imbalance, wire_bytes
from holdfast.planner.serving import Replica
from holdfast.planner.shapes.shape import Layer
from holdfast.planner.show.lines import Line, bytes_of, flops_of, number, rate_of, seconds_of
from holdfast.planner.timing import (
    HOST_SHARPNESS,
    LOGIT_PASSES,
    Stage,
    StepBatch,
    activation_numbers,
    all_reduces,
    host_time,
    kernels,
    kv_parts,
    plain_work,
    reached,
    read_rate,
    rounded_max,
    rows_at_corner,
    stored_bits,
)
from holdfast.planner.timing import flops_of as flops_reached
from holdfast.planner.uneven import heads_of_fullest

NOTHING = 1e-9
"""Seconds that are not worth a line."""


@dataclass(frozen=True, slots=True)
class _Step:
    """What all formulas of a step need."""

    section: str
    stage: Stage
    batch: StepBatch
    efficiency: Efficiency
    engine: Engine


def step_lines(section: str, stage: Stage, batch: StepBatch, replica: Replica) -> list[Line]:
    """What one step of `stage` takes, part by part, and their sum."""
    efficiency, engine = replica.known.efficiency, replica.engine
    step = _Step(section, stage, batch, efficiency, engine)
    lines = []
    for index, (layer, layers) in enumerate(stage.kinds, 1):
        which = f" {index}" if len(stage.kinds) > 1 else ""
        lines += _products(step, layer, layers, which)
        lines += _attention(step, layer, layers, which)
        lines.append(_activations(step, layer, layers, which))
    lines += _communication(section, stage, batch, efficiency)
    launched = sum(layers * kernels(layer) for layer, layers in stage.kinds)
    overhead = launched * engine.layer
    lines.append(
        Line(
            section, "layer overhead", "layers × their kernels / a dense one's × what that takes at least",
            f"{number(launched)} · {seconds_of(engine.layer)}",
            overhead, seconds_of(overhead),
        )
    )  # fmt: skip
    lines += _logits(section, stage, batch, efficiency)
    lines += _host(section, stage, batch, engine, sum(line.value for line in lines if line.name[0] != "·"))
    scheduler = engine.step + engine.row * batch.decodes
    lines.append(
        Line(
            section, "scheduler", "a step + requests × each",
            f"{seconds_of(engine.step)} + {number(batch.decodes)} · {seconds_of(engine.row)}", scheduler,
            seconds_of(scheduler),
        )
    )  # fmt: skip
    counted = [line for line in lines if not line.name.startswith("·")]
    total = sum(line.value for line in counted)
    lines.append(
        Line(
            section, "step", "the sum of its parts", " + ".join(seconds_of(line.value) for line in counted), total,
            seconds_of(total),
        )
    )  # fmt: skip
    return lines


def _products(step: _Step, layer: Layer, layers: int, which: str) -> list[Line]:
    """Both sides of the roofline of a layer's products, and what they make together. Names that begin with a dot are
    not times of their own in the sum."""
    section, stage, batch, efficiency = step.section, step.stage, step.batch, step.efficiency
    weights, macs = plain_work(layer, stage.tensor_parallel, batch.rows)
    each = stored_bits(stage.weight_bits) / 8
    rate = read_rate(stage.device, stage.weight_bits, efficiency)
    flops = flops_reached(stage.device, stage.weight_bits, efficiency) * reached(step.engine, stage.device)
    read, multiplied = weights * each / rate, 2 * macs / flops
    found = [
        Line(
            section, f"· reading a layer{which}", "weights of the rank × bytes / bandwidth reached",
            f"{number(weights)} · {number(each)} B / {rate_of(rate)}",
            read, seconds_of(read),
        ),
        Line(
            section, f"· multiplying with it{which}", "2 × weights × rows / FLOP/s reached",
            f"2 · {number(weights)} · {number(batch.rows)} / {flops_of(flops)}", multiplied, seconds_of(multiplied),
        ),
    ]  # fmt: skip
    if layer.experts is not None:
        experts = _experts(step, layer, which)
        found += experts
        read += experts[-2].value
        multiplied += experts[-1].value
    power = efficiency.sharpness
    total = layers * rounded_max(read, multiplied, power)
    found.append(
        Line(
            section, f"products{which}", "layers × (reading^p + multiplying^p)^(1/p)",
            f"{layers} · ({seconds_of(read)}^{number(power)} + {seconds_of(multiplied)}^{number(power)})"
            f"^(1 / {number(power)})",
            total, seconds_of(total),
        )
    )  # fmt: skip
    return found


def _experts(step: _Step, layer: Layer, which: str) -> list[Line]:
    """Experts that some token of a step chooses, those of the busiest rank; what reading and multiplying take."""
    section, stage, batch, efficiency = step.section, step.stage, step.batch, step.efficiency
    experts = layer.experts
    assert experts is not None
    replicas = max(stage.expert_parallel // stage.tensor_parallel, 1)
    rows, count, chosen = batch.rows * replicas, experts.num_experts, experts.num_chosen
    ranks = stage.tensor_parallel * replicas
    touched = count * (1 - (1 - chosen / count) ** rows)
    each = experts.params_each / ranks
    busiest = imbalance(count, stage.expert_parallel, rows * chosen)
    held = min(touched * busiest, count)
    size, rate = stored_bits(stage.expert_bits) / 8, read_rate(stage.device, stage.expert_bits, efficiency)
    flops = flops_reached(stage.device, stage.expert_bits, efficiency) * reached(step.engine, stage.device)
    read = held * each * size / rate
    multiplied = 2 * rows * chosen * each * busiest / flops
    return [
        Line(
            section, f"· experts touched{which}", "experts × (1 − (1 − chosen / experts)^rows)",
            f"{count} · (1 − (1 − {chosen} / {count})^{number(rows)})", touched, f"{touched:.4g}",
        ),
        Line(
            section, f"· the busiest rank's{which}", "min(touched × imbalance, experts)",
            f"min({touched:.4g} · {number(busiest)}, {count})", held, f"{held:.4g}",
        ),
        Line(
            section, f"· reading experts{which}", "touched × an expert / ranks × bytes / bandwidth reached",
            f"{held:.4g} · {number(experts.params_each)} / {ranks} · {number(size)} B "
            f"/ {rate_of(rate)}",
            read, seconds_of(read),
        ),
        Line(
            section, f"· multiplying with them{which}", "2 × rows × chosen × an expert / ranks × imbalance / FLOP/s",
            f"2 · {number(rows)} · {chosen} · {number(experts.params_each)} / {ranks} "
            f"· {number(busiest)} / {flops_of(flops)}",
            multiplied, seconds_of(multiplied),
        ),
    ]  # fmt: skip


def _attention(step: _Step, layer: Layer, layers: int, which: str) -> list[Line]:
    section, stage, batch, efficiency = step.section, step.stage, step.batch, step.efficiency
    attention, found = layer.attention, []
    if attention is None:
        return []
    cut, most = kv_parts(attention, stage.tensor_parallel), heads_of_fullest(attention, stage.tensor_parallel)
    if batch.decodes:
        numbers, each = attention.numbers_read(round(batch.context)), stage.kv_bits / 8
        rate = stage.device.memory_bandwidth
        seconds = layers * batch.decodes * numbers / cut * each / (rate * efficiency.kv)
        found.append(
            Line(
                section, f"reading KV{which}",
                "layers × requests × numbers read of a sequence / parts × bytes / (bandwidth × share)",
                f"{layers} · {number(batch.decodes)} · {number(numbers)} / {number(cut)} · {number(each)} B "
                f"/ ({rate_of(rate)} · {number(efficiency.kv)})",
                seconds, seconds_of(seconds),
            )
        )  # fmt: skip
    if batch.prompt_tokens and attention.kind != "linear":
        seen = attention.tokens_read(batch.prompt_context)
        width = attention.num_heads * (attention.head_dim + attention.value_dim)
        rate = flops_reached(stage.device, 16, efficiency) / efficiency.matmul[16]
        seconds = layers * 2 * width * batch.prompt_tokens * seen * most / (rate * efficiency.attention)
        found.append(
            Line(
                section, f"attention of the prompt{which}",
                "layers × 2 × heads × (key + value) × tokens × seen × the fullest rank's part / (FLOP/s × share)",
                f"{layers} · 2 · {attention.num_heads} · ({attention.head_dim} + {attention.value_dim}) · "
                f"{number(batch.prompt_tokens)} · {number(seen)} · {number(most)} / ({flops_of(rate)} · "
                f"{number(efficiency.attention)})",
                seconds, seconds_of(seconds),
            )
        )  # fmt: skip
    return found


def _activations(step: _Step, layer: Layer, layers: int, which: str) -> Line:
    section, stage, batch, efficiency = step.section, step.stage, step.batch, step.efficiency
    numbers = activation_numbers(layer, stage.hidden, stage.tensor_parallel)
    rate = stage.device.memory_bandwidth
    seconds = layers * batch.rows * 2 * efficiency.passes * numbers / rate
    return Line(
        section, f"activations{which}", "layers × rows × 2 B × passes × numbers / bandwidth",
        f"{layers} · {number(batch.rows)} · 2 B · {number(efficiency.passes)} · {number(numbers)} / {rate_of(rate)}",
        seconds, seconds_of(seconds),
    )  # fmt: skip


def _communication(section: str, stage: Stage, batch: StepBatch, efficiency: Efficiency) -> list[Line]:
    found = []
    message = batch.rows * stage.hidden * 2
    path = stage.path
    if path is not None:
        ranks, times = stage.tensor_parallel, sum(layers * all_reduces(layer) for layer, layers in stage.kinds)
        sent = wire_bytes("all_reduce", ranks, message)
        found += [
            Line(
                section, "· message", "rows × hidden × 2 B", f"{number(batch.rows)} · {stage.hidden} · 2 B", message,
                bytes_of(message),
            ),
            Line(
                section, "· sent by each rank", "2 × (ranks − 1) / ranks × message",
                f"2 · ({ranks} − 1) / {ranks} · {bytes_of(message)}", sent, bytes_of(sent),
            ),
            _one(section, "· one all-reduce", path, sent),
        ]  # fmt: skip
        seconds = times * efficiency.all_reduce * path.time(sent)
        found.append(
            Line(
                section, "all-reduces", "all-reduces of the layers × share not hidden × one",
                f"{times} · {number(efficiency.all_reduce)} · {seconds_of(path.time(sent))}", seconds,
                seconds_of(seconds),
            )
        )  # fmt: skip
    if stage.dispatch_path is not None:
        for layer, layers in stage.kinds:
            found += _all_to_alls(section, stage, batch, layer, layers)
    if stage.gather_path is not None:
        found.append(_one(section, "gathered weights", stage.gather_path, stage.gathered))
    if stage.next_path is not None:
        found.append(_one(section, "to the next stage", stage.next_path, message))
    return found


def _host(section: str, stage: Stage, batch: StepBatch, engine: Engine, busy: float) -> list[Line]:
    """What a step takes longer because the host, which launches it, is slower than the device, busy for so long."""
    host = host_time(stage, batch, engine)
    if not host:
        return []
    longer = rounded_max(busy, host, HOST_SHARPNESS) - busy
    if longer < NOTHING:
        return []
    return [
        Line(
            section, "waiting for the host", "(device^p + host^p)^(1/p) − device",
            f"({seconds_of(busy)}^{HOST_SHARPNESS} + {seconds_of(host)}^{HOST_SHARPNESS})^(1 / {HOST_SHARPNESS}) "
            f"− {seconds_of(busy)}",
            longer, seconds_of(longer),
        )
    ]  # fmt: skip


def _one(section: str, name: str, path: Path, sent: float) -> Line:
    """The protocol that is faster for so many bytes; where both are about as fast, the norm that joins them."""
    lines = [
        f"{seconds_of(latency)} + {bytes_of(sent)} / {rate_of(rate)}"
        for latency, rate in ((path.latency_low, path.rate_low), (path.latency_high, path.rate_high))
    ]
    seconds = path.time(sent)
    return Line(
        section, name, "min(latency + sent / rate, of two protocols), the corner rounded",
        f"min({lines[0]}, {lines[1]})", seconds, seconds_of(seconds),
    )  # fmt: skip


def _all_to_alls(section: str, stage: Stage, batch: StepBatch, layer: Layer, layers: int) -> list[Line]:
    """Rows to the experts of all replicas and back."""
    experts, path, ranks, tensor = layer.experts, stage.dispatch_path, stage.expert_parallel, stage.tensor_parallel
    if experts is None or path is None:
        return []
    one = all_to_all(experts, stage.hidden, batch.rows, tensor=tensor, ranks=ranks)
    seconds = 2 * layers * path.time(one.sent)
    return [
        Line(
            section, "· rows to experts",
            "rows / ranks of a replica × ranks of all · (1 − (1 − 1 / ranks)^chosen) × (ranks − 1) / ranks × hidden "
            "× 2 B × imbalance",
            f"{number(batch.rows)} / {tensor} · {ranks} · (1 − (1 − 1 / {ranks})^{experts.num_chosen}) · "
            f"({ranks} − 1) / {ranks} · {stage.hidden} · 2 B · {number(one.imbalance)}",
            one.sent, bytes_of(one.sent),
        ),
        _one(section, "· one all-to-all", path, one.sent),
        Line(
            section, "all-to-alls", "layers × there and back × one",
            f"{layers} · 2 · {seconds_of(path.time(one.sent))}", seconds, seconds_of(seconds),
        ),
    ]  # fmt: skip


def _logits(section: str, stage: Stage, batch: StepBatch, efficiency: Efficiency) -> list[Line]:
    if stage.head is None:
        return []
    device, tensor, power = stage.device, stage.tensor_parallel, efficiency.sharpness
    sampled = batch.decodes + (batch.prompt_tokens > 0)
    rate = device.memory_bandwidth
    read = stage.head.params * 2 / tensor / (rate * efficiency.memory)
    corner = rows_at_corner(device, efficiency)
    product = rounded_max(read, read * sampled / corner, power)
    sampling = sampled * stage.head.outputs * 4 * LOGIT_PASSES / tensor / rate
    return [
        Line(
            section, "· reading the head", "numbers × 2 B / ranks / (bandwidth × share)",
            f"{number(stage.head.params)} · 2 B / {tensor} / ({rate_of(rate)} · {number(efficiency.memory)})", read,
            seconds_of(read),
        ),
        Line(
            section, "head", "reading × (1 + (rows / rows at the roofline's corner)^p)^(1/p)",
            f"{seconds_of(read)} · (1 + ({number(sampled)} / {number(corner)})^{number(power)})"
            f"^(1 / {number(power)})",
            product, seconds_of(product),
        ),
        Line(
            section, "sampling", "rows × vocabulary × 4 B × passes / ranks / bandwidth",
            f"{number(sampled)} · {stage.head.outputs} · 4 B · {LOGIT_PASSES} / {tensor} / {rate_of(rate)}", sampling,
            seconds_of(sampling),
        ),
    ]  # fmt: skip
