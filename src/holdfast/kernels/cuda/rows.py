"""Kernels over single rows: norms, conversions, embeddings, the combining of experts. One program per row, whose sums
run over the row alone."""

from __future__ import annotations

import triton
import triton.language as tl

from holdfast.kernels.cuda.formats import load_weights


@triton.jit
def norm_row(
    x, y, weight, bias, x_stride, y_stride, width, eps,
    CENTERED: tl.constexpr, BIASED: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (+)= RMS norm, or with `CENTERED` layer norm, of a row of x."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    numbers = tl.load(x + row * x_stride + at, inside, 0.0).to(tl.float32)
    if CENTERED:
        numbers = tl.where(inside, numbers - tl.sum(numbers) / width, 0.0)
    numbers *= tl.rsqrt(tl.sum(numbers * numbers) / width + eps)
    numbers *= tl.load(weight + at, inside, 0.0)
    if BIASED:
        numbers += tl.load(bias + at, inside, 0.0)
    out = y + row * y_stride + at
    if ADD:
        numbers += tl.load(out, inside, 0.0).to(tl.float32)
    tl.store(out, numbers.to(y.dtype.element_ty), inside)


@triton.jit
def convert_row(x, y, x_stride, y_stride, width, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """y = x in y's dtype, first through tanh(x / cap) · cap if `CAPPED`."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.load(x + row * x_stride + at, at < width, 0.0).to(tl.float32)
    if CAPPED:
        numbers = soft_cap(numbers, cap)
    tl.store(y + row * y_stride + at, numbers.to(y.dtype.element_ty), at < width)


@triton.jit
def soft_cap(x, cap):
    """tanh(x / cap) · cap. By an exponential of what is not positive: it cannot overflow."""
    small = tl.exp(-2.0 * tl.abs(x) / cap)
    tanh = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -tanh, tanh) * cap


@triton.jit
def embed_row(
    ids, codes, scales, minima, y, y_stride, height, width, factor, offset,
    FORMAT: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (+)= a row of the table times `factor`, or zeros, if it has no such row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    source = tl.load(ids + row) + offset + tl.zeros((1,), tl.int64)
    numbers = load_weights(
        codes, scales, minima, source, (source >= 0) & (source < height), 0, width, width, FORMAT, 1, BLOCK
    )
    numbers = tl.reshape(numbers.to(tl.float32), (BLOCK,)) * factor
    out = y + row * y_stride + at
    if ADD:
        numbers += tl.load(out, inside, 0.0)
    else:
        numbers += 0.0
    tl.store(out, numbers, inside)


@triton.jit
def combine_row(pairs, shares, y, y_stride, width, CHOSEN: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """y (+)= the sum over a row's experts, in ascending order, of share · what the expert returned (`pairs` [T · K,
    M] float32, row by row)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(CHOSEN):
        pair = row * CHOSEN + i
        total += tl.load(shares + pair) * tl.load(pairs + pair * width + at, at < width, 0.0)
    out = y + row * y_stride + at
    if ADD:
        total += tl.load(out, at < width, 0.0).to(tl.float32)
    tl.store(out, total.to(y.dtype.element_ty), at < width)


@triton.jit
def route_row(
    logits, ids, shares, stride, count,
    CHOSEN: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The `CHOSEN` largest shares (of the softmax) of a row and whose they are, in ascending order of id; a tie goes
    to the lowest id."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    scores = tl.load(logits + row * stride + at, at < count, -float("inf")).to(tl.float32)
    weights = tl.exp(scores - tl.max(scores))
    weights = weights / tl.sum(weights)
    # a NaN counts as the largest: there are always as many ids as are waited for
    left = tl.where(at < count, tl.where(weights != weights, 2.0, weights), -1.0)  # noqa: PLR0124
    for _ in tl.static_range(CHOSEN):
        best = tl.min(tl.where(left == tl.max(left), at, BLOCK))
        left = tl.where(at == best, -2.0, left)
    taken = left == -2.0
    place = tl.cumsum(taken.to(tl.int32)) - 1
    if RENORMALIZE:
        weights = weights / tl.sum(tl.where(taken, weights, 0.0))
    tl.store(ids + row * CHOSEN + place, at.to(tl.int64), taken)
    tl.store(shares + row * CHOSEN + place, weights, taken)
