"""Microseconds of an all-reduce between processes of this machine, by size, beside Gloo's.

    python -m benchmarks.collectives [--ranks N]

Ours as operations of a step program, a hundred in a row, as a decode's layers run them; Gloo's in a loop of Python.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from holdfast.core.plan import places
from holdfast.core.spec import DecoderSpec, LayerSpec
from holdfast.kernels.cpu.kernels import CpuKernels
from holdfast.kernels.interface import BatchLayout
from holdfast.parallel.cuts import make_plan
from holdfast.parallel.segment import Layout, attach, create
from holdfast.parallel.shared import SharedCollectives

WIDTH, IN_A_ROW, ROUNDS = 2048, 100, 30
ROWS = (1, 8, 32, 256)
SPEC = DecoderSpec(
    family="llama",
    vocab_size=1024,
    hidden_size=WIDTH,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    mlp_size=8192,
    max_positions=64,
    layers=(LayerSpec(),),
    attention_scale=0.125,
)


def ours(rank: int, ranks: int, descriptor: int) -> dict[int, float]:
    replica = make_plan(SPEC, tensor=ranks).replicas[0]
    layout = Layout(replica, SPEC, max(ROWS), max(ROWS))
    kernels = CpuKernels(threads=1)
    memory = attach(descriptor, layout)
    collectives = SharedCollectives(kernels, SPEC, places(replica)[rank], layout, memory, 60.0)

    def forward(token_ids: torch.Tensor, batch: BatchLayout) -> torch.Tensor:
        partial = kernels.executor.new(token_ids.shape[0], WIDTH, torch.float32)
        for _ in range(IN_A_ROW):
            y = collectives.all_reduce([partial], collectives.trees.mlp)
        return y

    program = kernels.record(forward, max(ROWS))

    def run(rows: int) -> float:
        positions, tables = torch.zeros(rows, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int32)
        batch = BatchLayout((rows,), (rows,), positions, positions, tables)
        begun = time.perf_counter()
        program(positions, batch)
        return (time.perf_counter() - begun) / IN_A_ROW

    return medians(run)


def gloo(rank: int, ranks: int, file: str) -> dict[int, float]:
    group = dist.ProcessGroupGloo(dist.FileStore(file, ranks), rank, ranks, torch.distributed.default_pg_timeout)

    def run(rows: int) -> float:
        x = torch.zeros(rows, WIDTH)
        begun = time.perf_counter()
        for _ in range(IN_A_ROW):
            group.allreduce([x]).wait()
        return (time.perf_counter() - begun) / IN_A_ROW

    return medians(run)


def medians(run: Callable[[int], float]) -> dict[int, float]:
    return {rows: statistics.median(run(rows) for _ in range(ROUNDS)) for rows in ROWS}


def everywhere(body: Callable[[int, int, Any], dict[int, float]], ranks: int, shared: Any) -> dict[int, float]:
    """`body` in a process per rank; what the first found."""
    with multiprocessing.get_context("fork").Pool(ranks) as pool:
        return pool.starmap(body, [(rank, ranks, shared) for rank in range(ranks)], chunksize=1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    ranks = parser.parse_args().ranks
    torch.set_num_threads(1)
    layout = Layout(make_plan(SPEC, tensor=ranks).replicas[0], SPEC, max(ROWS), max(ROWS))
    descriptor = create(layout.num_bytes)
    mine = everywhere(ours, ranks, descriptor)
    os.close(descriptor)
    with tempfile.TemporaryDirectory() as folder:
        theirs = everywhere(gloo, ranks, f"{folder}/store")
    table = Table(
        "rows", "KB", "ours, µs", "Gloo, µs", "ratio", title=f"all-reduce of {WIDTH} numbers a row, {ranks} ranks"
    )
    for rows in ROWS:
        a, b = mine[rows] * 1e6, theirs[rows] * 1e6
        table.add_row(str(rows), f"{rows * WIDTH * 4 / 1000:.0f}", f"{a:.0f}", f"{b:.0f}", f"{b / a:.1f}x")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
