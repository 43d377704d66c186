"""The probe measures what it says, by ranks that work at once; how long anything took is not asserted."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from holdfast.core.errors import ConfigError
from holdfast.hardware.profile import Reading
from holdfast.parallel.segment import create
from holdfast.probe import run as probing
from holdfast.probe.computing import CONTEXTS, FORMATS, HEADS
from holdfast.probe.config import MeasureConfig, ProbeConfig
from holdfast.probe.job import Found, Job
from holdfast.probe.rank import measure
from holdfast.probe.together import ROWS, layout_of
from support.builds import builds

pytestmark = pytest.mark.skipif(not builds(), reason="Holdfast was installed without a C compiler")


def job(rank: int, ranks: int, descriptor: int | None, *, staged: bool = False) -> Job:
    return Job(
        rank=rank,
        ranks=ranks,
        threads=1,
        cores=(0,),
        descriptor=descriptor,
        staged=staged,
        sizes=(256,),
        formats=FORMATS,
        pool_bytes=20_000,
        rounds=1,
    )


def together(ranks: int, *, staged: bool = False) -> list[Found]:
    """The ranks as threads of this process; between them is what is between processes."""
    descriptor = create(layout_of(ranks, staged=staged).num_bytes)
    try:
        with ThreadPoolExecutor(ranks) as pool:
            jobs = [job(rank, ranks, descriptor, staged=staged) for rank in range(ranks)]
            return list(pool.map(measure, jobs))
    finally:
        os.close(descriptor)


def test_one_rank_measures_memory_products_and_attention() -> None:
    found = measure(job(0, 1, None))
    kinds = [(64, 1), (256, 1), (256, 8)]
    assert [(p.format, p.inputs, p.shards, p.rows) for p in found.products] == [
        (format, *kind, rows) for format in FORMATS for kind in kinds for rows in ROWS
    ]
    assert [(a.num_heads, a.requests, a.queries, a.context) for a in found.attentions] == [
        (heads.num_heads, *shape) for heads in HEADS for shape in CONTEXTS
    ]
    assert [(w.operation, w.rows) for w in found.row_works] == [
        (operation, rows) for rows in (1, 64) for operation in ("norm", "store_kv", "argmax")
    ]
    assert found.exchanges == ()
    points = (*found.readings, *found.products, *found.attentions, *found.row_works)
    assert all(0 < point.seconds < 10 and point.ranks == 1 for point in points)


def test_ranks_of_a_stage_measure_their_exchanges() -> None:
    first, second = together(2)
    sizes = [(e.operation, e.num_bytes) for e in first.exchanges]
    assert sizes == [(e.operation, e.num_bytes) for e in second.exchanges]
    assert sizes == [("all_reduce", rows * 4096) for rows in ROWS] + [("all_gather", rows * 32768) for rows in ROWS]
    assert first.readings[0].num_bytes == 2 * 20_000


def test_stages_measure_what_passes_between_them() -> None:
    first, second = together(2, staged=True)
    assert [e.operation for e in first.exchanges] == ["send"] * len(ROWS)
    assert len(second.exchanges) == len(ROWS)


def test_the_slowest_rank_counts() -> None:
    def took(seconds: float) -> Found:
        return Found(kernels="k", readings=(Reading(ranks=2, threads=1, seconds=seconds, num_bytes=1),))

    [reading] = probing._slowest([took(1.0), took(3.0), took(2.0)]).readings
    assert reading.seconds == 3.0


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MeasureConfig(max_ranks=0), "--max-ranks 0: must be at least 1 and at most 64"),
        (MeasureConfig(rounds=0), "--rounds 0: must be at least 1"),
        (MeasureConfig(pool_bytes=5), "--pool-bytes 5: must be at least 1M"),
    ],
)
def test_flags_out_of_range_are_refused(config: MeasureConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ProbeConfig(measure=config).check()
