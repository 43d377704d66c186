"""What each rank of a plan needs: the known arithmetic, the ways to cut, and what fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from holdfast.core.errors import ConfigError
from holdfast.core.plan import ExpertPlacement, ReplicaPlan
from holdfast.models.config import hf_config
from holdfast.models.families import FAMILIES
from holdfast.parallel.cuts import make_plan
from holdfast.planner.memory.capacity import capacity_of, kv_room
from holdfast.planner.memory.engines import ENGINES, GIB, PLAIN, EngineMemory
from holdfast.planner.memory.ranks import (
    KV_FORMATS,
    KVFormat,
    RankMemory,
    ServingLoad,
    kv_bytes_of_sequence,
    kv_bytes_per_block,
    plan_memory,
    rank_memory,
    table_of,
)
from holdfast.planner.memory.shares import RankShare, even_shares, shares_of_replica
from holdfast.planner.shapes.configs import shape_of_config
from holdfast.planner.shapes.shape import (
    Attention,
    Experts,
    Layer,
    Matrix,
    ModelShape,
    attention_matrices,
    mlp_matrices,
    router_matrix,
)
from support.cases import CASES
from support.checkpoints import SMALL

GB = 1_000_000_000
SHARED_CONFIGS = Path(__file__).parents[2].parent / "shared" / "data" / "configs"


def model(attention: Attention, num_layers: int, hidden: int, columns: int, vocab: int, **how: Any) -> ModelShape:
    gated = how.get("gated", True)
    matrices = attention_matrices(hidden, attention) + mlp_matrices(hidden, columns, gated=gated)
    layer = Layer(attention, matrices)
    return ModelShape("model", hidden, vocab, (layer,) * num_layers, False, 2 * vocab * hidden, 0, 1 << 17)


GPT3 = model(Attention("softmax", 96, 96, 128, 128), 96, 12288, 4 * 12288, 50257, gated=False)
"""Brown et al., arXiv:2005.14165, table 2.1."""
LLAMA3_8B = model(Attention("softmax", 32, 8, 128, 128), 32, 4096, 14336, 128256)
LLAMA2_7B = model(Attention("softmax", 32, 32, 128, 128), 32, 4096, 11008, 32000)
ALL = RankShare((0, 96))


def test_gpt3_takes_350_gb_in_16_bits_and_an_eighth_of_it_on_each_of_eight_gpus():
    """175e9 parameters · 2 bytes = 350 GB; / 8 = 43.75 GB, of an A100's 80 GB."""
    table = table_of(GPT3)
    alone = rank_memory(table, even_shares(96)[0])
    eighth = rank_memory(table, even_shares(96, tensor=8)[0])
    assert alone.weights == pytest.approx(350 * GB, rel=0.005)
    assert eighth.weights == pytest.approx(43.75 * GB, rel=0.005)
    shares = even_shares(96, tensor=8)
    assert not capacity_of(table, even_shares(96), 80 * GB, ServingLoad()).fits
    assert capacity_of(table, shares, 80 * GB, ServingLoad()).fits


