"""What the planner says that our runtime allocates on CPUs, against what it does allocate, byte for byte: a formula
that forgets a padding or a copy is found out here, and so is a change of the runtime that no one told the planner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.core.config import SchedulerConfig
from holdfast.core.plan import places
from holdfast.core.spec import ModelInfo
from holdfast.kernels.cpu import memory
from holdfast.kernels.cpu.packing import PackedMatrix
from holdfast.kernels.cpu.step import PARTIAL_FLOATS
from holdfast.kernels.interface import GROUP_BYTES
from holdfast.models.checkpoint import Checkpoint
from holdfast.models.decoder import Decoder
from holdfast.models.inspect import inspect_model
from holdfast.models.layers import Pieces
from holdfast.models.parameters import parameters
from holdfast.parallel.cuts import make_plan
from holdfast.planner.memory import runtime_format
from holdfast.planner.memory.runtime_format import RuntimeFormat
from holdfast.planner.memory.runtime_memory import runtime_memory, runtime_num_blocks
from support.cases import CASES
from support.checkpoints import random_model, save
from support.gguf_twin import write_twin
from support.ranks import ranks_of

BLOCKS, BLOCK_SIZE, TOKENS = 3, 16, 24
PLANS: dict[str, dict[str, Any]] = {
    "alone": {},
    "three ranks": {"tensor": 3},
    "stages of one and two": {"tensor": [1, 2], "pipeline": 2},
}
EVERY_WAY: dict[str, dict[str, Any]] = {
    **PLANS,
    "two ranks": {"tensor": 2},
    "two stages": {"pipeline": 2, "layers": [1, 2]},
    "experts in two groups": {"tensor": 2, "expert": 2},
}
MOE = next(config for name, config in CASES.items() if name == "qwen3_moe")
FAMILIES = {
    "grouped queries, untied": CASES["llama, grouped queries, llama3 rope"],
    "biases, tied": CASES["llama, multi-query, odd heads, biases, yarn rope, tied"],
    "four norms": CASES["gemma3"],
    "norms after": CASES["opt, norms after"],
    "norm of the embeddings, slopes": CASES["bloom, heads not a power of two"],
    "experts": MOE,
}


def packed(matrix: Any) -> list[PackedMatrix]:
    return list(matrix.packed) if isinstance(matrix, Pieces) else [matrix]


def weight_bytes(decoder: Decoder) -> int:
    """Of each piece of memory once: a head may be the embeddings."""
    matrices = {id(part): part for held in decoder.weights.packed.values() for part in packed(held)}
    sizes = [part.memory.nbytes + (0 if part.bias is None else part.bias.nbytes) for part in matrices.values()]
    biases = [held.bias for held in decoder.weights.packed.values() if isinstance(held, Pieces)]
    return sum(sizes) + sum(bias.nbytes for bias in biases if bias is not None)


def table_bytes(decoder: Decoder) -> int:
    """Of what layers refer to, each piece of memory once; a rank's slopes are a part of all of them."""
    tables = [(block.attention.heads.rope, block.attention.options.alibi_slopes) for block in decoder.blocks]
    storages = [table.untyped_storage() for both in tables for table in both if table is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def workspace_bytes(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of the decoder's step, as it is recorded."""
    pages, sizes, allocate = decoder.allocate_pages(BLOCKS, BLOCK_SIZE), [], memory._aligned
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_aligned", lambda size: (sizes.append(size), allocate(size))[1])
        decoder.kernels.record(lambda ids, layout: decoder.forward(ids, layout, pages), TOKENS)
    return sum(sizes)


def check(info: ModelInfo, how: dict[str, Any], dtype: torch.dtype, patch: pytest.MonkeyPatch, **stored: Any) -> None:
    """Every rank of a plan."""
    replica = make_plan(info.spec, **how).replicas[0]
    with ranks_of(info, replica, dtype, max_tokens=TOKENS) as ranks:
        for place, decoder in zip(places(replica), ranks.decoders, strict=True):
            form = RuntimeFormat(
                itemsize=dtype.itemsize,
                max_tokens=TOKENS,
                block_size=BLOCK_SIZE,
                multiplies_bfloat16=decoder.kernels._library.dots_bf16,
                **stored,
            )
            said = runtime_memory(info.spec, place, BLOCKS, form)
            assert said.weights == weight_bytes(decoder), place.name
            assert said.norms == sum(norm.nbytes for norm in decoder.weights.norms.values()), place.name
            assert said.kv_cache == decoder.allocate_pages(BLOCKS, BLOCK_SIZE).data.nbytes, place.name
            assert said.workspace == workspace_bytes(decoder, patch), place.name
            assert said.tables == table_bytes(decoder), place.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_byte_of_every_family(
    config: dict[str, Any], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    info = inspect_model(save(random_model(**config), tmp_path))
    for how in PLANS.values():
        if how.get("tensor") != 3 or info.spec.num_heads % 3 == 0:
            check(info, how, dtype, monkeypatch)


@pytest.mark.parametrize("how", EVERY_WAY.values(), ids=EVERY_WAY.keys())
def test_every_byte_of_every_cut(how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    info = inspect_model(save(random_model(**MOE), tmp_path))
    check(info, how, torch.bfloat16, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_every_byte_of_quantized_matrices(
    kind: str, how: dict[str, Any], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In float32 they are blown up, and so are those whose virtual shards end within a group."""
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 3, "num_key_value_heads": 3}
    model = random_model(model_type="llama", tie_word_embeddings=True, **sizes)
    save(model, tmp_path)
    info = inspect_model(write_twin(model.config, tmp_path, tmp_path / "twin.gguf", kind=kind))
    checkpoint = Checkpoint(info)
    names = [name for name in parameters(info.spec) if name.endswith(".weight")]
    stored = {name: found for name in names if (found := checkpoint.format([name])) is not None}
    assert stored
    check(info, how, dtype, monkeypatch, stored=stored)


def test_the_figures_that_the_planner_repeats_are_the_runtimes(tmp_path: Path):
    """It may not import the kernels, which bring tensors along."""
    info = inspect_model(save(random_model(**MOE), tmp_path))
    place = places(make_plan(info.spec).replicas[0])[0]
    assert dict(runtime_format.GROUP_BYTES) == GROUP_BYTES
    assert runtime_memory(info.spec, place, 1, RuntimeFormat()).split_states == 4 * PARTIAL_FLOATS


def test_blocks_are_as_many_as_the_budget_has_room_for_or_requests_can_fill(tmp_path: Path):
    info = inspect_model(save(random_model(**MOE), tmp_path))
    place, scheduler = places(make_plan(info.spec).replicas[0])[0], SchedulerConfig(max_num_seqs=4)
    form = RuntimeFormat(block_size=16)
    block = 2 * info.spec.num_layers * info.spec.num_kv_heads * info.spec.head_dim * 16 * 2
    blocks = [
        runtime_num_blocks(info.spec, place, form, budget, scheduler, 33) for budget in (block * 5 - 1, 1 << 40)
    ]
    assert blocks == [4, 4 * 3]


def test_weights_that_replicas_share_count_once_between_them(tmp_path: Path):
    info = inspect_model(save(random_model(**MOE), tmp_path))
    place = places(make_plan(info.spec).replicas[0])[0]
    whole, half = (runtime_memory(info.spec, place, 1, RuntimeFormat(), shared_by=count) for count in (1, 2))
    assert half.weights == -(-whole.weights // 2)
    assert half.kv_cache == whole.kv_cache
