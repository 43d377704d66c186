"""What only a device can show: that its instructions sum alike in every tile, that graphs and steps launched ahead
change no token, that nothing waits for it, and that its memory can run out."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch

from holdfast.cache.pages import KVPages
from holdfast.cache.store import HASH_BYTES, StoreLayout, StoreMemory
from holdfast.core.plan import places
from holdfast.kernels.interface import AttentionOptions, Heads
from holdfast.kernels.reference import ReferenceKernels
from holdfast.kernels.select import select_kernels
from holdfast.models.inspect import inspect_model
from holdfast.models.load import load_decoder
from holdfast.parallel.cuts import make_plan
from holdfast.parallel.segment import create
from holdfast.worker.copier import BlockCopier
from support.attention import Cached
from support.checkpoints import random_model as random_weights
from support.checkpoints import run_chunks, run_interleaved, save
from support.cpu import generator, matrix, same_bits
from support.local import LocalEngine
from support.service import wait_for
from support.tiny import tiny_model
from unit.test_runner import requests

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(900),  # kernels are compiled
]
DEVICE = torch.device("cuda")
COUNTS = (1, 2, 16, 17, 33, 64, 65, 128, 129, 300)


def kernels(exactness: str = "plan", dtype: torch.dtype = torch.bfloat16):
    return select_kernels("cuda", dtype, exactness=exactness)


def moved(part):
    if isinstance(part, torch.Tensor):
        return part.to(DEVICE)
    return type(part)(part.format, part.blocks.to(DEVICE), None if part.scales is None else part.scales.to(DEVICE))


@pytest.mark.parametrize("kind", ["bfloat16", "Q8_0", "Q4_0", "Q4_1", "FP8"])
@pytest.mark.parametrize("shards", [(), tuple(range(256, 2049, 256))], ids=["whole", "8 shards"])
def test_a_row_of_a_wide_product_is_the_same_in_any_company(shards: tuple[int, ...], kind: str):
    """Every size of tile there is, over a K as long as a model's."""
    part, exact = matrix(kind, 1000, 2048, generator(0))
    mine = kernels().pack([moved(part)], shards=shards)
    x = torch.randn(300, 2048, generator=generator(1)).bfloat16()
    together = kernels().linear(x.to(DEVICE), mine, dtype=torch.float32)
    for count in COUNTS:
        for first in {0, 300 - count}:
            some = x[first : first + count].to(DEVICE)
            assert same_bits(kernels().linear(some, mine, dtype=torch.float32), together[first : first + count]), (
                count
            )
    expected = x.double() @ exact.T
    torch.testing.assert_close(together.double().cpu(), expected, atol=2e-2 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (9, 3, 64), (8, 1, 256), (4, 4, 96)])
