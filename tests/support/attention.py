"""Requests whose keys and values lie in scattered blocks of a backend's pages, and attention in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from holdfast.kernels.interface import AttentionOptions, BatchLayout, Heads, Kernels
from support.cpu import generator

Part = tuple[int, int, int]
"""(request, start, stop): queries at positions [start, stop) of a request."""


class Cached:
    """`lens`: tokens of each request, all in the cache, the same for every block size; written by
    `filled_by`, or the kernels themselves. What is nobody's is NaN."""

    def __init__(
        self,
        kernels: Kernels[Any],
        heads: Heads,
        lens: Sequence[int],
        *,
        block_size: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
        device: str = "cpu",
        filled_by: Kernels[Any] | None = None,
    ) -> None:
        random_ = generator(seed)
        self.device = device
        self.kernels, self.heads, self.lens, self.block_size = kernels, heads, lens, block_size
        columns = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
        self.qkv = [torch.randn(length, columns, generator=random_).to(dtype) for length in lens]
        widths = [-(-length // block_size) for length in lens]
        # block 0, which pads the tables, is nobody's
        self.blocks = (torch.randperm(sum(widths), generator=random_) + 1).split(widths)
        shape = (sum(widths) + 1, heads.num_kv_heads, block_size, heads.head_dim)
        self.k_pages, self.v_pages = (torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2))
        self.store([(request, 0, length) for request, length in enumerate(lens)], by=filled_by)

    def store(self, parts: Sequence[Part], by: Kernels[Any] | None = None) -> Tensor:
        """Write keys and values of these tokens into their pages; what becomes of the queries."""
        rows = torch.cat([self.qkv[request][start:stop] for request, start, stop in parts]).to(self.device)
        return (by or self.kernels).store_kv(rows, self.heads, self.k_pages, self.v_pages, self.layout(parts))

    def layout(self, parts: Sequence[Part]) -> BatchLayout:
        size = self.block_size
        tables = torch.zeros(len(parts), -(-max(stop for _, _, stop in parts) // size), dtype=torch.int32)
        positions, slots = [], []
        for row, (request, start, stop) in enumerate(parts):
            used = self.blocks[request][: -(-stop // size)]
            tables[row, : len(used)] = used
            positions.append(torch.arange(start, stop))
            slots.append(used[positions[-1] // size] * size + positions[-1] % size)
        return BatchLayout(
            query_lens=tuple(stop - start for _, start, stop in parts),
            context_lens=tuple(stop for _, _, stop in parts),
            positions=torch.cat(positions).to(self.device),
            slots=torch.cat(slots).to(self.device),
            block_tables=tables.to(self.device),
        )

    def split(self, request: int) -> list[Tensor]:
        """q, k and v [tokens, heads, D] of a request."""
        heads = self.heads
        sizes = [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads]
        return list(self.qkv[request].view(self.lens[request], -1, heads.head_dim).split(sizes, dim=1))

    def run(self, parts: Sequence[Part], options: AttentionOptions) -> Tensor:
        q = torch.cat([self.split(request)[0][start:stop].flatten(1) for request, start, stop in parts])
        return self.kernels.attention(
            q.to(self.device), self.heads, self.k_pages, self.v_pages, self.layout(parts), options
        )

    def expected(self, parts: Sequence[Part], options: AttentionOptions) -> Tensor:
        """The definition, in float64, of the numbers as they were rounded to the cache's dtype."""
        return torch.cat([self._expected(*part, options) for part in parts])

    def _expected(self, request: int, start: int, stop: int, options: AttentionOptions) -> Tensor:
        group = self.heads.num_heads // self.heads.num_kv_heads
        q, k, v = (x.double() for x in self.split(request))
        k, v = (x[:stop].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k) * options.scale
        if options.softcap is not None:
            scores = torch.tanh(scores / options.softcap) * options.softcap
        distance = torch.arange(stop) - torch.arange(start, stop)[:, None]
        if options.alibi_slopes is not None:
            scores += options.alibi_slopes.double()[:, None, None] * distance
        hidden = distance > 0
        if options.window is not None:
            hidden |= distance <= -options.window
        scores.masked_fill_(hidden, -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
