"""What FlashInfer would be handed: its tables and arguments mean the attention of the reference. Its own arithmetic
is for tests/gpu."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("for Triton's interpreter", allow_module_level=True)

from holdfast.core.errors import ConfigError
from holdfast.kernels.cuda.flash import WRAPPERS, FlashInferKernels, takes
from holdfast.kernels.interface import AttentionOptions, BatchLayout, Heads
from holdfast.kernels.reference import ReferenceKernels
from holdfast.kernels.select import select_kernels

SIZE, BLOCKS, G, D = 4, 40, 2, 64
HEADS = Heads(6, G, D)


class Wrapper:
    """`BatchPrefillWithPagedKVCacheWrapper` as its documentation describes it, in torch."""

    made: int = 0

    def __init__(self, workspace: torch.Tensor, kv_layout: str) -> None:
        assert (workspace.dtype, kv_layout) == (torch.uint8, "HND")
        self.workspace = workspace

    def plan(self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, **asked) -> None:
        for table in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len):
            assert table.dtype == torch.int32
        assert asked.pop("causal")
        self.planned = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, asked)

    def run(self, q: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor], *, out: torch.Tensor) -> None:
        begins, blocks_begin, blocks, last, asked = self.planned
        group = asked["num_qo_heads"] // asked["num_kv_heads"]
        for request in range(len(last)):
            mine = blocks[blocks_begin[request] : blocks_begin[request + 1]].long()
            length = (len(mine) - 1) * asked["page_size"] + int(last[request])
            keys, values = (
                x[mine].transpose(0, 1).flatten(1, 2)[:, :length].float().repeat_interleave(group, 0) for x in pages
            )
            rows = slice(begins[request], begins[request + 1])
            scores = q[rows].float().transpose(0, 1) @ keys.transpose(1, 2) * asked["sm_scale"]
            if asked["logits_soft_cap"]:
                scores = torch.tanh(scores / asked["logits_soft_cap"]) * asked["logits_soft_cap"]
            at = torch.arange(length - scores.shape[1], length)[:, None]
            seen = torch.arange(length) <= at
            if asked["window_left"] >= 0:
                seen &= torch.arange(length) >= at - asked["window_left"]
            out[rows] = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1).to(out.dtype)


def layout(lens: list[tuple[int, int]]) -> BatchLayout:
    """Of requests that compute so many tokens of a context of so many, their blocks scattered."""
    counts = [-(-context // SIZE) for _, context in lens]
    free, tables = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(1)).int(), []
    for count in counts:
        tables.append(torch.nn.functional.pad(free[:count], (0, max(counts) - count)))
        free = free[count:]
    positions = torch.cat([torch.arange(context - length, context) for length, context in lens])
    lengths, contexts = zip(*lens, strict=True)
    return BatchLayout(lengths, contexts, positions, positions, torch.stack(tables))


@pytest.mark.parametrize("lens", [[(5, 5)], [(1, 9), (3, 4), (1, 1), (8, 17)], [(2, 8), (1, 12), (4, 4)]])
@pytest.mark.parametrize(
    "options", [AttentionOptions(0.1), AttentionOptions(0.2, softcap=5.0), AttentionOptions(0.1, window=3)]
)
def test_tables_and_arguments(lens: list[tuple[int, int]], options: AttentionOptions):
    random_ = torch.Generator().manual_seed(0)
    k_pages, v_pages = torch.randn(2, BLOCKS, G, SIZE, D, generator=random_).bfloat16()
    q = torch.randn(sum(length for length, _ in lens), 6 * D, generator=random_).bfloat16()
    kernels = FlashInferKernels(Wrapper)
    for _ in range(WRAPPERS + 1):  # as many steps, of one kind of layer
        out = kernels.attention(q, HEADS, k_pages, v_pages, layout(lens), options)
        expected = ReferenceKernels(torch.bfloat16).attention(q, HEADS, k_pages, v_pages, layout(lens), options)
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


def test_layers_that_differ_have_plans_of_their_own_in_a_step():
    """Gemma's: one sees a window, the next does not, and both run in the same step."""
    pages, batch = torch.randn(2, BLOCKS, G, SIZE, D).bfloat16(), layout([(9, 9), (1, 5)])
    q, kernels = torch.randn(10, 6 * D).bfloat16(), FlashInferKernels(Wrapper)
    for options in (AttentionOptions(0.1, window=2), AttentionOptions(0.1)) * 2:
        out = kernels.attention(q, HEADS, *pages, batch, options)
        expected = ReferenceKernels(torch.bfloat16).attention(q, HEADS, *pages, layout([(9, 9), (1, 5)]), options)
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


def test_what_stays_with_our_kernels():
    """Decodes, whose steps are captured; heads, slopes and numbers that it does not take."""

    def refuse(*_: object) -> None:
        raise AssertionError("not FlashInfer's")

    pages, batch = torch.randn(2, BLOCKS, G, SIZE, D).bfloat16(), layout([(1, 9), (1, 5)])
    out = FlashInferKernels(refuse).attention(
        torch.randn(2, 6 * D).bfloat16(), HEADS, *pages, batch, AttentionOptions(0.1)
    )
    assert out.isfinite().all()
    assert takes(HEADS, AttentionOptions(0.1), torch.float16)
    assert not takes(HEADS, AttentionOptions(0.1), torch.float32)
    assert not takes(Heads(6, G, 80), AttentionOptions(0.1), torch.bfloat16)
    assert not takes(HEADS, AttentionOptions(0.1, alibi_slopes=torch.ones(6)), torch.bfloat16)


def test_it_is_refused_by_name_where_it_cannot_be():
    with pytest.raises(ConfigError, match="--attention-backend flashinfer: needs --exactness off"):
        select_kernels("cuda", attention="flashinfer")
    with pytest.raises(ConfigError, match="--attention-backend flashinfer: works on GPUs only"):
        select_kernels("cpu", exactness="off", attention="flashinfer")
    if find_spec("flashinfer") is None:
        with pytest.raises(ConfigError, match="--attention-backend flashinfer: FlashInfer cannot be imported"):
            select_kernels("cuda", exactness="off", attention="flashinfer")
