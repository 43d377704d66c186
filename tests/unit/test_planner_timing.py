"""Each part of a step's time against a calculation by hand, on a device and an engine of round numbers."""

from __future__ import annotations

from dataclasses import fields, replace
from types import MappingProxyType

import pytest

from holdfast.hardware.catalogue import find_device
from holdfast.planner.coefficients import Efficiency, Engine, coefficients
from holdfast.planner.communication import Path
from holdfast.planner.shapes.presets import find_model
from holdfast.planner.shapes.shape import Attention, Experts, Layer, Matrix
from holdfast.planner.timing import (
    PARTS,
    Stage,
    StepBatch,
    StepTime,
    flops_of,
    power_limit,
    stage_of,
    step_time,
    stored_bits,
)

DEVICE = replace(
    find_device("A100-80GB"),
    memory_bandwidth=1e12,
    flops=MappingProxyType({"bf16": 100e12, "fp8": 200e12}),
    capability="9.0",
)
"""1 TB/s, 100 TFLOP/s: at 2 bytes a weight, as long to read as to multiply with 100 rows."""
EFFICIENCY = Efficiency(
    memory=1, memory_4bit=0.5, kv=1, matmul={16: 1, 8: 1, 4: 1}, attention=1, passes=0, sharpness=1000, all_reduce=1
)
"""All limits are reached; the corner of the roofline is sharp."""
ENGINE = replace(
    coefficients().engines["vllm"], matmul=1, layer=0, layer_eager=0, step=0, row=0, mixing=1, first_token=0
)
MHA = Attention("softmax", num_heads=8, num_kv_heads=8, head_dim=100, value_dim=100)
MATRICES = (Matrix("up", 1000, 2000, "column"), Matrix("down", 2000, 1000, "row"))
"""4e6 weights: 8 µs to read."""


def stage(layer: Layer, count: int = 1, tp: int = 1, **changes) -> Stage:
    plain = Stage(((layer, count),), 1000, None, DEVICE, tp, 1, 16, 16, 16)
    return replace(plain, **changes)


def time(some: Stage, batch: StepBatch, engine: Engine = ENGINE, efficiency: Efficiency = EFFICIENCY) -> StepTime:
    return step_time(some, batch, engine, efficiency)


def test_the_parts_are_all_there_is() -> None:
    step = time(stage(Layer(MHA, MATRICES)), StepBatch(8, 500))
    assert step.total == pytest.approx(sum(getattr(step, part) for part in PARTS))
    assert {field.name for field in fields(StepTime)} - set(PARTS) == {"linear_memory", "linear_compute"}


@pytest.mark.parametrize(("rows", "seconds"), [(1, 8e-6), (50, 8e-6), (200, 16e-6), (1000, 80e-6)])
def test_linear_is_the_longer_of_reading_and_multiplying(rows: int, seconds: float) -> None:
    """4e6 weights: 8e6 bytes / 1e12 = 8 µs; 2 · 4e6 · rows / 100e12 = 0.08 µs a row."""
    assert time(stage(Layer(None, MATRICES)), StepBatch(rows, 0)).linear == pytest.approx(seconds, rel=1e-3)


def test_tensor_parallelism_cuts_linear_but_not_what_is_replicated() -> None:
    """Of four ranks each reads 1e6 weights of the plain matrices; a router of 1000 × 500 is read by all of them."""
    layer = Layer(None, (*MATRICES, Matrix("router", 1000, 500, "replicated")))
    assert time(stage(layer, tp=4), StepBatch(1, 0)).linear == pytest.approx((1e6 + 0.5e6) * 2 / 1e12, rel=1e-3)


def test_weights_of_8_bits_are_read_in_half_the_time_and_multiplied_at_the_rate_of_8_bits() -> None:
    half = stage(Layer(None, MATRICES), weight_bits=8)
    assert time(half, StepBatch(1, 0)).linear == pytest.approx(4e-6, rel=1e-3)
    assert time(half, StepBatch(1000, 0)).linear == pytest.approx(40e-6, rel=1e-3)


def test_layers_add_up() -> None:
    one, ten = (time(stage(Layer(MHA, MATRICES), count), StepBatch(4, 100)) for count in (1, 10))
    assert ten.linear == pytest.approx(10 * one.linear)
    assert ten.attention == pytest.approx(10 * one.attention)


