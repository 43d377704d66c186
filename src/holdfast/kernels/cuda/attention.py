"""Attention over paged keys and values, and the way into the pages.

A query row walks the keys it sees in tiles of `KEY_TILE` at absolute positions with an online softmax; at every
multiple of `SPLIT` keys its state (largest score, sum, weighted values) is put aside, and the states are joined in
order. So a row's result depends on its own keys only: a prefill chunk, a decode, and a decode whose splits are
programs of their own do the same sums. Tiles are computed transposed, as in `linear`: keys · queries, values ·
weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from holdfast.kernels.cuda.rows import soft_cap

KEY_TILE = 64
SPLIT = 1024


@triton.jit
def place_head(
    qkv, q_out, k_pages, v_pages, slots, positions, rope, q_norm, k_norm, qkv_stride, q_stride, eps,
    H: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of a row of q, k, v: q and k normed and rotated, k and v written to the row's slot. Grid: (T, H + 2G).
    A slot of -1 (a row that only fills up a batch) is not written."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < D
    source = qkv + row * qkv_stride + head * D
    raw = tl.load(source + at, inside, 0.0)
    slot = tl.load(slots + row)
    if head >= H and slot < 0:
        return
    kv_head = tl.where(head < H + G, head - H, head - H - G)
    cell = ((slot // S * G + kv_head) * S + slot % S) * D
    if head >= H + G:
        tl.store(v_pages + cell + at, raw.to(v_pages.dtype.element_ty), inside)
        return
    other = tl.where(at < HALF, at + HALF, tl.where(at < 2 * HALF, at - HALF, at))
    numbers, partners = raw.to(tl.float32), tl.load(source + other, inside, 0.0).to(tl.float32)
    if NORMED:
        scale = tl.rsqrt(tl.sum(numbers * numbers) / D + eps)
        norm = q_norm if head < H else k_norm
        numbers *= scale * tl.load(norm + at, inside, 0.0)
        partners *= scale * tl.load(norm + other, inside, 0.0)
    if HALF > 0:
        turned = at < 2 * HALF
        angle = rope + tl.load(positions + row) * (2 * HALF) + tl.where(at < HALF, at, at - HALF)
        cos, sin = tl.load(angle, turned, 1.0), tl.load(angle + HALF, turned, 0.0)
        numbers = numbers * cos + tl.where(at < HALF, -partners, partners) * sin
    if head < H:
        tl.store(q_out + row * q_stride + head * D + at, numbers.to(q_out.dtype.element_ty), inside)
    else:
        tl.store(k_pages + cell + at, numbers.to(k_pages.dtype.element_ty), inside)


@triton.jit
def join(most, total, values, later_most, later_total, later_values):
    """The state of a later split joined to that of the earlier ones. A state that saw no key changes no bit.
    `most` [R], `total` [·, R], `values` [D, R]."""
    largest = tl.maximum(most, later_most)
    base = tl.where(largest == -float("inf"), 0.0, largest)
    old, new = tl.exp(most - base), tl.exp(later_most - base)
    total = total * old[None, :] + later_total * new[None, :]
    return largest, total, values * old[None, :] + later_values * new[None, :]


@triton.jit
def walk_split(
    q, k_pages, v_pages, table, kv_head, positions, slopes, first, end, scale, cap,
    G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    SLOPED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The state of q [BLOCK_D, ROWS] after the keys at positions [first, end); `first` is a multiple of TILE. The
    weights are summed as values are, by a product with ones (16 rows alike): in an order that no layout changes."""
    most = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((16, ROWS), tl.float32)
    ones = tl.full((16, TILE), 1.0, DOT)
    values = tl.zeros((BLOCK_D, ROWS), tl.float32)
    dims = tl.arange(0, BLOCK_D)
    for start in range(first, end, TILE):
        keys_at = start + tl.arange(0, TILE)
        there = keys_at < end
        block = tl.load(table + keys_at // S, there, 0).to(tl.int64)
        cells = ((block * G + kv_head) * S + keys_at % S) * D
        mask = there[:, None] & (dims[None, :] < D)
        keys = tl.load(k_pages + cells[:, None] + dims[None, :], mask, 0.0)
        scores = tl.dot(keys.to(DOT), q.to(DOT), input_precision="ieee") * scale
        if CAPPED:
            scores = soft_cap(scores, cap)
        distance = keys_at[:, None] - positions[None, :]
        if SLOPED:
            scores += slopes[None, :] * distance.to(tl.float32)
        seen = there[:, None] & (distance <= 0)
        if WINDOW > 0:
            seen = seen & (distance > -WINDOW)
        scores = tl.where(seen, scores, -float("inf"))
        largest = tl.maximum(most, tl.max(scores, 0))
        base = tl.where(largest == -float("inf"), 0.0, largest)
        weights, fade = tl.exp(scores - base[None, :]), tl.exp(most - base)
        some = tl.load(v_pages + cells[None, :] + dims[:, None], there[None, :] & (dims[:, None] < D), 0.0)
        shares = weights.to(some.dtype).to(DOT)
        total = tl.dot(ones, shares, total * fade[None, :], input_precision="ieee")
        values = tl.dot(some.to(DOT), shares, values * fade[None, :], input_precision="ieee")
        most = largest
    return most, total, values


@triton.jit(do_not_specialize=["table_width", "num_splits"])
def attend(
    q, out, k_pages, v_pages, tables, table_width, starts, lens, tiles, partial, slopes, q_stride, out_stride, scale,
    cap, num_splits,
    H: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    SLOPED: tl.constexpr, DECODE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, SPLIT_KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`HEADS` query heads of one KV head for `TOKENS` consecutive tokens of a request; row r is token r // HEADS,
    head r % HEADS. `starts` [B + 1]: where requests begin among the tokens; `lens` [B]: their context lengths.

    Prefill: `tiles` int32 [tiles, 2] names (request, first token of it); grid (tiles, G · head chunks). Decode: grid
    (B, G · head chunks, num_splits); requests of more than one token are left out, and one with several splits leaves
    their states in `partial` float32 [B, H, num_splits, D + 2] for `merge`. One without context, which only fills up
    a batch, gets zeros.
    """
    CHUNKS: tl.constexpr = (H // G + HEADS - 1) // HEADS
    kv_head, chunk = tl.program_id(1) // CHUNKS, tl.program_id(1) % CHUNKS
    if DECODE:
        request, skipped, split = tl.program_id(0), 0, tl.program_id(2)
    else:
        request, skipped, split = tl.load(tiles + tl.program_id(0) * 2), tl.load(tiles + tl.program_id(0) * 2 + 1), 0
    first_row = tl.load(starts + request)
    length, context = tl.load(starts + request + 1) - first_row, tl.load(lens + request)
    if DECODE and (length != 1 or (split > 0 and split * SPLIT_KEYS >= context)):
        return
    r = tl.arange(0, TOKENS * HEADS)
    token, group_head = skipped + r // HEADS, chunk * HEADS + r % HEADS
    inside = (token < length) & (group_head < H // G)
    head = kv_head * (H // G) + group_head
    positions = context - length + token
    dims = tl.arange(0, BLOCK_D)
    at_q = (first_row + token).to(tl.int64)[None, :] * q_stride + head[None, :] * D + dims[:, None]
    mask = inside[None, :] & (dims[:, None] < D)
    queries = tl.load(q + at_q, mask, 0.0)
    bias = tl.load(slopes + head, inside, 0.0) if SLOPED else positions
    first_position = context - length + skipped
    last = tl.minimum(first_position + TOKENS, context)  # of the tile, exclusive
    first = tl.maximum(first_position - WINDOW + 1, 0) // TILE * TILE if WINDOW > 0 else 0
    table = tables + request.to(tl.int64) * table_width
    if DECODE:
        begin = tl.maximum(first, split * SPLIT_KEYS)
        end = tl.minimum(last, (split + 1) * SPLIT_KEYS)
        most, total, values = walk_split(
            queries, k_pages, v_pages, table, kv_head, positions, bias, begin, end, scale, cap,
            G, S, D, WINDOW, CAPPED, SLOPED, TOKENS * HEADS, BLOCK_D, TILE, DOT,
        )  # fmt: skip
        if context > SPLIT_KEYS:
            at = partial + ((request.to(tl.int64) * H + head) * num_splits + split) * (D + 2)
            tl.store(at, most, inside)
            tl.store(at + 1, tl.max(total, 0), inside)
            tl.store(at[None, :] + 2 + dims[:, None], values, mask)
            return
    else:
        most = tl.full((TOKENS * HEADS,), -float("inf"), tl.float32)
        total = tl.zeros((16, TOKENS * HEADS), tl.float32)
        values = tl.zeros((BLOCK_D, TOKENS * HEADS), tl.float32)
        for split_start in range(first // SPLIT_KEYS * SPLIT_KEYS, last, SPLIT_KEYS):
            later_most, later_total, later_values = walk_split(
                queries, k_pages, v_pages, table, kv_head, positions, bias,
                tl.maximum(first, split_start), tl.minimum(last, split_start + SPLIT_KEYS), scale, cap,
                G, S, D, WINDOW, CAPPED, SLOPED, TOKENS * HEADS, BLOCK_D, TILE, DOT,
            )  # fmt: skip
            most, total, values = join(most, total, values, later_most, later_total, later_values)
    at_out = (first_row + token).to(tl.int64)[None, :] * out_stride + head[None, :] * D + dims[:, None]
    # a row that fills up the tile or the batch has seen nothing
    values = values / tl.where(inside & (context > 0), tl.max(total, 0), 1.0)[None, :]
    tl.store(out + at_out, values.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_splits"])
def merge(
    out, starts, lens, partial, out_stride, num_splits,
    H: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
):  # fmt: skip
    """Join the splits of a decode. Grid: (B, H)."""
    request, head = tl.program_id(0), tl.program_id(1)
    first_row, context = tl.load(starts + request), tl.load(lens + request)
    if tl.load(starts + request + 1) - first_row != 1 or context <= SPLIT_KEYS:
        return
    dims = tl.arange(0, BLOCK_D)
    one = tl.arange(0, 1)
    most = tl.full((1,), -float("inf"), tl.float32)
    total = tl.zeros((1, 1), tl.float32)
    values = tl.zeros((BLOCK_D, 1), tl.float32)
    first = tl.maximum(context - WINDOW, 0) // SPLIT_KEYS if WINDOW > 0 else 0
    states = partial + (request.to(tl.int64) * H + head) * num_splits * (D + 2)
    for split in range(first, (context + SPLIT_KEYS - 1) // SPLIT_KEYS):
        at = states + split * (D + 2)
        later = tl.load(at + 2 + dims[:, None] + one[None, :], dims[:, None] < D, 0.0)
        later_total = tl.load(at + 1 + one)[None, :]
        most, total, values = join(most, total, values, tl.load(at + one), later_total, later)
    at_out = out + first_row.to(tl.int64) * out_stride + head * D + dims[:, None] + one[None, :]
    tl.store(at_out, (values / total).to(out.dtype.element_ty), dims[:, None] < D)
