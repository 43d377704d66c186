"""FasterTransformer's memory, as its guide measures it (github.com/NVIDIA/FasterTransformer at df4a753,
docs/gpt_guide.md, on A100s of 80 GB): what fitted, what did not, and how much was used."""

from __future__ import annotations

import pytest

from holdfast.planner.memory.engines import GIB
from holdfast.planner.memory.fastertransformer import fastertransformer_memory
from holdfast.planner.memory.ranks import ShapeTable, table_of
from holdfast.planner.shapes.shape import Attention, Layer, ModelShape, attention_matrices, mlp_matrices

A100 = int(79.15 * GIB)
"""Bytes that an A100 of 80 GB has: torch's total_memory, as serving engines log it."""


def gpt(num_layers: int, num_heads: int, head_dim: int) -> ShapeTable:
    """The GPTs of the guide: MLPs of 4 M columns, biases everywhere, 51,200 words."""
    hidden, vocab = num_heads * head_dim, 51200
    attention = Attention("softmax", num_heads, num_heads, head_dim, head_dim)
    matrices = attention_matrices(hidden, attention) + mlp_matrices(hidden, 4 * hidden, gated=False)
    layer = Layer(attention, matrices, None, 13 * hidden)
    return table_of(ModelShape("gpt", hidden, vocab, (layer,) * num_layers, True, vocab * hidden, 2 * hidden, 2048))


GPT_350M, GPT_1_3B, GPT_6_7B = gpt(24, 16, 64), gpt(24, 32, 64), gpt(32, 32, 128)
GPT_20B, MEGATRON_530B = gpt(44, 48, 128), gpt(105, 128, 160)


@pytest.mark.parametrize(
    ("model", "tensor", "pipeline", "batch", "input_len", "output_len", "fits"),
    [
        (GPT_20B, 1, 1, 256, 128, 20, False),
        (GPT_20B, 1, 1, 256, 80, 200, False),
        (GPT_20B, 1, 1, 128, 200, 200, False),
        (GPT_20B, 2, 1, 256, 200, 200, False),
        (MEGATRON_530B, 16, 1, 256, 60, 20, False),
        (GPT_20B, 1, 1, 256, 60, 20, True),
        (GPT_20B, 1, 1, 128, 128, 20, True),
        (GPT_20B, 1, 1, 64, 200, 200, True),
        (GPT_20B, 2, 1, 128, 200, 200, True),
        (GPT_20B, 2, 1, 256, 128, 20, True),
        (GPT_20B, 2, 1, 256, 80, 200, True),
        (MEGATRON_530B, 16, 1, 128, 60, 20, True),
        (MEGATRON_530B, 16, 1, 256, 20, 8, True),
        (MEGATRON_530B, 16, 1, 64, 128, 8, True),
        (MEGATRON_530B, 8, 3, 256, 60, 20, True),
        (MEGATRON_530B, 8, 3, 256, 128, 8, True),
    ],
)
def test_what_ran_out_of_memory_is_said_to(  # noqa: PLR0917
    model: ShapeTable, tensor: int, pipeline: int, batch: int, input_len: int, output_len: int, fits: bool
):
    memory = fastertransformer_memory(
        model, tensor=tensor, pipeline=pipeline, batch=batch, input_len=input_len, output_len=output_len
    )
    assert (memory.total <= A100) is fits, memory.parts()


@pytest.mark.parametrize(
    ("model", "batch", "input_len", "output_len", "used"),
    [
        (GPT_350M, 1, 128, 8, 3.43),
        (GPT_350M, 64, 128, 8, 4.81),
        (GPT_350M, 64, 512, 32, 8.67),
        (GPT_1_3B, 2, 128, 8, 5.39),
        (GPT_1_3B, 64, 128, 8, 7.97),
        (GPT_1_3B, 64, 512, 32, 15.61),
        (GPT_6_7B, 1, 128, 8, 15.55),
        (GPT_6_7B, 64, 128, 8, 22.17),
        (GPT_6_7B, 16, 512, 32, 22.17),
    ],
)
def test_what_it_used(model: ShapeTable, batch: int, input_len: int, output_len: int, used: float):
    """In GiB, as the example prints it. The largest batches of GPT-6.7B took some 4 % more than its source says."""
    memory = fastertransformer_memory(model, batch=batch, input_len=input_len, output_len=output_len)
    assert memory.total / GIB == pytest.approx(used, rel=0.05)
