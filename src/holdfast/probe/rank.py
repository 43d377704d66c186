"""One rank of the probe: `python -m holdfast.probe.rank JOB`. It measures, prints what it found, and ends; or ends at
once when its parent, which holds the other end of its standard input, is gone."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import msgspec
import torch

from holdfast.cache.pages import KVPages, bytes_per_block
from holdfast.core.plan import Place, places
from holdfast.core.spec import DecoderSpec, LayerSpec
from holdfast.hardware.profile import Attention, Exchange, Exchanged, Format, Product, Reading
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
from holdfast.parallel.cuts import make_plan
from holdfast.parallel.segment import Layout, attach
from holdfast.parallel.shared import SharedCollectives
from holdfast.probe.job import Found, Job

ROWS = (1, 4, 16, 64, 256)
FORMATS: tuple[Format, ...] = ("bfloat16", "float32", "Q8_0", "Q4_0")
MOST_FLOP = 5e9
"""Of one round of products: with many rows some matrices of the pool suffice, since the caches do not help them."""
CONTEXTS = ((1, 1, 256), (1, 1, 2048), (8, 1, 256), (8, 1, 2048), (1, 256, 256), (1, 256, 2048))
"""Requests, new tokens of each, tokens that the last of them sees."""
HEADS = Heads(num_heads=16, num_kv_heads=4, head_dim=64)
BLOCK = 16
WIDTH, IN_A_ROW = 1024, 50
TIMEOUT = 60.0

SPEC = DecoderSpec(
    family="llama",
    vocab_size=8192,
    hidden_size=WIDTH,
    num_heads=64,
    num_kv_heads=64,
    head_dim=16,
    mlp_size=8192,
    max_positions=64,
    layers=(LayerSpec(), LayerSpec()),
    attention_scale=0.25,
)
"""A model whose exchanges are measured: it can be cut into up to 64 ranks."""


def layout_of(ranks: int, *, staged: bool) -> Layout:
    """The memory that the ranks of a job share."""
    plan = make_plan(SPEC, pipeline=ranks) if staged else make_plan(SPEC, tensor=ranks)
    return Layout(plan.replicas[0], SPEC, max(ROWS), max(ROWS))


class Rank:
    """One rank's kernels and way to the others."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.kernels = CpuKernels(torch.bfloat16, job.threads)
        # Others than these: a guard that waits for other ranks watches over every program of its kernels.
        self.exchanging = CpuKernels(torch.float32, 1)
        self.collectives: SharedCollectives | None = None
        self.together: Callable[[], object] = lambda: None
        """Returns when all ranks have come so far."""
        if job.descriptor is None:
            return
        layout = layout_of(job.ranks, staged=job.staged)
        plan = make_plan(SPEC, pipeline=job.ranks) if job.staged else make_plan(SPEC, tensor=job.ranks)
        place: Place = places(plan.replicas[0])[job.rank]
        memory = attach(job.descriptor, layout)
        self.collectives = SharedCollectives(self.exchanging, SPEC, place, layout, memory, TIMEOUT)
        if not job.staged:
            meet = torch.zeros(1, WIDTH)
            collectives = self.collectives
            self.together = lambda: collectives.all_reduce([meet], collectives.trees.mlp)

    def least(self, work: Callable[[], object]) -> float:
        """Seconds of the fastest of all rounds, each begun by all ranks at once; the first is not counted."""
        seconds = []
        for _ in range(self.job.rounds + 1):
            self.together()
            begun = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begun)
        return min(seconds[1:])

    def shared(self) -> dict[str, int]:
        return {"ranks": self.job.ranks, "threads": self.job.threads}


def measure(job: Job) -> Found:
    """All that this job measures."""
    rank = Rank(job)
    try:
        return _measure(rank, job)
    except BaseException:
        if rank.collectives is not None:
            rank.collectives.abort()  # the others do not wait for us
        raise


def _measure(rank: Rank, job: Job) -> Found:
    if job.staged:
        return Found(kernels=rank.kernels.name, exchanges=tuple(_sends(rank)))
    return Found(
        kernels=rank.kernels.name,
        readings=(_reading(rank),),
        products=tuple(_products(rank)),
        attentions=tuple(_attentions(rank)),
        exchanges=tuple(_exchanges(rank)),
    )


