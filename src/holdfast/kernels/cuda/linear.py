"""Matrix products whose sums over K take one order, however many rows share the call.

A tile is computed transposed, weights [BLOCK_N, K] · rows [K, BLOCK_T]: then the side of the matrix instruction that
stands for weights is the same for one row and for thousands, and only the other one varies. K is walked in steps of
`BLOCK_K`, shard by shard; the sums of virtual shards meet in a binary tree, in registers, or, when one call is to
keep more of the device busy, by way of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from holdfast.core.spec import Activation
from holdfast.kernels.cuda.formats import Codes, load_weights
from holdfast.kernels.cuda.rows import soft_cap

ACTIVATIONS: dict[Activation | None, int] = {None: 0, "silu": 1, "relu": 2, "gelu": 3, "gelu_tanh": 4}
MAX_SHARDS = 128
FUSED_SHARDS = 8
"""More than so many shards always meet by way of memory: each level of the tree takes registers."""
FEW_ROWS = 64
"""Up to so many rows, a shard gets a program of its own: one alone would leave the device idle."""
WHOLE, ONE_SHARD, JOIN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceMatrix:
    """[N, K] on the device, with what follows the product; [2N, K] of codes if gated, the gate first."""

    codes: Codes
    rows: int
    columns: int
    bias: Tensor | None
    """float32 [N] or [2N]."""
    activation: int
    gated: bool
    shard_ends: Tensor
    """int32 [shards]."""
    align: int
    """The largest power of two up to 16 that divides all of them."""

    @property
    def num_shards(self) -> int:
        return self.shard_ends.shape[0]

    @property
    def nbytes(self) -> int:
        parts = (self.codes.codes, self.codes.scales, self.codes.minima)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def addresses(self) -> list[int]:
        """Of codes, scales, minima and bias; 0 for what there is not."""
        parts = (self.codes.codes, self.codes.scales, self.codes.minima, self.bias)
        return [0 if part is None else part.data_ptr() for part in parts]


@triton.jit
def activate(x, KIND: tl.constexpr):
    if KIND == 1:
        x = x / (1.0 + tl.exp(-x))
    elif KIND == 2:
        x = tl.where(x < 0, 0.0, x)
    elif KIND == 3:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 4:
        x = 0.5 * x * (1.0 + soft_cap(0.7978845608028654 * (x + 0.044715 * x * x * x), 1.0))
    return x


@triton.jit
def product(
    codes, scales, minima, x, x_rows, x_stride, rows, rows_inside, t_inside, start, end, width,
    FORMAT: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_N, BLOCK_T]: rows of the matrix · rows of x, over columns [start, end)."""
    sums = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for first in range(start, end, BLOCK_K):
        at = first + tl.arange(0, BLOCK_K)
        w = load_weights(codes, scales, minima, rows, rows_inside, first, end, width, FORMAT, BLOCK_N, BLOCK_K)
        mask = (at[:, None] < end) & t_inside[None, :]
        numbers = tl.load(x + x_rows[None, :] * x_stride + at[:, None], mask, 0.0)
        sums = tl.dot(w.to(DOT), numbers.to(DOT), sums, input_precision="ieee")
    return sums