@pytest.mark.parametrize(
    ("bits", "kv_heads", "expected"),
    [(16, 96, 154_618_822_656), (8, 96, 77_309_411_328), (4, 96, 38_654_705_664), (16, 8, 154_618_822_656 // 12)],
)
def test_keys_and_values_of_32k_tokens_of_gpt3(bits: int, kv_heads: int, expected: int):
    """2 (K and V) · 32768 tokens · 12288 · 96 layers · 2 bytes = 154.6 GB (144 GiB); half in int8, a quarter in
    int4; 8 KV heads for 96 are a twelfth."""
    attention = Attention("softmax", 96, kv_heads, 128, 128)
    table = table_of(model(attention, 96, 12288, 4 * 12288, 50257, gated=False))
    load = ServingLoad(kv_format=KVFormat(bits))
    assert kv_bytes_of_sequence(table, ALL, 32768, load) == expected
    assert kv_bytes_per_block(table, ALL, load) * (32768 // load.block_size) == expected


def test_formats_of_the_kv_cache_count_their_scales():
    """GGUF's blocks of 32: 34 bytes in Q8_0, 18 in Q4_0."""
    assert [KV_FORMATS[name].bytes_per_number * 32 for name in ("bfloat16", "fp8", "int8", "int4")] == [
        64,
        32,
        34,
        18,
    ]


def test_more_ranks_than_kv_heads_hold_each_of_them_several_times():
    table = table_of(LLAMA3_8B)
    caches = [kv_bytes_per_block(table, even_shares(32, tensor=ranks)[0], ServingLoad()) for ranks in (1, 8, 16)]
    assert caches == [8 * caches[2], caches[2], caches[2]]
    weights = [rank_memory(table, even_shares(32, tensor=ranks)[0]).attention_weights for ranks in (8, 16)]
    head = 4096 * 128 * 2  # bytes of one head's columns
    assert weights == [32 * head * (4 + 2 + 4), 32 * head * (2 + 2 + 2)]


def test_a_latent_is_whole_on_every_rank():
    """MLA: the 512 + 64 numbers that DeepSeek-V3 caches of a token are shared by all heads (arXiv:2412.19437)."""
    attention = Attention("latent", 128, 1, 192, 128, latent_dim=576)
    layer = Layer(attention, (Matrix("q up", 1536, 128 * 192, "column"), Matrix("kv down", 7168, 576, "replicated")))
    table = table_of(ModelShape("mla", 7168, 1024, (layer,) * 61, True, 7168 * 1024, 0, 1 << 17))
    for ranks in (1, 8):
        share = even_shares(61, tensor=ranks)[0]
        assert kv_bytes_of_sequence(table, share, 1024, ServingLoad()) == 1024 * 61 * 576 * 2
        assert rank_memory(table, share).attention_weights == 61 * 2 * (1536 * 128 * 192 // ranks + 7168 * 576)


def test_a_window_keeps_no_more_than_its_blocks_unless_the_engine_keeps_all():
    attention = Attention("softmax", 8, 8, 64, 64, window=1000)
    table = table_of(model(attention, 2, 512, 1024, 1000))
    share, token = even_shares(2)[0], 2 * 2 * 8 * 64 * 2
    keeps = EngineMemory("keeps", frees_windows=False)
    assert kv_bytes_of_sequence(table, share, 160, ServingLoad()) == 160 * token
    assert kv_bytes_of_sequence(table, share, 100_000, ServingLoad()) == (1008 + 16) * token
    assert kv_bytes_of_sequence(table, share, 100_000, ServingLoad(), keeps) == 100_000 * token


def test_a_state_is_as_large_for_one_token_as_for_many():
    attention = Attention("linear", 16, 16, 64, 64, state_numbers=16 * 64 * 64)
    layer = Layer(attention, (Matrix("in", 512, 4096, "column"),))
    table = table_of(ModelShape("linear", 512, 1000, (layer,) * 3, True, 512 * 1000, 0, 1 << 20))
    sizes = {kv_bytes_of_sequence(table, even_shares(3)[0], context, ServingLoad()) for context in (1, 1 << 20)}
    assert sizes == {3 * 16 * 64 * 64 * 2}
    assert kv_bytes_of_sequence(table, even_shares(3, tensor=4)[0], 1, ServingLoad()) == 3 * 4 * 64 * 64 * 2


def routed(num_experts: int) -> ModelShape:
    attention = Attention("softmax", 32, 8, 128, 128)
    experts = Experts(num_experts, 2, mlp_matrices(4096, 14336))
    layer = Layer(attention, (*attention_matrices(4096, attention), router_matrix(4096, num_experts)), experts)
    return ModelShape("moe", 4096, 32000, (layer,) * 32, False, 2 * 32000 * 4096, 0, 1 << 15)


@pytest.mark.parametrize(
    ("tensor", "expert", "held"), [(1, 1, 8), (8, 1, 1), (8, 8, 1), (4, 2, 2), (1, 8, 1), (3, 3, 3)]
)
def test_experts_are_shared_out_whole_or_cut(tensor: int, expert: int, held: int):
    """Of 8 experts. In three groups one has three of them, which is what its ranks must have room for."""
    memory = rank_memory(table_of(routed(8)), even_shares(32, tensor=tensor, expert=expert)[0])
    assert memory.expert_weights == held * 32 * 3 * 4096 * 14336 * 2
    assert memory.mlp_weights == 32 * 4096 * 8 * 2, "the router is everyone's"


def test_quantized_matrices_take_their_bits_and_embeddings_sixteen():
    shape = replace(routed(8), weight_bits=8, expert_bits=4.5)
    half, full = (
        rank_memory(table_of(shape), even_shares(32)[0]),
        rank_memory(table_of(routed(8)), even_shares(32)[0]),
    )
    assert half.weights == shape.weight_bytes
    assert half.attention_weights * 2 == full.attention_weights
    assert half.expert_weights * 16 == full.expert_weights * 4.5
    assert half.embedding_weights == full.embedding_weights


@pytest.mark.parametrize("name", ["gpt-oss-20b", "DeepSeek-V3", "Qwen3.5-35B-A3B", "Nemotron-H-56B-Base-8K"])
def test_published_models_are_counted_whole(name: str):
    """Biases of experts, latents, delta nets, Mamba: one device has every byte, and every cached number."""
    if not (path := SHARED_CONFIGS / f"{name}.json").exists():
        pytest.skip(f"{path}: not on this machine")
    shape = shape_of_config(json.loads(path.read_text()))
    table, share = table_of(shape), even_shares(shape.num_layers)[0]
    assert rank_memory(table, share).weights == shape.weight_bytes
    numbers = kv_bytes_of_sequence(table, share, 8192, ServingLoad(block_size=1)) // 2
    assert numbers == shape.kv_numbers(8192)


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_stage_has_the_embeddings_and_the_last_the_head(tied: bool):
    """Which, being tied, are there once on one device and twice in a pipeline."""
    table = 128256 * 4096
    shape = replace(LLAMA3_8B, tied=tied, embedding_params=table * (1 if tied else 2))
    alone = plan_memory(table_of(shape), even_shares(32))
    stages = plan_memory(table_of(shape), even_shares(32, pipeline=3, tensor=2))
    assert alone[0].embedding_weights == 2 * table * (1 if tied else 2)
    assert [stage.embedding_weights for stage in stages] == [table, 0, table]


@pytest.mark.parametrize("degrees", [{}, {"tensor": 4}, {"pipeline": 4}, {"tensor": 2, "pipeline": 3}])
def test_all_ranks_together_hold_the_model(degrees: dict[str, int]):
    shares = even_shares(32, **degrees)
    memory = plan_memory(table_of(LLAMA3_8B), shares)
    held = sum(some.weights * share.ranks_in_stage for some, share in zip(memory, shares, strict=True))
    assert held == LLAMA3_8B.weight_bytes


def test_weights_that_replicas_spread_are_whole_only_layer_by_layer():
    table, share = table_of(LLAMA3_8B), even_shares(32)[0]
    whole, spread = rank_memory(table, share), rank_memory(table, share, spread_over=4)
    layer = (whole.attention_weights + whole.mlp_weights) // 32
    assert spread.weights == pytest.approx(whole.weights / 4 + 2 * layer, abs=8)
    assert rank_memory(table, share, spread_over=4, gathered_layers=0).gathered_weights == 0


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_a_plan_that_runs_is_counted_like_its_degrees(config: dict[str, Any]):
    """From the ranges of a ReplicaPlan, and from the degrees that made it; the fullest rank of each stage."""
    values = {**SMALL, "vocab_size": 128, **config}
    spec = FAMILIES[config["model_type"]].spec(hf_config("config.json", values))
    shape, table = shape_of_config(values), table_of(shape_of_config(values))
    degree = 2 if spec.num_heads % 2 == 0 and (spec.num_kv_heads % 2 == 0 or spec.num_kv_heads == 1) else 1
    replica = make_plan(spec, tensor=degree, pipeline=2).replicas[0]
    memory = plan_memory(table, shares_of_replica(shape, replica))
    fullest = [max(memory[stage * degree : (stage + 1) * degree], key=lambda some: some.total) for stage in (0, 1)]
    even = plan_memory(table, even_shares(shape.num_layers, tensor=degree, pipeline=2))
    assert [some.kv_cache for some in fullest] == [some.kv_cache for some in even]
    assert [some.weights for some in fullest] == pytest.approx([some.weights for some in even], rel=0.02)
    if degree == 1:
        assert fullest == list(even)


def test_uneven_stages_and_moved_experts_are_counted_as_they_are():
    values = {**SMALL, **CASES["qwen3_moe"]}
    spec = FAMILIES["qwen3_moe"].spec(hf_config("config.json", values))
    shape = shape_of_config(values)
    replica = make_plan(spec, tensor=[1, 2], pipeline=2, layers=[1, 2], expert=1).replicas[0]
    first, *others = plan_memory(table_of(shape), shares_of_replica(shape, replica))
    assert len(others) == 2
    assert sum(some.expert_weights for some in others) == 2 * first.expert_weights
    even = make_plan(spec, tensor=2, expert=2).replicas[0]
    owners = tuple((0,) for _ in range(shape.layers[0].experts.num_experts))  # type: ignore[union-attr]
    placed = replace_placements(even, tuple(ExpertPlacement(layer, owners) for layer in range(spec.num_layers)))
    memory = plan_memory(table_of(shape), shares_of_replica(shape, placed))
    assert [some.expert_weights for some in memory] == [first.expert_weights * 3, 0]


def replace_placements(replica: ReplicaPlan, placements: tuple[ExpertPlacement, ...]) -> ReplicaPlan:
    stage = msgspec.structs.replace(replica.stages[0], placements=placements)
    return msgspec.structs.replace(replica, stages=(stage,))


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"pipeline": 33}, "pipeline degree 33: must be at least 1 and at most the model's 32 layers"),
        ({"pipeline": 0}, "pipeline degree 0"),
        ({"tensor": 0}, "tensor degrees"),
        ({"tensor": [2], "pipeline": 2}, "must be 2 numbers of at least 1"),
        ({"expert": 0}, "expert degree 0"),
        ({"pipeline": 2, "layers": (30, 3)}, "that sum to the model's 32"),
    ],
)
def test_degrees_that_cannot_be_are_refused(degrees: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        even_shares(32, **degrees)


# --- what fits ---


def test_a_sequence_more_than_the_most_does_not_fit():
    """And neither do a token more of context, nor a block more of keys and values: on either side of each limit."""
    table, load = table_of(LLAMA3_8B), ServingLoad(context=4096, sequences=10)
    shares, device = even_shares(32, tensor=[2, 1], pipeline=2), [10 * GB, 13 * GB, 13 * GB][:2]
    capacity = capacity_of(table, shares, device, load)
    for sequences, fits in ((capacity.max_sequences, True), (capacity.max_sequences + 1, False)):
        assert capacity_of(table, shares, device, replace(load, sequences=sequences)).fits is fits
    one = replace(load, sequences=1)
    longest = capacity_of(table, shares, device, one).max_context
    assert 0 < longest < table.shape.max_context
    for context, fits in ((longest, True), (longest + 1, False)):
        assert capacity_of(table, shares, device, replace(one, context=context)).fits is fits
    blocks = capacity.kv_tokens // load.block_size
    rooms = [kv_room(some, size) for some, size in zip(capacity.memory, device, strict=True)]
    needed = [kv_bytes_per_block(table, share, load) for share in shares]
    assert all(blocks * each <= room for each, room in zip(needed, rooms, strict=True))
    assert any((blocks + 1) * each > room for each, room in zip(needed, rooms, strict=True))


@pytest.mark.parametrize(
    ("shape", "gib", "load", "tokens"),
    [
        # github.com/vllm-project/vllm/pull/10511: 53.29 GiB of keys and values on an H100, prompts in one step
        (LLAMA3_8B, 79.22, ServingLoad(8192, 256, 8192), int(53.29 * GIB) // 131072),
        # github.com/vllm-project/vllm/pull/2031: 7,351 blocks of 16 on an A100
        (LLAMA2_7B, 79.15, ServingLoad(4096, 256, 4096), 7351 * 16),
        # LLMServingSim's log of vLLM 0.19 on an RTX 4090
        (LLAMA3_8B, 23.6, ServingLoad(8192, 256, 2048), 41408),
    ],
    ids=["H100", "A100", "4090"],
)
def test_tokens_that_vllm_found_room_for(shape: ModelShape, gib: float, load: ServingLoad, tokens: int):
    """Within 3 %: what it held beside torch's tensors differs by as much between its versions."""
    found = capacity_of(table_of(shape), even_shares(32), int(gib * GIB), load, ENGINES["vllm"])
    assert found.kv_tokens == pytest.approx(tokens, rel=0.03)


def test_parts_sum_to_the_total():
    memory = rank_memory(
        table_of(routed(8)), even_shares(32, tensor=2, pipeline=2)[0], ServingLoad(), ENGINES["vllm"]
    )
    assert sum(memory.parts().values()) == memory.total
    assert RankMemory().parts() == {}
    assert PLAIN.reserve == 0