def _reading(rank: Rank) -> Reading:
    """Memory, read as fast as torch adds up."""
    data = torch.ones(rank.job.pool_bytes // 4)
    seconds = rank.least(data.sum)
    return Reading(**rank.shared(), num_bytes=data.numel() * 4 * rank.job.ranks, seconds=seconds)


def _products(rank: Rank) -> Iterator[Product]:
    for format in FORMATS:
        kernels = CpuKernels(torch.float32, rank.job.threads) if format == "float32" else rank.kernels
        for size in rank.job.sizes:
            matrix = _matrix(format, size)
            count = max(2, -(-rank.job.pool_bytes // _bytes_of(matrix)))  # one alone would stay in a large cache
            packed = [kernels.pack([matrix]) for _ in range(count)]
            for rows in ROWS:
                used = packed[: max(1, int(MOST_FLOP / (2 * rows * size * size)))]
                seconds = _product_seconds(rank, kernels, used, rows, size)
                yield Product(**rank.shared(), format=format, rows=rows, inputs=size, outputs=size, seconds=seconds)


def _product_seconds(
    rank: Rank, kernels: CpuKernels, weights: Sequence[PackedMatrix], rows: int, inputs: int
) -> float:
    def forward(token_ids: torch.Tensor, _: BatchLayout) -> torch.Tensor:
        x = kernels.executor.new(token_ids.shape[0], inputs, kernels.dtype)
        x.zero_()
        for weight in weights:
            y = kernels.linear(x, weight)
        return y

    program = kernels.record(forward, rows)
    return rank.least(lambda: program(*_step(rows))) / len(weights)


def _matrix(format: Format, size: int) -> Matrix:
    match format:
        case "float32" | "bfloat16":
            return torch.zeros(size, size, dtype=getattr(torch, format))
    return Quantized(format, torch.zeros(size, size // GROUP * GROUP_BYTES[format], dtype=torch.uint8))


def _bytes_of(matrix: Matrix) -> int:
    numbers = matrix.blocks if isinstance(matrix, Quantized) else matrix
    return numbers.numel() * numbers.element_size()


def _attentions(rank: Rank) -> Iterator[Attention]:
    for requests, queries, context in CONTEXTS:
        yield Attention(
            **rank.shared(),
            dtype="bfloat16",
            requests=requests,
            queries=queries,
            context=context,
            num_heads=HEADS.num_heads,
            num_kv_heads=HEADS.num_kv_heads,
            head_dim=HEADS.head_dim,
            seconds=_attention_seconds(rank, requests, queries, context),
        )


def _attention_seconds(rank: Rank, requests: int, queries: int, context: int) -> float:
    """Of one layer; run over as many as the pool has room for keys and values of."""
    kernels, blocks = rank.kernels, requests * context // BLOCK
    layer_bytes = bytes_per_block(1, HEADS.num_kv_heads, HEADS.head_dim, BLOCK, kernels.dtype) * blocks
    pages = KVPages.allocate(
        num_layers=min(64, max(1, rank.job.pool_bytes // layer_bytes)),
        num_blocks=blocks,
        num_kv_heads=HEADS.num_kv_heads,
        head_dim=HEADS.head_dim,
        block_size=BLOCK,
        dtype=kernels.dtype,
        device=torch.device("cpu"),
    )
    options = AttentionOptions(scale=HEADS.head_dim**-0.5)

    def forward(token_ids: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        q = kernels.executor.new(token_ids.shape[0], HEADS.num_heads * HEADS.head_dim, kernels.dtype)
        q.zero_()
        for k, v in zip(pages.k, pages.v, strict=True):
            y = kernels.attention(q, HEADS, k, v, layout, options)
        return y

    rows = requests * queries
    tables = torch.arange(blocks, dtype=torch.int32).view(requests, -1)
    positions = torch.arange(context - queries, context).repeat(requests)
    batch = BatchLayout((queries,) * requests, (context,) * requests, positions, positions, tables)
    program, ids = kernels.record(forward, rows), torch.zeros(rows, dtype=torch.int64)
    return rank.least(lambda: program(ids, batch)) / len(pages.k)


def _exchanges(rank: Rank) -> Iterator[Exchange]:
    collectives = rank.collectives
    if collectives is None:
        return
    kernels, width = rank.exchanging, SPEC.vocab_size // rank.job.ranks

    def all_reduce(token_ids: torch.Tensor, _: BatchLayout) -> torch.Tensor:
        partial = kernels.executor.new(token_ids.shape[0], WIDTH, torch.float32)
        partial.zero_()
        for _i in range(IN_A_ROW):
            y = collectives.all_reduce([partial], collectives.trees.mlp)
        return y

    def all_gather(token_ids: torch.Tensor, _: BatchLayout) -> torch.Tensor:
        logits = kernels.executor.new(token_ids.shape[0], width, torch.float32)
        logits.zero_()
        for _i in range(IN_A_ROW):
            y = collectives.all_gather(logits)
        return y

    yield from _exchanged(rank, "all_reduce", all_reduce, WIDTH * 4)
    yield from _exchanged(rank, "all_gather", all_gather, width * rank.job.ranks * 4)


def _sends(rank: Rank) -> Iterator[Exchange]:
    """The first stage sends, the second receives: as fast as the slower of them."""
    collectives, kernels = rank.collectives, rank.exchanging
    assert collectives is not None

    def send(token_ids: torch.Tensor, _: BatchLayout) -> torch.Tensor:
        x = kernels.executor.new(token_ids.shape[0], WIDTH, torch.float32)
        x.zero_()
        for _i in range(IN_A_ROW):
            if collectives.place.is_first:
                collectives.send(x)
            else:
                y = collectives.receive(token_ids.shape[0])
        return x if collectives.place.is_first else y

    yield from _exchanged(rank, "send", send, WIDTH * 4)


def _exchanged(rank: Rank, operation: Exchanged, forward: Forward, row_bytes: int) -> Iterator[Exchange]:
    program = rank.exchanging.record(forward, max(ROWS))
    for rows in ROWS:
        run = partial(program, *_step(rows))
        seconds = rank.least(run) / IN_A_ROW
        yield Exchange(**rank.shared(), operation=operation, num_bytes=rows * row_bytes, seconds=seconds)


def _step(rows: int) -> tuple[torch.Tensor, BatchLayout]:
    ids, table = torch.zeros(rows, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int32)
    return ids, BatchLayout((rows,), (rows,), ids, ids, table)


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the parent is gone: it writes nothing
    os._exit(1)


def main() -> None:
    job = msgspec.json.decode(sys.argv[1], type=Job)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.sched_setaffinity(0, job.cores)
    torch.set_num_threads(job.threads)
    with torch.inference_mode():
        found = measure(job)
    sys.stdout.buffer.write(msgspec.json.encode(found))
    sys.stdout.flush()
    os._exit(0)  # the thread that waits for the parent does not keep us


if __name__ == "__main__":
    main()