def test_a_decode_reads_the_keys_and_values_of_its_context() -> None:
    """16 requests · 1000 tokens · 8 heads · 200 numbers · 2 bytes / 1e12 = 51.2 µs; half in 8 bits; a quarter of the
    heads on each of four ranks."""
    layer = Layer(MHA, MATRICES)
    assert time(stage(layer), StepBatch(16, 1000)).attention == pytest.approx(51.2e-6)
    assert time(stage(layer, kv_bits=8), StepBatch(16, 1000)).attention == pytest.approx(25.6e-6)
    assert time(stage(layer, tp=4), StepBatch(16, 1000)).attention == pytest.approx(12.8e-6)


def test_kv_heads_fewer_than_ranks_are_read_by_several() -> None:
    """2 KV heads on 8 ranks: each reads one."""
    layer = Layer(replace(MHA, num_kv_heads=2), MATRICES)
    assert time(stage(layer, tp=8), StepBatch(1, 1000)).attention == pytest.approx(1000 * 200 * 2 / 1e12)


def test_a_window_is_all_that_is_read() -> None:
    windowed = Layer(replace(MHA, window=100), MATRICES)
    assert time(stage(windowed), StepBatch(16, 1000)).attention == pytest.approx(5.12e-6)
    assert time(stage(windowed), StepBatch(16, 50)).attention == pytest.approx(2.56e-6)
    # A prompt's tokens look back on a window at most.
    prompt = [time(stage(windowed), StepBatch(0, 0, 1000, context)).attention for context in (100, 500)]
    assert prompt[0] == prompt[1]


def test_all_ranks_read_a_latent_whole() -> None:
    """MLA: 576 numbers a token that no cut of heads makes fewer."""
    layer = Layer(Attention("latent", 128, 128, 192, 128, latent_dim=576), MATRICES)
    for tp in (1, 8):
        assert time(stage(layer, tp=tp), StepBatch(10, 1000)).attention == pytest.approx(10 * 1000 * 576 * 2 / 1e12)


def test_sparse_attention_reads_the_index_of_all_tokens_and_the_latents_of_some() -> None:
    """128 index numbers of 10,000 tokens, 576 numbers of 2,000; of 1,000 tokens all."""
    sparse = Attention("latent", 128, 128, 192, 128, latent_dim=576, index_dim=128, num_read=2000)
    layer = Layer(sparse, MATRICES)
    read = 10_000 * 128 + 2000 * 576
    assert time(stage(layer), StepBatch(10, 10_000)).attention == pytest.approx(10 * read * 2 / 1e12)
    assert time(stage(layer), StepBatch(10, 1000)).attention == pytest.approx(10 * 1000 * 704 * 2 / 1e12)
    prompt = [time(stage(layer), StepBatch(0, 0, 1000, context)).attention for context in (2000, 50_000)]
    assert prompt[0] == prompt[1]


def test_a_state_costs_the_same_at_every_context() -> None:
    layer = Layer(replace(MHA, kind="linear", state_numbers=10_000), MATRICES)
    short, long = (time(stage(layer), StepBatch(1, context)).attention for context in (10, 100_000))
    assert short == long == pytest.approx(10_000 * 2 / 1e12)


def test_a_prompt_attends_with_four_flops_a_head_dim_token_and_context() -> None:
    """2 · 8 heads · (100 + 100) · 1000 tokens · 500 context / 100e12 = 16 µs."""
    step = time(stage(Layer(MHA, MATRICES)), StepBatch(0, 0, 1000, 500))
    assert step.attention == pytest.approx(2 * 8 * 200 * 1000 * 500 / 100e12)


@pytest.mark.parametrize(
    ("rows", "touched"), [(1, 2), (2, 8 * (1 - 0.75**2)), (8, 8 * (1 - 0.75**8)), (1000, 8)], ids=str
)
def test_experts_that_are_touched_are_read(rows: int, touched: float) -> None:
    """8 experts of 1e6 weights, 2 of them chosen: 8 · (1 - (1 - 2/8)^rows) are read."""
    expert = (Matrix("up", 1000, 500, "column"), Matrix("down", 500, 1000, "row"))
    step = time(stage(Layer(None, (), Experts(8, 2, expert))), StepBatch(rows, 0))
    assert step.linear_memory == pytest.approx(touched * 1e6 * 2 / 1e12)
    assert step.linear_compute == pytest.approx(2 * rows * 2 * 1e6 / 100e12)


