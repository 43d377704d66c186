"""How a matrix lies in device memory, and how a tile of it becomes numbers.

Dense matrices lie as they are, [N, K]. Of a quantized one, the codes lie apart from the factors of their groups: int8
[N, K] (Q8_0), or two codes a byte, uint8 [N, K / 2], numbers 2i and 2i + 1 in byte i (Q4_0, Q4_1), and float16
scales (and minima) [N, K / 32]; or uint8 [N, K] (FP8) and float32 scales [N, K / 128].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdfast.kernels.interface import GROUP, Quantized

DENSE, Q8_0, Q4_0, Q4_1 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
FORMATS = {"Q8_0": 1, "Q4_0": 2, "Q4_1": 3, "FP8": 4}


@triton.jit
def load_factors(
    factors, rows, inside, first, end, width, GROUP_SIZE: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """float32 [HEIGHT, BLOCK]: what `load_weights` multiplies its numbers by, each factor loaded once, not once for
    every number of its group. A block begins with a group, or lies within one."""
    per_row = (width + GROUP_SIZE - 1) // GROUP_SIZE
    NUM: tl.constexpr = BLOCK // GROUP_SIZE if BLOCK > GROUP_SIZE else 1
    groups = first // GROUP_SIZE + tl.arange(0, NUM)
    mask = inside[:, None] & (groups[None, :] * GROUP_SIZE < end)
    some = tl.load(factors + rows[:, None] * per_row + groups[None, :], mask, 0.0).to(tl.float32)
    if NUM == 1:
        numbers = tl.broadcast_to(some, (HEIGHT, BLOCK))
    else:
        numbers = tl.reshape(tl.broadcast_to(some[:, :, None], (HEIGHT, NUM, BLOCK // NUM)), (HEIGHT, BLOCK))
    return numbers


@triton.jit
def load_weights(
    codes, scales, minima, rows, inside, first, end, width,
    FORMAT: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Numbers [HEIGHT, BLOCK] of the rows int64 [HEIGHT] at columns `first` (of a whole group, if quantized; of FP8,
    of a whole block) and following, as stored if dense, else in float32; 0 where not `inside` [HEIGHT] and from
    column `end` on."""
    at = first + tl.arange(0, BLOCK)
    mask = inside[:, None] & (at[None, :] < end)
    if FORMAT == 0:
        numbers = tl.load(codes + rows[:, None] * width + at[None, :], mask, 0.0)
    elif FORMAT == 4:
        bits = tl.load(codes + rows[:, None] * width + at[None, :], mask, 0).to(tl.uint16)
        # sign, 4 bits of exponent and 3 of fraction, put where a half has them: its exponents are 8 more
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        scale = load_factors(scales, rows, inside, first, end, width, 128, HEIGHT, BLOCK)
        numbers = half.to(tl.float32) * 256.0 * scale
    else:
        scale = load_factors(scales, rows, inside, first, end, width, 32, HEIGHT, BLOCK)
        if FORMAT == 1:
            numbers = tl.load(codes + rows[:, None] * width + at[None, :], mask, 0).to(tl.float32) * scale
        else:
            pairs = first // 2 + tl.arange(0, BLOCK // 2)
            some = inside[:, None] & (pairs[None, :] * 2 < end)
            both = tl.load(codes + rows[:, None] * (width // 2) + pairs[None, :], some, 0).to(tl.int32)
            code = tl.interleave(both & 15, both >> 4).to(tl.float32)
            if FORMAT == 2:
                numbers = (code - 8.0) * scale
            else:
                numbers = code * scale + load_factors(minima, rows, inside, first, end, width, 32, HEIGHT, BLOCK)
    return numbers


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix [N, K] on the device in one of the formats."""

    format: int
    codes: Tensor
    scales: Tensor | None = None
    minima: Tensor | None = None


def split(part: Quantized) -> Codes:
    """The codes and factors of a matrix, where its blocks are."""
    rows, columns = part.shape
    if part.format == "FP8":
        return Codes(FORMATS[part.format], part.blocks, part.scales)
    groups = columns // GROUP
    blocks = part.blocks.view(rows, groups, -1)
    scales = _halves(blocks[..., :2])
    if part.format == "Q8_0":
        return Codes(FORMATS[part.format], blocks[..., 2:].contiguous().view(torch.int8).view(rows, columns), scales)
    minima = _halves(blocks[..., 2:4]) if part.format == "Q4_1" else None
    halves = blocks[..., -GROUP // 2 :]  # byte i holds numbers i and i + 16
    numbers = torch.cat((halves & 15, halves >> 4), dim=-1)
    pairs = numbers[..., 0::2] | (numbers[..., 1::2] << 4)
    return Codes(FORMATS[part.format], pairs.reshape(rows, columns // 2).contiguous(), scales, minima)


def _halves(pairs: Tensor) -> Tensor:
    """uint8 [N, groups, 2] → float16 [N, groups]."""
    return pairs.contiguous().view(torch.float16).squeeze(-1)
