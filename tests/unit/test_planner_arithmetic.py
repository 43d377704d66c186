"""Arithmetic that everybody can do by hand, and the planner must do alike; docs/planning.md shows the numbers."""

from __future__ import annotations

import pytest

from holdfast.hardware.catalogue import find_device, find_link
from holdfast.planner.coefficients import coefficients
from holdfast.planner.communication import (
    STARTS,
    Fabric,
    crossing_reason,
    exchanges_per_token,
    hops,
    path_of,
    wire_bytes,
)
from holdfast.planner.memory.capacity import capacity_of
from holdfast.planner.memory.ranks import (
    KV_FORMATS,
    KVFormat,
    ServingLoad,
    kv_bytes_of_sequence,
    kv_bytes_per_block,
    table_of,
)
from holdfast.planner.memory.shares import even_shares
from holdfast.planner.rows.answers import even_stages
from holdfast.planner.serving import bubble
from holdfast.planner.shapes.configs import shape_of_config
from holdfast.planner.shapes.presets import find_model
from holdfast.planner.timing import StepBatch, StepTime, stage_of, step_time

A100 = find_device("A100-80GB")
NVLINK = Fabric(A100.name, find_link("nvlink3"))
GPT_500B = shape_of_config(
    {
        "model_type": "gpt2",
        "n_layer": 64,
        "n_embd": 25600,
        "n_head": 160,
        "vocab_size": 51200,
        "n_positions": 2048,
    },
    "GPT-500B",
)


# -- GPT-3 175B on 8 × A100-80GB -------------------------------------------------------------------------------------


def test_weights_of_gpt3_on_each_of_8_gpus_are_an_eighth_of_2_bytes_each() -> None:
    """175e9 · 2 / 8 = 43.7 GB; norms and positions are on every rank, some 0.1 % more."""
    gpt3 = find_model("GPT-3 175B")
    memory = capacity_of(
        table_of(gpt3), even_shares(96, tensor=8), A100.memory_bytes, ServingLoad(context=2048)
    ).memory
    assert gpt3.params == pytest.approx(174.6e9, rel=1e-3)
    assert memory[0].weights == pytest.approx(gpt3.params * 2 / 8, rel=2e-3)
    assert memory[0].weights == pytest.approx(43.7e9, rel=1e-3)


def test_a_token_of_gpt3_caches_2_times_layers_times_hidden_numbers() -> None:
    """2 · 96 · 12288 · 2 bytes = 4.72 MB, an eighth of it on each rank: 0.59 MB."""
    table = table_of(find_model("GPT-3 175B"))
    block = kv_bytes_per_block(table, even_shares(96, tensor=8)[0], ServingLoad(block_size=1))
    assert block == 2 * 96 * 12288 * 2 // 8 == 589_824


def test_what_is_left_of_8_a100_holds_33_sequences_of_gpt3() -> None:
    """(85.0 - 43.7 - 0.2) GB / 0.59 MB = 69,600 tokens = 33 sequences of 2,048."""
    load = ServingLoad(context=2048, sequences=1)
    capacity = capacity_of(table_of(find_model("GPT-3 175B")), even_shares(96, tensor=8), A100.memory_bytes, load)
    left = A100.memory_bytes - capacity.memory[0].without_kv
    assert capacity.kv_tokens == left // (589_824 * 16) * 16 == 69_616
    assert capacity.max_sequences == 33 == 69_616 // 2048
    assert capacity.max_context == 2048


# -- four ranks, hidden 12,288, a batch of 16 ------------------------------------------------------------------------


def test_an_all_reduce_of_16_rows_carries_393_kb_and_a_ring_moves_590() -> None:
    """16 · 12288 · 2 = 393,216 bytes; · 2 · 3/4 = 589,824; two a layer: 1.18 MB; 96 layers: 113 MB."""
    message = 16 * 12288 * 2
    moved = wire_bytes("all_reduce", 4, message)
    assert (message, moved, 2 * moved, 96 * 2 * moved) == (393_216, 589_824, 1_179_648, 113_246_208)


