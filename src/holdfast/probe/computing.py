"""What a rank of the probe computes by itself: memory read, matrix products, attention, work on rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from holdfast.cache.pages import KVPages, bytes_per_block
from holdfast.hardware.profile import Attention, Format, Product, Reading, RowOperation, RowWork
from holdfast.kernels.cpu.kernels import CpuKernels
from holdfast.kernels.cpu.packing import PackedMatrix
from holdfast.kernels.interface import (
    GROUP,
    GROUP_BYTES,
    AttentionOptions,
    BatchLayout,
    Forward,
    Heads,
    Matrix,
    Quantized,
)
from holdfast.probe.together import ROWS, WIDTH, Rank, step_of

FORMATS: tuple[Format, ...] = ("bfloat16", "float32", "Q8_0", "Q4_0", "Q4_1")
PART_BYTES, MOST_FLOP = 8e6, 1.5e9
"""Of the matrices that are timed together: soon done, so that one time or other nobody disturbs them. A product that
is more by itself is left out: with many rows the size of the matrix hardly matters."""
SHARDS, MOST_SHARDED = 8, 4096
CONTEXTS = ((1, 1, 64), (8, 1, 64), (8, 1, 256), (8, 1, 2048), (1, 256, 256), (1, 256, 2048))
"""Requests, new tokens of each, tokens that the last of them sees."""
HEADS = (Heads(num_heads=16, num_kv_heads=4, head_dim=64), Heads(num_heads=4, num_kv_heads=4, head_dim=64))
"""Four query heads of a KV head are as many as share its keys at a time (csrc/attention.inc), one as few."""
BLOCK = 16
SMALL, IN_A_ROW = 64, 50
LOGITS = 32_768
FEW, MANY = 1, 64


def reading(rank: Rank) -> Reading:
    """Memory, read as fast as torch adds up."""
    data = torch.ones(rank.job.pool_bytes // 4)
    seconds = rank.least(data.sum)
    return Reading(**rank.shared(), num_bytes=data.numel() * 4 * rank.job.ranks, seconds=seconds)


# --- products ---


def products(rank: Rank) -> Iterator[Product]:
    """Of small matrices, which are cached; of larger ones from memory, plain and in shards."""
    for format in rank.job.formats:
        kernels = CpuKernels(torch.float32, rank.job.threads) if format == "float32" else rank.kernels
        packed = [kernels.pack([_matrix(format, SMALL)])] * IN_A_ROW
        yield from _by_rows(rank, kernels, packed, format, SMALL, cached=True)
        for size in rank.job.sizes:
            matrix = _matrix(format, size)
            count = max(2, -(-rank.job.pool_bytes // _bytes_of(matrix)))  # one alone would stay in a large cache
            packed = [kernels.pack([matrix]) for _ in range(count)]
            yield from _by_rows(rank, kernels, packed, format, size)
            if size < MOST_SHARDED:
                ends = [size // SHARDS * (shard + 1) for shard in range(SHARDS)]
                packed = [kernels.pack([matrix], shards=ends) for _ in range(count)]
                if packed[0].format == format:  # no shard ends within a group
                    yield from _by_rows(rank, kernels, packed, format, size, shards=SHARDS)


def _by_rows(  # noqa: PLR0917
    rank: Rank,
    kernels: CpuKernels,
    packed: Sequence[PackedMatrix],
    format: Format,
    size: int,
    shards: int = 1,
    *,
    cached: bool = False,
) -> Iterator[Product]:
    for rows in ROWS:
        if (flop := 2 * rows * size * size) > MOST_FLOP:
            return
        at_once = min(len(packed), max(1, int(PART_BYTES // packed[0].memory.nbytes)), int(MOST_FLOP / flop))
        parts = [packed[at : at + at_once] for at in range(0, len(packed) - at_once + 1, at_once)]
        parts = parts[: max(1, int(2 * MOST_FLOP / (flop * at_once)))]
        programs = [_program(kernels, part, rows, size) for part in parts]
        step = step_of(rows)
        yield Product(
            **rank.shared(),
            format=format,
            rows=rows,
            inputs=size,
            outputs=size,
            shards=shards,
            cached=cached,
            seconds=rank.least(*(partial(program, *step) for program in programs)) / at_once,
        )


def _program(kernels: CpuKernels, weights: Sequence[PackedMatrix], rows: int, inputs: int) -> Forward:
    def forward(token_ids: torch.Tensor, _: BatchLayout) -> torch.Tensor:
        x = kernels.executor.new(token_ids.shape[0], inputs, kernels.dtype)
        x.normal_()
        for weight in weights:
            y = kernels.linear(x, weight)
        return y

    return kernels.record(forward, rows)


def _matrix(format: Format, size: int) -> Matrix:
    match format:
        case "float32" | "bfloat16":
            return torch.randn(size, size, dtype=getattr(torch, format))
    return Quantized(format, torch.ones(size, size // GROUP * GROUP_BYTES[format], dtype=torch.uint8))


def _bytes_of(matrix: Matrix) -> int:
    numbers = matrix.blocks if isinstance(matrix, Quantized) else matrix
    return numbers.numel() * numbers.element_size()


# --- attention ---


def attentions(rank: Rank) -> Iterator[Attention]:
    for heads in HEADS:
        for requests, queries, context in CONTEXTS:
            yield Attention(
                **rank.shared(),
                dtype="bfloat16",
                requests=requests,
                queries=queries,
                context=context,
                num_heads=heads.num_heads,
                num_kv_heads=heads.num_kv_heads,
                head_dim=heads.head_dim,
                seconds=_attention_seconds(rank, heads, requests, queries, context),
            )


def _attention_seconds(rank: Rank, heads: Heads, requests: int, queries: int, context: int) -> float:
    """Of one layer; run over as many as the pool has room for keys and values of."""
    kernels = rank.kernels
    pages = _pages(rank, heads, requests * context // BLOCK, 256 if queries == 1 else 8)
    pages.data.normal_()
    options = AttentionOptions(scale=heads.head_dim**-0.5)

    def forward(token_ids: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        q = kernels.executor.new(token_ids.shape[0], heads.num_heads * heads.head_dim, kernels.dtype)
        q.normal_()  # as the keys: what changes the largest score so far costs more
        for k, v in zip(pages.k, pages.v, strict=True):
            y = kernels.attention(q, heads, k, v, layout, options)
        return y

    rows = requests * queries
    tables = torch.arange(requests * context // BLOCK, dtype=torch.int32).view(requests, -1)
    positions = torch.arange(context - queries, context).repeat(requests)
    batch = BatchLayout((queries,) * requests, (context,) * requests, positions, positions, tables)
    program, ids = kernels.record(forward, rows), torch.zeros(rows, dtype=torch.int64)
    return rank.least(lambda: program(ids, batch)) / len(pages.k)


def _pages(rank: Rank, heads: Heads, blocks: int, most: int) -> KVPages:
    """Of as many layers as the pool has room for, `most` of them."""
    dtype = rank.kernels.dtype
    layer_bytes = bytes_per_block(1, heads.num_kv_heads, heads.head_dim, BLOCK, dtype) * blocks
    return KVPages.allocate(
        num_layers=min(most, max(1, rank.job.pool_bytes // layer_bytes)),
        num_blocks=blocks,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        block_size=BLOCK,
        dtype=dtype,
        device=torch.device("cpu"),
    )


# --- rows ---


def row_works(rank: Rank) -> Iterator[RowWork]:
    for rows in (FEW, MANY):
        yield _row_work(rank, "norm", rows, WIDTH, _norms(rank))
        heads = HEADS[0]
        width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
        yield _row_work(rank, "store_kv", rows, width, _stores(rank, width))
        yield _row_work(rank, "argmax", rows, LOGITS, _choices(rank))


def _row_work(rank: Rank, operation: RowOperation, rows: int, width: int, forward: Forward) -> RowWork:
    program = rank.kernels.record(forward, rows)
    seconds = rank.least(lambda: program(*step_of(rows))) / IN_A_ROW
    return RowWork(**rank.shared(), operation=operation, rows=rows, width=width, seconds=seconds)


def _norms(rank: Rank) -> Forward:
    def forward(token_ids: torch.Tensor, _: BatchLayout) -> torch.Tensor:
        x = rank.kernels.executor.new(token_ids.shape[0], WIDTH, torch.float32)
        x.normal_()
        weight = torch.ones(WIDTH)
        for _i in range(IN_A_ROW):
            y = rank.kernels.rms_norm(x, weight, 1e-5, rank.kernels.dtype)
        return y

    return forward


def _stores(rank: Rank, width: int) -> Forward:
    rope = torch.zeros(MANY, 2, HEADS[0].head_dim // 2)
    heads = Heads(HEADS[0].num_heads, HEADS[0].num_kv_heads, HEADS[0].head_dim, rope=rope)
    pages = _pages(rank, heads, MANY // BLOCK, IN_A_ROW)

    def forward(token_ids: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        qkv = rank.kernels.executor.new(token_ids.shape[0], width, rank.kernels.dtype)
        qkv.normal_()
        for index in range(IN_A_ROW):
            layer = index % len(pages.k)
            y = rank.kernels.store_kv(qkv, heads, pages.k[layer], pages.v[layer], layout)
        return y

    return forward


def _choices(rank: Rank) -> Forward:
    def forward(token_ids: torch.Tensor, _: BatchLayout) -> torch.Tensor:
        logits = rank.kernels.executor.new(token_ids.shape[0], LOGITS, torch.float32)
        logits.normal_()
        for _i in range(IN_A_ROW):
            y = rank.kernels.argmax(logits)
        return y

    return forward
