"""Checks of the weights over real sockets: every rank is waited for as long as its replica lives."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from holdfast.core.boot import Endpoints
from holdfast.core.errors import InvalidRequest, Unavailable
from holdfast.core.lifecycle import DiskTier, Replace, ReplicaLost
from holdfast.core.wire import (
    CheckWeights,
    EngineReady,
    EngineStats,
    Outputs,
    ToEngine,
    WeightsChecked,
    decoder,
    encode,
)
from holdfast.gateway.checks import WeightChecks
from holdfast.gateway.metrics import Metrics
from holdfast.gateway.router import Router
from holdfast.gateway.tokenlog import TokenLog

DEADLINE = 10


async def test_a_check_has_every_rank_of_those_that_live(tmp_path: Path) -> None:
    """One replica has changed, one has taken blocks and may be wrong for it, one dies before all of it is known."""
    endpoints, metrics, told = Endpoints(str(tmp_path)), Metrics("m"), asyncio.Queue[Replace]()
    router = Router(endpoints, TokenLog(), metrics, max_live=4, num_replicas=3)
    checks = WeightChecks(router, metrics, told.put, shared=False)
    context = zmq.asyncio.Context()
    engine, gateway = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    engine.bind(endpoints.engine(0))
    gateway.connect(endpoints.gateway)
    tasks = [asyncio.create_task(router.run()), asyncio.create_task(checks.run(0.0))]
    try:
        with pytest.raises(Unavailable):
            await checks.check()
        for replica in range(3):
            await gateway.send(encode(EngineReady(replica, 0, 64, num_ranks=2 if replica else 1)))
        await asyncio.wait_for(router.wait_ready(), DEADLINE)
        restored = EngineStats(0, 0, 10, 0, 0, 0, 0, restored_blocks=1)
        await gateway.send(encode(Outputs(1, 0, [], restored)))
        asking = asyncio.create_task(checks.check())
        asked = None
        while not isinstance(asked, CheckWeights):
            asked = decoder(ToEngine).decode(await asyncio.wait_for(engine.recv(), DEADLINE))
        for rank, wrong in (("0.0.0", ["embed"]), ("1.0.1", []), ("1.0.0", []), ("2.0.0", [])):
            await gateway.send(encode(WeightsChecked(rank, asked.key, 100, 0.1, wrong)))
        replaced = [await asyncio.wait_for(told.get(), DEADLINE) for _ in range(2)]
        assert [(each.replica, each.kind, each.process) for each in replaced] == [
            (0, "corruption", "worker 0.0.0"),
            (1, "corruption", None),
        ]
        assert not asking.done()
        router.replica_lost(ReplicaLost(1, "it may have taken wrong blocks", 0, comes_back=True))
        await gateway.send(encode(Outputs(2, 0, [], restored)))  # just before the store forgot all
        late = await asyncio.wait_for(told.get(), DEADLINE)
        assert (late.replica, late.kind) == (2, "corruption")
        router.replica_lost(ReplicaLost(2, "killed by SIGKILL", 0, comes_back=True))
        reports, lost = await asyncio.wait_for(asking, DEADLINE)
        assert [report.rank for report in reports] == ["0.0.0", "1.0.0", "1.0.1", "2.0.0"]
        assert lost == [2]
        with pytest.raises(InvalidRequest, match="--shard-weights"):
            await WeightChecks(router, metrics, told.put, shared=True).check()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        router.close()
        context.destroy(linger=0)


def test_counters_of_the_disk_tier_only_grow() -> None:
    """Those of the store's next process begin at 0 again."""
    metrics = Metrics("m")
    for state in (DiskTier(5, 10, 2, 1, None), DiskTier(6, 12, 2, 1, "full"), DiskTier(7, 3, 1, 0, None)):
        metrics.disk_tier(state)
    lines = [
        line for line in metrics.exposition().decode().splitlines() if line.startswith("holdfast:checkpoint_disk")
    ]
    values = {line.split("{")[0].rpartition("disk_")[2]: float(line.rsplit(" ", 1)[1]) for line in lines}
    assert (values["blocks"], values["blocks_written_total"], values["blocks_read_total"]) == (7, 15, 3)
    assert values["blocks_broken_total"] == 1