def test_experts_spread_over_replicas_are_read_by_few_and_multiplied_for_all() -> None:
    """8 experts over 8 replicas of one rank: each reads the one it holds, and has an eighth of the pairs of 8 · 4
    tokens, as many as its own tokens make; the busiest more."""
    expert = (Matrix("up", 1000, 500, "column"), Matrix("down", 500, 1000, "row"))
    layer = Layer(None, (), Experts(8, 8, expert))
    alone, spread = (time(stage(layer, expert_parallel=groups), StepBatch(4, 0)) for groups in (1, 8))
    assert spread.linear_memory == pytest.approx(1e6 * 2 / 1e12)
    assert alone.linear_memory == pytest.approx(8e6 * 2 / 1e12)
    assert alone.linear_compute < spread.linear_compute < 1.5 * alone.linear_compute


def test_an_all_reduce_for_attention_and_one_for_the_mlp() -> None:
    """10 layers, rows · 1000 · 2 bytes, of which a rank of four sends 1.5 times: 20 · (10 µs + 16 · 3000 / 1e9)."""
    path = Path(10e-6, 1e9, 1, 1e9)
    out = Matrix("attention output", 800, 1000, "row")
    step = time(stage(Layer(MHA, (out, *MATRICES)), 10, tp=4, path=path), StepBatch(16, 0))
    assert step.communication == pytest.approx(20 * (10e-6 + 16 * 3000 / 1e9))
    alone = time(stage(Layer(None, MATRICES), 10, tp=4, path=path), StepBatch(16, 0))
    assert alone.communication == pytest.approx(step.communication / 2)
    assert time(stage(Layer(None, MATRICES), 10), StepBatch(16, 0)).communication == 0


def test_a_step_takes_no_less_than_the_host_takes_to_launch_it() -> None:
    """Two products: half a dense layer's kernels, 10 times. The device is busy for 10 · 8 µs and 100 µs."""
    engine = replace(ENGINE, layer=20e-6, layer_eager=1000e-6)
    graph, eager = (
        time(stage(Layer(None, MATRICES), 10), StepBatch(1, 0, graph=one), engine) for one in (True, False)
    )
    assert graph.launches == pytest.approx(100e-6)
    assert eager.total == pytest.approx(5000e-6)
    assert eager.linear == graph.linear
    quick = time(stage(Layer(None, MATRICES), 10), StepBatch(1, 0, graph=False), replace(engine, layer_eager=1e-6))
    assert quick.total == pytest.approx(graph.total)


def test_more_requests_than_graphs_were_captured_for_are_launched_one_by_one() -> None:
    engine = replace(ENGINE, layer_eager=1000e-6, graph_rows=8)
    most, more = (time(stage(Layer(None, MATRICES), 10), StepBatch(rows, 0), engine) for rows in (8, 9))
    assert most.launches == 0
    assert more.total == pytest.approx(5000e-6)


def test_the_host_keeps_account_of_requests_while_the_device_works() -> None:
    engine = replace(ENGINE, host_row=100e-6)
    assert time(stage(Layer(None, MATRICES)), StepBatch(32, 0), engine).total == pytest.approx(3200e-6)
    slow = stage(Layer(None, MATRICES), 10_000)
    assert time(slow, StepBatch(32, 0), engine).total == pytest.approx(time(slow, StepBatch(32, 0)).total)


def test_four_bit_weights_that_are_multiplied_as_such_are_read_more_slowly() -> None:
    native = replace(DEVICE, flops=MappingProxyType({**DEVICE.flops, "fp4": 400e12}))
    widened, as_such = (
        time(stage(Layer(None, MATRICES), device=some, weight_bits=4.5), StepBatch(1, 0)).linear_memory
        for some in (DEVICE, native)
    )
    assert as_such == pytest.approx(2 * widened)


def test_keys_that_query_heads_share_are_read_again_by_engines_that_do_so() -> None:
    grouped = Layer(Attention("softmax", num_heads=8, num_kv_heads=2, head_dim=100, value_dim=100), MATRICES)
    once, thrice, most = (
        time(stage(grouped), StepBatch(4, 500), replace(ENGINE, group_reads=times)).attention for times in (1, 3, 100)
    )
    assert (thrice, most) == pytest.approx((3 * once, 4 * once))