def test_113_mb_over_nvlink_take_a_fifth_of_a_millisecond_by_bandwidth_alone() -> None:
    """113 MB / 600 GB/s = 0.19 ms, counting both directions; a rank sends over one: 113 MB / 300 GB/s = 0.38 ms."""
    forward = 192 * wire_bytes("all_reduce", 4, 393_216)
    assert forward / 600e9 == pytest.approx(0.189e-3, rel=2e-3)
    assert forward / NVLINK.link.bandwidth == pytest.approx(0.377e-3, rel=2e-3)
    assert forward / find_link("pcie4").bandwidth == pytest.approx(3.59e-3, rel=2e-3)


@pytest.mark.parametrize(("software", "least", "most"), [("nccl", 3e-3, 5e-3), ("vllm", 1e-3, 3e-3)])
def test_latency_makes_milliseconds_of_192_all_reduces(software, least: float, most: float) -> None:
    """Each costs what it takes to begin, 5 to 15 µs: some ten times what bandwidth alone says."""
    path = path_of(software, NVLINK, 1, 4, "all_reduce")
    total = 192 * path.time(wire_bytes("all_reduce", 4, 393_216))
    assert least < total < most
    assert 192 * path.latency_low > 0.4 * total


def test_over_pcie_the_same_takes_longer_than_over_nvlink() -> None:
    wire = wire_bytes("all_reduce", 4, 393_216)
    pcie = path_of("nccl", Fabric("a card that nobody measured", find_link("pcie4")), 1, 4, "all_reduce")
    assert 192 * pcie.time(wire) > 2 * 192 * path_of("nccl", NVLINK, 1, 4, "all_reduce").time(wire)
    assert 192 * pcie.time(wire) > 3.59e-3


# -- keys and values of a long context -------------------------------------------------------------------------------


def test_32k_tokens_of_gpt3_need_144_gib() -> None:
    """2 · 32768 · 12288 · 96 · 2 = 154.6 GB = 144 GiB."""
    gpt3 = find_model("GPT-3 175B")
    assert gpt3.kv_numbers(32_768) * 2 == 2 * 32_768 * 12_288 * 96 * 2 == 144 * 2**30


@pytest.mark.parametrize(
    ("kv_format", "part"),
    [
        (KVFormat(8), 1 / 2),
        (KVFormat(4), 1 / 4),
        (KV_FORMATS["fp8"], 1 / 2),
        (KV_FORMATS["int8"], (8 + 16 / 32) / 16),
        (KV_FORMATS["int4"], (4 + 16 / 32) / 16),
    ],
)
def test_smaller_numbers_make_the_cache_smaller(kv_format: KVFormat, part: float) -> None:
    """Half in 8 bits, a quarter in 4; a 16-bit scale for 32 numbers adds half a bit to each."""
    table, whole = table_of(find_model("GPT-3 175B")), even_shares(96)[0]
    size = kv_bytes_of_sequence(table, whole, 32_768, ServingLoad(kv_format=kv_format))
    assert size == 144 * 2**30 * part


def test_8_kv_heads_instead_of_96_cache_a_twelfth() -> None:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 96,
        "hidden_size": 12288,
        "intermediate_size": 49152,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "vocab_size": 50257,
        "max_position_embeddings": 32768,
    }
    grouped = shape_of_config(config, "GPT-3 with grouped queries")
    assert find_model("GPT-3 175B").kv_numbers(32_768) == 12 * grouped.kv_numbers(32_768)


# -- 500B on 32 GPUs: TP8 × PP4 against TP4 × PP8 --------------------------------------------------------------------


def _token(tensor: int, pipeline: int, requests: int = 16) -> list[StepTime]:
    """What one token takes, stage by stage; a stage's ranks on one node."""
    known = coefficients()
    engine = known.engines["vllm"]
    stages = [
        stage_of(GPT_500B, kinds, engine, device=A100, tensor_parallel=tensor, fabric=NVLINK, last=i == pipeline - 1)
        for i, kinds in enumerate(even_stages(GPT_500B, pipeline))
    ]
    return [step_time(stage, StepBatch(requests, 1024), engine, known.efficiency) for stage in stages]


