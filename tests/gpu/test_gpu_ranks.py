"""Several ranks on real GPUs: the tokens of one rank, whether they meet by NCCL or share a card; and FlashInfer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from multiprocess.test_plans_served import FLAGS, LLAMA, MIXTRAL, write
from support.crowd import Answers, ask
from support.service import Service

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(900),
]
TP, EP, PP = "--tensor-parallel-size", "--expert-parallel-size", "--pipeline-parallel-size"
PLANS = {
    "TP2": ("llama", (TP, "2")),
    "TP2, eager": ("llama", (TP, "2", "--enforce-eager")),
    "PP2": ("llama", (PP, "2")),
    "EP2": ("mixtral", (TP, "2", EP, "2")),
    "experts cut in two": ("mixtral", (TP, "2")),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    configs = {"llama": LLAMA, "mixtral": MIXTRAL}
    return {name: write(config, tmp_path_factory.mktemp(name)) for name, config in configs.items()}


def answers(model: str, log: Path, *flags: str) -> Answers:
    more = ("--device", "cuda", "--dtype", "bfloat16", "--kv-cache-memory-bytes", "50M")
    service = Service(model, *FLAGS, *more, *flags, log=log).wait_ready(600)
    try:
        return asyncio.run(ask(service.url))
    finally:
        assert service.stop() == 0, service.text()[-3000:]


@pytest.fixture(scope="module")
def alone(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answers]:
    folder = tmp_path_factory.mktemp("alone")
    return {name: answers(path, folder / name) for name, path in models.items()}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("plan", PLANS)
def test_ranks_that_meet_by_nccl(models: dict[str, str], alone: dict[str, Answers], plan: str, tmp_path: Path):
    """Graphs among them: captured by all ranks alike, or a step would never end."""
    model, flags = PLANS[plan]
    assert answers(models[model], tmp_path / "log", *flags) == alone[model]


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="needs a single GPU")
@pytest.mark.parametrize("plan", PLANS)
def test_ranks_that_share_a_gpu(models: dict[str, str], alone: dict[str, Answers], plan: str, tmp_path: Path):
    model, flags = PLANS[plan]
    assert answers(models[model], tmp_path / "log", *flags, "--allow-shared-gpu") == alone[model]


@pytest.mark.parametrize("lens", [[(300, 300)], [(1, 900), (70, 2000), (1, 1), (128, 128)]])
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0}, {"window": 100}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_by_flashinfer(lens: list[tuple[int, int]], options: dict[str, float], head_dim: int):
    """Near our own, over the same pages."""
    flashinfer = pytest.importorskip("flashinfer")
    from holdfast.kernels.cuda.flash import FlashInferKernels  # noqa: PLC0415
    from holdfast.kernels.cuda.kernels import CudaKernels  # noqa: PLC0415
    from holdfast.kernels.interface import AttentionOptions, BatchLayout, Heads  # noqa: PLC0415

    size, heads = 16, Heads(8, 2, head_dim)
    counts = [-(-context // size) for _, context in lens]
    blocks = torch.randperm(sum(counts), dtype=torch.int32).split(counts)
    tables = torch.nn.utils.rnn.pad_sequence(list(blocks), batch_first=True).cuda()
    positions = torch.cat([torch.arange(context - length, context) for length, context in lens]).cuda()
    pages = torch.randn(2, sum(counts), 2, size, head_dim, device="cuda").bfloat16()
    q = torch.randn(len(positions), 8 * head_dim, device="cuda").bfloat16()
    lengths, contexts = zip(*lens, strict=True)
    results = []
    for kernels in (FlashInferKernels(flashinfer.BatchPrefillWithPagedKVCacheWrapper), CudaKernels()):
        batch = BatchLayout(lengths, contexts, positions, positions, tables)
        results.append(kernels.attention(q, heads, *pages, batch, AttentionOptions(head_dim**-0.5, **options)))
    torch.testing.assert_close(*results, atol=2e-2, rtol=2e-2)
