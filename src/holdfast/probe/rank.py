"""One rank of the probe: `python -m holdfast.probe.rank JOB`. It measures, prints what it found, and ends; or ends at
once when its parent, which holds the other end of its standard input, is gone."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import msgspec
import torch

from holdfast.hardware.profile import Exchange, Exchanged
from holdfast.kernels.interface import BatchLayout, Forward
from holdfast.probe.computing import attentions, products, reading, row_works
from holdfast.probe.job import Found, Job
from holdfast.probe.together import ROWS, SPEC, WIDTH, Rank, step_of

IN_A_ROW = 10
BURSTS = 4
"""Of so many exchanges, in each round: soon done, as in `computing`."""


def measure(job: Job, clock: Callable[[], float] = time.perf_counter) -> Found:
    """All that this job measures, in seconds of `clock`."""
    rank = Rank(job, clock)
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
        readings=(reading(rank),),
        products=tuple(products(rank)),
        attentions=tuple(attentions(rank)),
        exchanges=tuple(_exchanges(rank)),
        row_works=tuple(row_works(rank)),
    )


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
        run = partial(program, *step_of(rows))
        seconds = rank.least(*[run] * BURSTS) / IN_A_ROW
        yield Exchange(**rank.shared(), operation=operation, num_bytes=rows * row_bytes, seconds=seconds)


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
