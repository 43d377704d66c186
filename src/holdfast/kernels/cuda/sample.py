"""Sampling: the largest of a row, Gumbel noise by Philox, and the thresholds of top-k, top-p and min-p.

Rows are tens of thousands of numbers long; a program owns one and walks it in blocks. A threshold is found by
bisection over the numbers' order-preserving integers, bit by bit from the top: exact, without sorting.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def order_key(x):
    """Integers int32 in the order of the floats; one for both zeros, and the largest for every NaN."""
    bits = (x.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, key)  # noqa: PLR0124


@triton.jit
def argmax_row(logits, out, stride, width, BLOCK: tl.constexpr):
    """The first of a row's largest numbers; a NaN counts as the largest."""
    row = tl.program_id(0).to(tl.int64)
    best = tl.full((BLOCK,), -0x80000000, tl.int32)
    where = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = order_key(tl.load(logits + row * stride + at, at < width, -float("inf")))
        better = (key > best) & (at < width)
        best, where = tl.where(better, key, best), tl.where(better, at, where)
    largest = tl.max(best)
    tl.store(out + row, tl.min(tl.where(best == largest, where, 0x7FFFFFFF)).to(tl.int64))


@triton.jit
def multiply(a, b: tl.constexpr):
    """The high and the low 32 bits of a · b, for uint32."""
    wide = a.to(tl.uint64) * b
    return (wide >> 32).to(tl.uint32), wide.to(tl.uint32)


@triton.jit
def noise_block(logits, seeds, positions, stride, width, BLOCK: tl.constexpr):
    """Add standard Gumbel noise to 4 · BLOCK numbers of a row: word w of Philox 4x32-10 (key: the seed; counter:
    token id // 4, the position) → -log(-log1p(-(w + ½) / 2^32)), in float64 up to the outer logarithm.
    Grid: (rows, blocks)."""
    row = tl.program_id(0).to(tl.int64)
    quad = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds + row)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = quad.to(tl.uint32)
    c1 = tl.zeros((BLOCK,), tl.uint32) + (tl.load(positions + row) & 0xFFFFFFFF).to(tl.uint32)
    c2, c3 = tl.zeros((BLOCK,), tl.uint32), tl.zeros((BLOCK,), tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = multiply(c0, 0xD2511F53)
        high1, low1 = multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9).to(tl.uint32), (k1 + 0xBB67AE85).to(tl.uint32)
    for i in tl.static_range(4):
        word = c0 if i == 0 else (c1 if i == 1 else (c2 if i == 2 else c3))
        uniform = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
        left = 1.0 - uniform  # what is lost here is put back by the factor: log1p as Kahan computes it
        noise = -tl.log((-tl.log(left) * (uniform / (1.0 - left))).to(tl.float32))
        at = quad * 4 + i
        numbers = logits + row * stride + at
        tl.store(numbers, tl.load(numbers, at < width, 0.0) + noise, at < width)


@triton.jit
def count_from(logits, width, least, floor, largest, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """How many numbers of a row have a key of at least `least` and `floor`, or with `MASS` the sum of
    exp(number - largest) over them."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + at, at < width, -float("inf"))
        key = order_key(x)
        counted = (key >= least) & (key >= floor) & (at < width)
        # an infinity less itself is not a number
        mass = tl.where(x == largest, 1.0, tl.exp(tl.where(x == largest, 0.0, x - largest))) if MASS else 1.0
        total += tl.where(counted, mass, 0.0)
    return tl.sum(total)


@triton.jit
def largest_reaching(logits, width, wanted, floor, largest, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key from which on a row counts (or weighs) at least `wanted`."""
    # the sign first: it counts the other way round
    positive = count_from(logits, width, 0, floor, largest, MASS, BLOCK) >= wanted
    found = tl.where(positive, 0, -0x80000000).to(tl.int32)
    for i in range(31):
        tried = found | (0x40000000 >> i)
        reached = count_from(logits, width, tried, floor, largest, MASS, BLOCK) >= wanted
        found = tl.where(reached, tried, found)
    return found


@triton.jit
def filter_row(logits, top_k, top_p, min_p, stride, width, BLOCK: tl.constexpr):
    """-inf for what min_p, then top_k, then top_p leave out; each a threshold that equal numbers pass together."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    k, p, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    if (k <= 0) & (p >= 1.0) & (least <= 0.0):
        return
    most = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.load(logits + at, at < width, -float("inf")))
    largest = tl.max(most)
    floor = order_key(tl.where(least > 0.0, largest + tl.log(tl.maximum(least, 1e-38)), -float("inf")))
    if (k > 0) & (k < width):
        floor = tl.maximum(floor, largest_reaching(logits, width, k.to(tl.float32), floor, largest, False, BLOCK))
    if p < 1.0:
        whole = count_from(logits, width, floor, floor, largest, True, BLOCK)
        reaching = largest_reaching(logits, width, tl.minimum(p * whole, whole), floor, largest, True, BLOCK)
        floor = tl.maximum(floor, tl.minimum(reaching, order_key(largest)))
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + at, at < width, 0.0)
        tl.store(logits + at, tl.where(order_key(x) >= floor, x, -float("inf")), at < width)