@pytest.mark.parametrize("window", [None, 1500])
def test_a_query_is_the_same_as_a_decode_and_in_a_chunk(heads: int, kv_heads: int, head_dim: int, window: int | None):
    """Heads of real models, contexts of several splits."""
    cached = Cached(
        kernels(),
        Heads(heads, kv_heads, head_dim),
        [5000, 2100, 300],
        device="cuda",
        filled_by=ReferenceKernels(torch.bfloat16),
    )
    options = AttentionOptions(head_dim**-0.5, window=window)
    chunk = cached.run([(0, 4000, 5000)], options)
    for start in (4000, 4095, 4096, 4500, 4999):
        alone = cached.run([(0, start, start + 1)], options)
        assert same_bits(alone[0], chunk[start - 4000])
        company = cached.run([(1, 2000, 2100), (0, start, start + 1), (2, 299, 300)], options)
        assert same_bits(company[100], alone[0])
    expected = cached.expected([(0, 4990, 5000)], options)
    torch.testing.assert_close(chunk[990:].double().cpu(), expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("exactness", ["plan", "batch", "off"])
def test_a_model_by_each_exactness(exactness: str, tmp_path: Path):
    """plan and batch: the same bits alone, in company and in chunks; off: near them."""
    config = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    path = save(random_weights(**config, num_key_value_heads=4, max_position_embeddings=512), tmp_path)
    info, dice = inspect_model(path), generator(3)
    prompts = [torch.randint(3, 97, (length,), generator=dice).tolist() for length in (300, 40, 1, 33)]
    decoder = load_decoder(info, kernels(exactness), torch.bfloat16, DEVICE)
    alone = [run_chunks(decoder, tokens, [len(tokens)]) for tokens in prompts]
    if exactness != "off":
        assert all(map(torch.equal, run_interleaved(decoder, prompts, chunks=(1, 1, 3, 64)), alone))
    reference = load_decoder(info, ReferenceKernels(torch.float32), torch.float32, "cpu")
    for tokens, logits in zip(prompts, alone, strict=True):
        expected = run_chunks(reference, tokens, [len(tokens)])
        spread = expected.std()
        assert (logits.float().cpu() - expected).abs().max() < 0.25 * spread


@pytest.fixture
def engine(tmp_path: Path) -> LocalEngine:
    return LocalEngine(tiny_model(tmp_path), device="cuda", dtype="bfloat16", max_num_batched_tokens=4096)


def test_graphs_and_steps_ahead_change_no_token(engine: LocalEngine):
    runner = engine.runner
    graphs, eager = runner.forward, partial(runner.decoder.forward, kv=runner.pages)
    runner.forward, runner.runs_ahead = eager, False
    calm = [answer.content for answer in engine.run(requests(24, 256))]
    for runner.forward in (eager, graphs):
        for runner.runs_ahead, depth in ((False, 1), (True, 2)):
            engine.schedule(max_num_seqs=7)
            assert [answer.content for answer in engine.run(requests(24, 256), depth)] == calm


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_launch_waits_for_the_device(engine: LocalEngine):
    """A copy from memory that is not pinned, a number that the host asks for."""
    launch = engine.runner.launch

    def watched(step):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine.runner.launch = watched
    engine.runner.runs_ahead = True
    more = [([5, 6, 7], {"min_tokens": 3, "logit_bias": {5: 2.0}, "repetition_penalty": 1.2, "max_tokens": 9})]
    assert {answer.finish for answer in engine.run(requests(12, 256) + more, depth=2)} <= {"stop", "length"}


@pytest.mark.parametrize("depth", [1, 2])
def test_steps_that_the_allocator_refuses_are_tried_again_smaller(depth: int, tmp_path: Path):
    """Not an exception of ours: torch's own, wherever in a step it comes."""
    config = {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}
    path = save(random_weights(**config, max_position_embeddings=512), tmp_path)
    engine = LocalEngine(path, device="cuda", dtype="bfloat16", max_num_batched_tokens=4096)
    asked = [([i % 90 + 4] * 200, {"max_tokens": 6, "seed": i, "temperature": 1.0}) for i in range(40)]
    engine.schedule(prefix_caching=False)
    calm = [answer.content for answer in engine.run(asked)]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (32 << 20)) / total)
        before = torch.cuda.memory_stats()["num_ooms"]
        engine.schedule(prefix_caching=False)
        engine.runner.runs_ahead = depth == 2
        assert [answer.content for answer in engine.run(asked, depth)] == calm
        assert torch.cuda.memory_stats()["num_ooms"] > before, "there was memory enough"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_blocks_that_are_sent_and_restored_have_the_same_bits(tmp_path: Path):
    """Sent beside the steps: what a later one writes into a block does not get into its copy."""
    info = inspect_model(tiny_model(tmp_path))
    [place] = places(make_plan(info.spec).replicas[0])
    shape = {"num_layers": info.spec.num_layers, "num_kv_heads": info.spec.num_kv_heads}
    pages = KVPages.allocate(
        **shape, num_blocks=400, head_dim=info.spec.head_dim, block_size=16, dtype=torch.bfloat16, device=DEVICE
    )
    pages.data.normal_()
    before = pages.data.clone()
    layout = StoreLayout(400, info.spec.num_layers, info.spec.num_kv_heads, 16 * info.spec.head_dim * 2)
    descriptor = create(layout.num_bytes)
    try:
        copier = BlockCopier(pages, StoreMemory(descriptor, layout), place)
        entries = [(block, 399 - block, block.to_bytes(HASH_BYTES, "little")) for block in range(400)]
        for start in range(0, 400, 40):
            copier.save(entries[start : start + 40])
        pages.data.zero_()
        wait_for("all blocks in the store", lambda: copier.pump() or copier.is_idle, 30)
        assert copier.load(entries[::3]) == []
        assert torch.equal(pages.data[:, :, ::3], before[:, :, ::3])
        assert not pages.data[:, :, 1::3].any()
    finally:
        os.close(descriptor)
