"""A layer's experts on the CPU, step by step; how a row's way through them ends depends on who holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.kernels.cpu import structs
from holdfast.kernels.cpu.operands import check_alike, numbers, rows_of
from holdfast.kernels.cpu.packing import PackedMatrix, weight_array
from holdfast.kernels.interface import Routing

if TYPE_CHECKING:
    from holdfast.kernels.cpu.kernels import CpuKernels


@dataclass(frozen=True, slots=True)
class Ownership:
    """Which pairs (row, expert) are whose: row t of expert e is group table[t % turns, e]'s; `mine` is our group.
    `table`: int64 [turns, E]. The counts are addresses of what to keep, see struct sort_op."""

    table: Tensor
    mine: int
    chosen_counts: int | None = None
    own_count: int | None = None

    @property
    def c(self) -> structs.Owners:
        turns, experts = self.table.shape
        return structs.Owners(table=numbers(self.table, torch.int64), turns=turns, experts=experts)


@dataclass(frozen=True, slots=True)
class Routed:
    """Which experts the rows of a step go to, and where these pairs (row, expert) are once sorted by expert."""

    chosen: int
    experts: int
    ids: Tensor
    """int64 [T, K], ascending."""
    shares: Tensor
    """float32 [T, K]."""
    offsets: Tensor
    """int64 [1, E + 1]: the first sorted place of each expert."""
    sources: Tensor
    """int64 [T, K], by sorted place: the row."""
    places: Tensor
    """int64 [T, K]: the sorted place."""

    @property
    def rows(self) -> int:
        return self.ids.shape[0]


def route(kernels: CpuKernels, logits: Tensor, routing: Routing, ownership: Ownership | None = None) -> Routed:
    """By the router's logits [T, E]. With an ownership, only pairs that are ours get places."""
    rows, experts = logits.shape
    chosen, new = routing.experts_per_token, kernels.executor.new
    assert 1 <= chosen <= experts
    ids, sources, places = (new(rows, chosen, torch.int64, dense=True) for _ in range(3))
    shares = new(rows, chosen, torch.float32, dense=True)
    offsets = new(1, experts + 1, torch.int64, dense=True)
    operation = structs.Route(
        logits=rows_of(logits),
        ids=ids.data_ptr(),
        shares=shares.data_ptr(),
        experts=experts,
        chosen=chosen,
        renormalize=routing.renormalize,
    )
    kernels.executor.run(operation, rows)
    sort = structs.Sort(
        ids=ids.data_ptr(),
        offsets=offsets.data_ptr(),
        sources=sources.data_ptr(),
        places=places.data_ptr(),
        experts=experts,
        chosen=chosen,
    )
    if ownership is not None:
        assert ownership.table.shape[1] == experts, (ownership.table.shape, experts)
        sort.owners, sort.self = ownership.c, ownership.mine
        sort.chosen_counts, sort.own_count = ownership.chosen_counts, ownership.own_count
    kernels.executor.run(sort, rows, keep=(ownership,))
    return Routed(chosen, experts, ids, shares, offsets, sources, places)


def into_experts(
    kernels: CpuKernels, x: Tensor, routed: Routed, up: Sequence[PackedMatrix], down: PackedMatrix
) -> Tensor:
    """Every pair's row of x through its expert's first matrix → [T · K, F], as `down`, one of the second, takes it.
    `up`: of all E experts; those without pairs only need to look like the others."""
    check_alike(up)
    x = kernels.as_operand(x, up[0])
    gathered = kernels.executor.new(routed.rows * routed.chosen, x.shape[1], x.dtype)
    gather = structs.Gather(
        x=rows_of(x),
        y=rows_of(gathered),
        sources=routed.sources.data_ptr(),
        width=x.shape[1],
        chosen=routed.chosen,
    )
    kernels.executor.run(gather, routed.rows)
    return _multiply(kernels, gathered, routed, up, kernels.operand_dtype(x.dtype, down))


def out_of_experts(kernels: CpuKernels, hidden: Tensor, routed: Routed, down: Sequence[PackedMatrix]) -> Tensor:
    """And through its second: → float32 [T · K, M]."""
    check_alike(down)
    return _multiply(kernels, hidden, routed, down, torch.float32)


def _multiply(
    kernels: CpuKernels, x: Tensor, routed: Routed, weights: Sequence[PackedMatrix], dtype: torch.dtype
) -> Tensor:
    y = kernels.executor.new(x.shape[0], weights[0].columns, dtype)
    kernels.product(
        x,
        y,
        weights[0],
        weight_array(weights),
        keep=(*weights,),
        offsets=routed.offsets,
        groups=routed.experts,
        per_row=routed.chosen,
    )
    return y


def combine(kernels: CpuKernels, out: Tensor, routed: Routed, dtype: torch.dtype, add_to: Tensor | None) -> Tensor:
    """The pairs' results, float32 [T · K, M], times their shares, row by row in expert-id order → [T, M]."""
    y = kernels.executor.result(routed.rows, out.shape[1], dtype, add_to)
    operation = structs.Combine(
        x=rows_of(out),
        y=rows_of(y),
        places=routed.places.data_ptr(),
        shares=routed.shares.data_ptr(),
        width=out.shape[1],
        chosen=routed.chosen,
        add=add_to is not None,
    )
    kernels.executor.run(operation, routed.rows)
    return y
