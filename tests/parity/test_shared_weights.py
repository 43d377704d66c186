"""Weights that several replicas hold together: each fills its share, and all compute the same bits as one alone."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from holdfast.core.plan import places
from holdfast.core.spec import ModelInfo
from holdfast.kernels.cpu.kernels import CpuKernels
from holdfast.kernels.cpu.memory import Arena
from holdfast.models.inspect import inspect_model
from holdfast.models.load import load_decoder
from holdfast.models.parameters import packed_room
from holdfast.parallel.cuts import make_plan
from holdfast.parallel.segment import create
from holdfast.parallel.weights import HEADER, SharedWeights
from support.builds import builds
from support.cases import CASES, QUANTIZED
from support.checkpoints import random_model, run_interleaved, save
from support.gguf_twin import write_twin

pytestmark = pytest.mark.skipif(not builds(), reason="Holdfast was installed without a C compiler")

REQUESTS = [[3 + (7 * i + j) % 90 for j in range(length)] for i, length in enumerate((1, 5, 17, 40))]
MODELS = [
    "llama, multi-query, odd heads, biases, yarn rope, tied",
    "gemma3",
    "gpt2",
    "falcon 40b: grouped, two norms",
    "mixtral",
]


class Counting(Arena):
    """How much is taken."""

    total = 0

    def take(self, size: int):
        self.total += size
        return super().take(size)


def together(info: ModelInfo, dtype: torch.dtype, count: int) -> tuple[list[list[torch.Tensor]], list[int], int]:
    """Logits of each of `count` replicas, bytes written to by when each had filled its share, and memory in use."""
    place = places(make_plan(info.spec).replicas[0])[0]
    descriptor = create(HEADER + packed_room(info.spec, place))
    decoders, written = [], []
    try:
        for index in range(count):
            memory = SharedWeights(descriptor, index, count)
            kernels = CpuKernels(dtype, threads=1, memory=memory)
            decoders.append((memory, load_decoder(info, kernels, dtype, "cpu", in_order=True)))
            filled = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
            written.append(int(np.count_nonzero(np.frombuffer(filled, np.uint8))))
        used = os.fstat(descriptor).st_blocks * 512
    finally:
        os.close(descriptor)
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda memory: memory.wait_for_others(), [memory for memory, _ in decoders]))
    return [run_interleaved(decoder, REQUESTS, seed=3) for _, decoder in decoders], written, used


def check(path: str, dtype: torch.dtype, count: int) -> None:
    info = inspect_model(path)
    arena = Counting()
    alone = load_decoder(info, CpuKernels(dtype, threads=1, memory=arena), dtype, "cpu")
    expected = run_interleaved(alone, REQUESTS, seed=3)
    found, written, used = together(info, dtype, count)
    for logits in found:
        for one, other in zip(expected, logits, strict=True):
            assert torch.equal(one.view(torch.int32), other.view(torch.int32))
    assert all(before < after for before, after in pairwise([0, *written])), "each fills a share"
    assert written[0] < 0.75 * written[-1]
    assert used <= arena.total + HEADER + 64 * 300 + 4096, "the weights are there once"


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_replicas_compute_the_same_bits(name: str, count: int, tmp_path: Path):
    check(save(random_model(**CASES[name]), tmp_path), torch.bfloat16, count)


@pytest.mark.parametrize("held", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantized_weights(held: str, tmp_path: Path):
    model = random_model(**QUANTIZED["whole groups: llama"])
    save(model, tmp_path)
    check(write_twin(model.config, tmp_path, tmp_path / "twin.gguf", kind=held), torch.bfloat16, 2)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("panels", [1, 2, 5, 100])
def test_shares_are_even_and_cover_all(panels: int, count: int):
    descriptor = create(HEADER)
    shares = [SharedWeights(descriptor, index, count).share(panels) for index in range(count)]
    os.close(descriptor)
    assert [panel for first, last in shares for panel in range(first, last)] == list(range(panels))
    assert max(last - first for first, last in shares) - min(last - first for first, last in shares) <= 1