def test_500b_on_32_gpus_weighs_the_same_either_way() -> None:
    """505e9 · 2 / 32 = 31.5 GB a rank; the embeddings make the outer stages a little heavier."""
    assert GPT_500B.params == pytest.approx(505e9, rel=1e-3)
    table, load = table_of(GPT_500B), ServingLoad(context=2048)
    for tensor, pipeline in ((8, 4), (4, 8)):
        memory = capacity_of(table, even_shares(64, tensor=tensor, pipeline=pipeline), A100.memory_bytes, load).memory
        assert all(31.4e9 < rank.weights < 32.3e9 for rank in memory)


def test_500b_as_tp8_pp4_gives_a_token_in_half_the_time_of_tp4_pp8() -> None:
    """Eight read a layer's weights in half the time of four; more all-reduce is the price, and it is less."""
    eight, four = _token(8, 4), _token(4, 8)
    assert sum(stage.total for stage in eight) < 0.6 * sum(stage.total for stage in four)
    assert sum(stage.linear for stage in eight) == pytest.approx(sum(stage.linear for stage in four) / 2, rel=0.02)
    assert sum(stage.communication for stage in eight) > 1.2 * sum(stage.communication for stage in four)


@pytest.mark.parametrize(
    ("stages", "microbatches", "idle"),
    [(4, 1, 3 / 4), (4, 8, 3 / 11), (8, 8, 7 / 15), (8, 32, 7 / 39), (1, 5, 0), (4, 10**6, 0)],
)
def test_bubble_is_stages_less_one_of_all_slots(stages: int, microbatches: int, idle: float) -> None:
    """(p - 1) / (m + p - 1): 27 % of four stages with 8 microbatches, 47 % of eight."""
    assert bubble(stages, microbatches) == pytest.approx(idle, abs=1e-5)


# -- between nodes and between sites ---------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [393_216, 1 << 20, 100_000_000])
def test_hierarchical_all_reduce_beats_one_ring_through_all_nodes(message: int) -> None:
    """2 nodes of 8: a ring of 16 makes 2 · 15 hops and sends 2 · 15/16 of the message through one network card; by
    nodes, each of 8 cards carries 2 · 1/2 of an eighth, in 2 hops."""
    network, start = find_link("infiniband-ndr"), STARTS["nccl"]
    fabric = Fabric("a device that nobody measured", find_link("nvlink4"), network)
    wire = wire_bytes("all_reduce", 16, message)
    flat = start.launch + hops("all_reduce", 16) * (start.hop + network.latency)
    flat += wire / (network.bandwidth * start.rate_high)
    assert path_of("nccl", fabric, 2, 16, "all_reduce").time(wire) < flat / 3


def test_tensor_parallelism_between_datacentres_is_refused_and_replicas_are_advised() -> None:
    """2 · 80 all-reduces a token × 10 ms = 1.6 s a token."""
    wan = find_link("wan")
    reason = crossing_reason(wan, exchanges_per_token(80, tensor=True))
    assert reason is not None
    assert "tensor parallelism over wan: 160 exchanges a token × 10 ms = 1.6 s a token" in reason
    assert "replica on each side" in reason


@pytest.mark.parametrize("link", ["nvlink4", "pcie4", "infiniband-hdr", "ethernet-10"])
def test_tensor_parallelism_within_a_site_is_a_matter_of_speed_not_of_refusal(link: str) -> None:
    assert crossing_reason(find_link(link), exchanges_per_token(80, tensor=True)) is None


def test_a_pipeline_may_cross_datacentres() -> None:
    """Two stages: over and back once a token, 20 ms."""
    assert exchanges_per_token(80, stages=2) == 2
    assert crossing_reason(find_link("wan"), exchanges_per_token(80, stages=2), "a pipeline") is None
    assert crossing_reason(find_link("wan"), exchanges_per_token(80, stages=16), "a pipeline") is not None