@triton.jit
def linear_tile(
    codes, scales, minima, bias, ends, x, x_rows, x_stride, y, y_rows, y_stride, t_inside, partial, num_rows,
    n_tile, shard, N, K,
    STAGE: tl.constexpr, FORMAT: tl.constexpr, DOT: tl.constexpr, SHARDS: tl.constexpr, ALIGN: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y. `x_rows` and `y_rows` int64 [BLOCK_T]: which rows; `partial` float32 [shards, rows, N]. `ALIGN`
    divides all ends: where that is not known, numbers are loaded one by one."""
    columns = n_tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    inside = columns < N
    mask = inside[:, None] & t_inside[None, :]
    at_partial = y_rows[None, :] * N + columns[:, None]
    if STAGE == ONE_SHARD:
        start = tl.multiple_of(tl.load(ends + shard - 1, shard > 0, 0), ALIGN)
        end = tl.multiple_of(tl.load(ends + shard), ALIGN)
        sums = product(
            codes, scales, minima, x, x_rows, x_stride, columns, inside, t_inside, start, end, K,
            FORMAT, DOT, BLOCK_N, BLOCK_T, BLOCK_K,
        )  # fmt: skip
        tl.store(partial + shard.to(tl.int64) * num_rows * N + at_partial, sums, mask)
        return
    # sums of 1, 2, 4 … shards that wait for those to their right
    level0, level1, level2, level3, level4, level5, level6 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for s in tl.static_range(SHARDS):
        if STAGE == JOIN:
            sums = tl.load(partial + tl.full((), s, tl.int64) * num_rows * N + at_partial, mask, 0.0)
        else:
            start, end = 0, K
            if s > 0:
                start = tl.multiple_of(tl.load(ends + s - 1), ALIGN)
            if s < SHARDS - 1:
                end = tl.multiple_of(tl.load(ends + s), ALIGN)
            sums = product(
                codes, scales, minima, x, x_rows, x_stride, columns, inside, t_inside, start, end, K,
                FORMAT, DOT, BLOCK_N, BLOCK_T, BLOCK_K,
            )  # fmt: skip
        # as a binary counter adds one: subtrees of equal size join while s ends in ones; after the last shard, all
        if (s & 1) == 1:
            sums = level0 + sums
        if (s & 3) == 3 or (s == SHARDS - 1 and (s & 2) == 2):
            sums = level1 + sums
        if (s & 7) == 7 or (s == SHARDS - 1 and (s & 4) == 4):
            sums = level2 + sums
        if (s & 15) == 15 or (s == SHARDS - 1 and (s & 8) == 8):
            sums = level3 + sums
        if (s & 31) == 31 or (s == SHARDS - 1 and (s & 16) == 16):
            sums = level4 + sums
        if (s & 63) == 63 or (s == SHARDS - 1 and (s & 32) == 32):
            sums = level5 + sums
        if s == SHARDS - 1 and (s & 64) == 64:
            sums = level6 + sums
        if (s & 1) == 0:
            level0 = sums
        elif (s & 3) == 1:
            level1 = sums
        elif (s & 7) == 3:
            level2 = sums
        elif (s & 15) == 7:
            level3 = sums
        elif (s & 31) == 15:
            level4 = sums
        elif (s & 63) == 31:
            level5 = sums
        else:
            level6 = sums
    if BIASED:
        sums += tl.load(bias + columns, inside, 0.0)[:, None]
    sums = activate(sums, ACTIVATION)
    if GATED:
        up = product(
            codes, scales, minima, x, x_rows, x_stride, columns + N, inside, t_inside, 0, K, K,
            FORMAT, DOT, BLOCK_N, BLOCK_T, BLOCK_K,
        )  # fmt: skip
        if BIASED:
            up += tl.load(bias + N + columns, inside, 0.0)[:, None]
        sums *= up
    out = y + y_rows[None, :] * y_stride + columns[:, None]
    if ADD:
        sums += tl.load(out, mask, 0.0).to(tl.float32)
    tl.store(out, sums.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    codes, scales, minima, bias, ends, x, x_stride, y, y_stride, partial, num_rows, N, K,
    STAGE: tl.constexpr, FORMAT: tl.constexpr, DOT: tl.constexpr, SHARDS: tl.constexpr, ALIGN: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of x through one matrix. Grid: (tiles of rows, tiles of N, shards if `ONE_SHARD`): programs that run at
    the same time share weights, so that memory is read for them once, and rows come from the L2 cache."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    linear_tile(
        codes, scales, minima, bias, ends, x, rows, x_stride, y, rows, y_stride, rows < num_rows, partial, num_rows,
        tl.program_id(1), tl.program_id(2), N, K,
        STAGE, FORMAT, DOT, SHARDS, ALIGN, BIASED, ACTIVATION, GATED, ADD, BLOCK_N, BLOCK_T, BLOCK_K,
    )  # fmt: skip


@triton.jit
def experts_kernel(
    table, ends, offsets, order, x, x_stride, y, y_stride, N, K, num_experts, per_row,
    FORMAT: tl.constexpr, HELD: tl.constexpr, DOT: tl.constexpr, SHARDS: tl.constexpr, ALIGN: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, GATHER: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pairs of (row, expert), sorted by expert, each through its expert's matrix. `table` int64 [E, 4]: addresses of
    codes, scales, minima and bias. `offsets` int64 [E + 1]: where an expert's pairs begin; `order` int64 [pairs]: the
    pair's place before sorting, row · `per_row` + choice. With `GATHER` x holds rows and y the sorted pairs, else x
    the sorted pairs and y the pairs before sorting. Pairs behind the last expert's are left as they are. Grid: (tiles
    of N, as many tiles of pairs as there can be)."""
    experts = tl.arange(0, BLOCK_E)
    starts = tl.load(offsets + experts, experts < num_experts, 0)
    counts = tl.load(offsets + experts + 1, experts < num_experts, 0) - starts
    tiles = (counts + BLOCK_T - 1) // BLOCK_T
    tile_ends = tl.cumsum(tiles)
    tile = tl.program_id(1)
    if tile >= tl.sum(tiles):
        return
    expert = tl.sum((tile_ends <= tile).to(tl.int32))
    mine = experts == expert
    first = tl.sum(tl.where(mine, starts, 0)) + (tile - tl.sum(tl.where(mine, tile_ends - tiles, 0))) * BLOCK_T
    pairs = first + tl.arange(0, BLOCK_T)
    inside = pairs < tl.load(offsets + expert + 1)
    places = tl.load(order + pairs, inside, 0)
    rows = places // per_row if GATHER else pairs
    out_rows = pairs if GATHER else places
    at = table + expert * 4
    codes = tl.multiple_of(tl.load(at).to(tl.pointer_type(HELD)), 16)
    scales = tl.multiple_of(tl.load(at + 1).to(tl.pointer_type(tl.float32 if FORMAT == 4 else tl.float16)), 16)
    minima = tl.multiple_of(tl.load(at + 2).to(tl.pointer_type(tl.float16)), 16)
    bias = tl.load(at + 3).to(tl.pointer_type(tl.float32))
    linear_tile(
        codes, scales, minima, bias, ends, x, rows, x_stride, y, out_rows, y_stride, inside, y, 0,
        tl.program_id(0), 0, N, K,
        WHOLE, FORMAT, DOT, SHARDS, ALIGN, BIASED, ACTIVATION, GATED, False, BLOCK_N, BLOCK_T, BLOCK_K,
    )  # fmt: skip
