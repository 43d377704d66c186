"""Tensors on their way into C, which takes on trust what is checked here: shapes, dtypes, strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast.kernels.cpu.packing import PackedMatrix
from holdfast.kernels.cpu.structs import DTYPES, MAX_HEAD_DIM, Pages, Rows
from holdfast.kernels.interface import Heads


def rows_of(x: Tensor) -> Rows:
    assert x.dim() == 2, "rows"
    assert x.stride(1) == 1, "numbers side by side"
    return Rows(data=x.data_ptr(), stride=x.stride(0), dtype=DTYPES[str(x.dtype).removeprefix("torch.")])


def numbers(x: Tensor | None, dtype: torch.dtype, count: int | None = None) -> int | None:
    """The address of `count` numbers side by side."""
    if x is None:
        return None
    assert x.is_contiguous(), x.stride()
    assert x.dtype == dtype, f"{x.dtype} for {dtype}"
    assert count in {None, x.numel()}, f"{x.numel()} numbers for {count}"
    return x.data_ptr()


def shape_of_logits(x: Tensor) -> tuple[int, int]:
    """Rows, width."""
    assert x.dtype == torch.float32, x.dtype
    rows, width = x.shape
    return rows, width


def pages_of(k_pages: Tensor, v_pages: Tensor, heads: Heads, x: Tensor) -> Pages:
    """Pages of these heads, and of the dtype of the rows `x`."""
    _, kv_heads, block_size, head_dim = k_pages.shape
    assert k_pages.shape == v_pages.shape, (k_pages.shape, v_pages.shape)
    assert k_pages.is_contiguous(), k_pages.stride()
    assert v_pages.is_contiguous(), v_pages.stride()
    assert k_pages.dtype == v_pages.dtype == x.dtype, (k_pages.dtype, v_pages.dtype, x.dtype)
    assert (kv_heads, head_dim) == (heads.num_kv_heads, heads.head_dim), (k_pages.shape, heads)
    assert head_dim <= MAX_HEAD_DIM, f"heads of {head_dim} numbers, {MAX_HEAD_DIM} at most"
    return Pages(
        k=k_pages.data_ptr(),
        v=v_pages.data_ptr(),
        kv_heads=kv_heads,
        block_size=block_size,
        head_dim=head_dim,
        dtype=DTYPES[str(k_pages.dtype).removeprefix("torch.")],
    )


def check_alike(experts: Sequence[PackedMatrix]) -> None:
    """One operation multiplies with all of them: for their form it looks at the first only."""
    first = experts[0].c
    for expert in experts:
        for name in ("n", "k", "format", "panel_bytes", "gated", "activation"):
            assert getattr(expert.c, name) == getattr(first, name), f"experts differ in {name}"
