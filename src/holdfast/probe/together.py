"""One rank of the probe: its kernels, its way to the others, and its clock, which all ranks start at once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from holdfast.core.plan import Place, places
from holdfast.core.spec import DecoderSpec, LayerSpec
from holdfast.kernels.cpu.kernels import CpuKernels
from holdfast.kernels.interface import BatchLayout
from holdfast.parallel.cuts import make_plan
from holdfast.parallel.segment import Layout, attach
from holdfast.parallel.shared import SharedCollectives
from holdfast.probe.job import Job

ROWS = (1, 4, 8, 16, 32, 64, 256)
WIDTH = 1024
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

    def __init__(self, job: Job, clock: Callable[[], float]) -> None:
        self.job = job
        self.clock = clock
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

    def least(self, *works: Callable[[], object]) -> float:
        """Seconds of the fastest work of all rounds, each begun by all ranks at once; of `works`, which take equally
        long, one after the other in every round. The first is not counted: it is a warm-up."""
        seconds = []
        for work in (works[0], *works * self.job.rounds):
            self.together()
            begun = self.clock()
            work()
            seconds.append(self.clock() - begun)
        return min(seconds[1:])

    def shared(self) -> dict[str, int]:
        return {"ranks": self.job.ranks, "threads": self.job.threads}


def step_of(rows: int) -> tuple[torch.Tensor, BatchLayout]:
    """So many rows of one request, each at a place of its own."""
    ids, places, table = (
        torch.zeros(rows, dtype=torch.int64),
        torch.arange(rows),
        torch.zeros(1, 1, dtype=torch.int32),
    )
    return ids, BatchLayout((rows,), (rows,), places, places, table)