def test_kernels_of_an_engine_may_reach_less_on_blackwell() -> None:
    engine = replace(ENGINE, matmul_blackwell=0.5)
    new = replace(DEVICE, capability="10.0")
    here, there = (time(stage(Layer(None, MATRICES), device=some), StepBatch(8, 0), engine) for some in (DEVICE, new))
    assert there.linear_compute == pytest.approx(2 * here.linear_compute)


def test_the_engine_costs_its_step_and_its_rows() -> None:
    engine = replace(ENGINE, step=1e-3, row=1e-6)
    assert time(stage(Layer(None, MATRICES)), StepBatch(32, 0), engine).engine == pytest.approx(1.032e-3)


def test_the_head_is_read_once_and_the_logits_four_times() -> None:
    """1000 × 50,000 weights: 100 µs; 2 rows of 50,000 float32, four passes: 1.6 µs."""
    some = stage(Layer(None, MATRICES), head=Matrix("head", 1000, 50_000, "column"))
    assert time(some, StepBatch(2, 0)).head == pytest.approx(101.6e-6)
    # Of a prompt one row alone is asked for its logits.
    assert time(some, StepBatch(0, 0, 5000, 100)).head == pytest.approx(100.8e-6)


def test_activations_are_read_and_written_as_often_as_is_said() -> None:
    """4 · 1000 numbers and the 2000 of the up product, 2 bytes, 3 times, 10 rows / 1e12."""
    step = time(stage(Layer(None, MATRICES)), StepBatch(10, 0), efficiency=replace(EFFICIENCY, passes=3))
    assert step.activations == pytest.approx(10 * 2 * 3 * 6000 / 1e12)


def test_the_corner_of_the_roofline_is_rounded() -> None:
    """At the corner both sides are equal: with a power of 1 their sum, with a large one their maximum."""
    corner = StepBatch(100, 0)
    soft = time(stage(Layer(None, MATRICES)), corner, efficiency=replace(EFFICIENCY, sharpness=1))
    assert soft.linear == pytest.approx(16e-6)
    assert soft.linear_memory == pytest.approx(soft.linear_compute) == pytest.approx(8e-6)


def test_where_a_device_has_no_small_numbers_it_multiplies_larger_ones() -> None:
    assert flops_of(DEVICE, 4.25, EFFICIENCY) == flops_of(DEVICE, 8, EFFICIENCY) == 200e12
    without = replace(DEVICE, flops=MappingProxyType({"fp16": 50e12}))
    assert flops_of(without, 8, EFFICIENCY) == 50e12
    assert flops_of(replace(without, flops=MappingProxyType({"fp32": 7e12})), 16, EFFICIENCY) == 7e12


def test_weights_of_32_bits_are_multiplied_at_the_rate_of_float32() -> None:
    """Guards against the highest rate of all, that of 8 bits."""
    h100 = find_device("H100")
    assert flops_of(h100, 32, EFFICIENCY) == h100.flops["fp32"]


def test_small_cards_do_not_reach_their_peak_for_want_of_power() -> None:
    """A T4 has 65e12 at 70 W, where 0.417e12 a watt are reached: 45 %."""
    assert power_limit(find_device("T4")) == pytest.approx(0.417e12 * 70 / 65e12, rel=0.01)
    assert power_limit(find_device("H100")) == 1


def test_a_bare_4_has_scales_beside_it() -> None:
    assert stored_bits(4) == pytest.approx(4.24)
    assert stored_bits(8) == 8


def test_stages_of_a_checkpoint_have_its_bits_unless_told_otherwise() -> None:
    shape, fabric = find_model("gpt-oss-120b"), None
    kinds = shape.kinds
    some = stage_of(shape, kinds, ENGINE, device=DEVICE, tensor_parallel=1, fabric=fabric)  # type: ignore[arg-type]
    assert (some.weight_bits, some.expert_bits) == (shape.weight_bits, shape.expert_bits)
    told = stage_of(shape, kinds, ENGINE, device=DEVICE, tensor_parallel=1, fabric=fabric, weight_bits=8)  # type: ignore[arg-type]
    assert (told.weight_bits, told.expert_bits) == (8, 8)
